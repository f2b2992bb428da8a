"""The interventions of one completion while it is generated: the changes of each forward pass, and the receipts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from attribution.interventions.edges import removed_edges
from attribution.model.block import family_of
from attribution.model.capture import Change, Feeding
from attribution.model.edges import Cut, cut_layer, in_columns
from attribution.model.edits import Edit, Kept, Target, change_of, changes_of, in_order, keeping, read_value
from attribution.model.traced import Site, TracedModel
from attribution.positions import overlap
from server.interventions import Knockout, Ready
from server.receipts import Receipt

_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Removal:
    """Edges that one knockout removes in one row and one forward pass, between positions."""

    row: int
    knockout: Knockout
    removed: Bool[Tensor, "query key"]
    told: Callable[[int], None]


class Acting:
    """The interventions of one completion.

    Args:
        prompt: how many tokens the prompt has.
        limit: the most tokens that are generated.
    """

    def __init__(self, model: TracedModel, interventions: Sequence[Ready | Knockout], prompt: int, limit: int) -> None:
        self._n_heads = model.dimensions.n_heads
        self._prompt, self._most = prompt, prompt + max(limit - 1, 0)
        self._sited = [one for one in interventions if isinstance(one, Ready)]
        self._knockouts = [one for one in interventions if isinstance(one, Knockout)]
        described = {
            _index(one): one.sited.described if isinstance(one, Ready) else one.described for one in interventions
        }
        self._receipts = {index: Receipt(what) for index, what in described.items()}
        for one in self._knockouts:
            self._receipts[one.index].edges = 0
        for one in self._sited:
            self._receipts[one.sited.index].observes = one.clamps is not None

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """What each intervention did so far, in the order of the request."""
        return [receipt.as_json() for receipt in self._receipts.values()]

    @property
    def targets(self) -> list[Target]:
        """Every place that is ever changed."""
        return list(dict.fromkeys(target for one in self._sited for target in one.sited.targets))

    @property
    def reads(self) -> list[Site]:
        """Every place that is read for what is done at another one."""
        read = (one.sited.feature.reads for one in self._sited if one.sited.feature is not None)
        return list(dict.fromkeys(target.site for target in read if target is not None))

    @property
    def layers(self) -> list[int]:
        """The layers whose edges are ever removed."""
        return sorted({layer for one in self._knockouts for layer in one.layers})

    def edits(self, row: int, start: int, stop: int, tail: int) -> list[Edit]:
        """The edits of a forward pass that feeds the positions [start, stop) to `row`.

        Args:
            tail: at how many positions from the end of the prompt on this completion asks for logits. Neighbours may
                ask for more, which is none of its business.
        """
        found = []
        for one in self._sited:
            sited, receipt = one.sited, self._receipts[one.sited.index]
            first = max(start, self._prompt - tail) if sited.selector.tail else start
            chosen = overlap(sited.window.span(self._prompt, _ENDLESS), first, stop)
            if not chosen:
                continue
            columns = range(chosen.start - stop, chosen.stop - stop, chosen.step)
            functions = one.functions if one.clamps is None else (one.clamps(receipt.observe),)
            reads = None if sited.feature is None else sited.feature.reads
            for target, function, layer in zip(sited.targets, functions, sited.layers, strict=True):
                told = partial(_count, receipt, stop, layer)
                found.append(Edit(target, row, function, columns, sited.heads, told, reads))
        return found

    def removals(self, row: int, start: int, stop: int) -> list[Removal]:
        """The edges that are removed in a forward pass that feeds the positions [start, stop) to `row`."""
        found = []
        for one in self._knockouts if stop > start else ():
            removed = removed_edges(one.edges, range(start, stop), stop, self._prompt, self._most)
            if removed.any():
                queries = [range(query, query + 1) for query in (removed.any(-1).nonzero().flatten() + start).tolist()]
                told = partial(self._receipts[one.index].count, stop, queries, edges=int(removed.sum()))
                found.append(Removal(row, one, removed, told))
        return found

    def removed(self, layer: int, queries: list[int], keys: int) -> Bool[Tensor, "head query key"] | None:
        """Which edges from some queries of a layer are removed; None when none is."""
        n_heads = self._n_heads
        found = torch.zeros(n_heads, len(queries), keys, dtype=torch.bool)
        for one in self._knockouts:
            if layer in one.layers and queries:
                heads = list(range(n_heads) if one.heads is None else one.heads)
                first = min(queries)
                rows = removed_edges(one.edges, range(first, max(queries) + 1), keys, self._prompt, self._most)
                found[heads] |= rows[[query - first for query in queries]]
        return found if bool(found.any()) else None


def _index(one: Ready | Knockout) -> int:
    return one.index if isinstance(one, Knockout) else one.sited.index


def _count(receipt: Receipt, stop: int, layer: int | None, columns: range) -> None:
    receipt.count(stop, [range(columns.start + stop, columns.stop + stop, columns.step)], layer)


@dataclass(frozen=True)
class Row:
    """A row of a forward pass: whose it is, and which positions it is fed."""

    acting: Acting
    row: int
    start: int
    stop: int
    tail: int


def changes_for(model: TracedModel, rows: Iterable[Row]) -> list[Change]:
    """The changes of one forward pass, of all rows that ask for some."""
    edits: list[Edit] = []
    removals: list[Removal] = []
    for one in rows:
        edits += one.acting.edits(one.row, one.start, one.stop, one.tail)
        removals += one.acting.removals(one.row, one.start, one.stop)
    layers = sorted({layer for one in removals for layer in one.knockout.layers})
    return [_cutting(model, layer, lambda _: removals) for layer in layers] + changes_of(model, edits)


def lasting_changes(model: TracedModel, acting: Acting, tail: int) -> list[Change]:
    """The changes of every forward pass of a completion that runs alone, for the reference path."""

    def edits(target: Target, feeding: Feeding) -> list[Edit]:
        return [one for one in acting.edits(0, *_span(feeding), tail) if one.target == target]

    def removals(feeding: Feeding) -> list[Removal]:
        return acting.removals(0, *_span(feeding))

    kept: Kept = {}
    cuts = [_cutting(model, layer, removals) for layer in acting.layers]
    changes = [change_of(model, target, partial(edits, target), kept) for target in in_order(acting.targets)]
    return [*cuts, *changes, *(keeping(model, site, kept) for site in acting.reads)]


def _span(feeding: Feeding) -> tuple[int, int]:
    """The positions that are fed, of a completion that runs alone."""
    mask, fed = feeding()
    return mask.shape[1] - fed, mask.shape[1]


def _cutting(model: TracedModel, layer: int, removals: Callable[[Feeding], Sequence[Removal]]) -> Change:
    family = family_of(model)
    attention = Site(f"{family.layers}.{layer}.{family.attention}", "input")

    def change(feeding: Feeding) -> None:
        read_value(model, attention)  # waits for it: what is fed is known then
        mask, fed = feeding()
        here = [one for one in removals(feeding) if layer in one.knockout.layers]
        columns = mask.shape[1]
        cuts = [Cut(one.row, layer, one.knockout.heads, in_columns(one.removed, fed, columns)) for one in here]
        cut_layer(model, layer, cuts, mask, fed)
        for one in here:
            one.told(layer)

    return change
