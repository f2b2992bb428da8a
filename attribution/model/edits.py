"""Edits of activations inside a trace: other values at some positions of some rows.

1. Edits are sorted by the target that they change; those at one target are made in the order in which they are given.
2. Each target is a block of the trace of its own (`capture.forward`), so that the model reaches it when it does, and
   nobody has to know the order of its modules.
3. The tensor there is copied, and only the positions of the rows that ask for it are written: every other row stays as
   it was, bit by bit.

The stream between attention and MLP needs more than one place: a layer reads it through a norm and adds it to what the
MLP writes, and the norm's input is the first of these two alone. Such a target is `carried`: what leaves the layer is
the changed stream and what the MLP adds to it.

An edit may need what was at an earlier place (a transcoder reads before the MLP and writes after it). A block of its
own keeps that in each forward pass, after all who change it there.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attribution.model.block import family_of
from attribution.model.capture import Change, Feeding, Stream
from attribution.model.traced import LOGITS, Site, TracedModel, first_tensor


@dataclass(frozen=True)
class Target:
    """A place that can be changed, with how its last axis is cut.

    Attributes:
        site: where the tensor is.
        heads, third: as `capture.Stream` has them.
        carried: of the stream between attention and MLP: where the MLP's part is added to it, and where both leave.
    """

    site: Site
    heads: int | None = None
    third: int | None = None
    carried: tuple[Site, Site] | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """A view of the tensor, its last axis cut: [..., width] to [..., heads, d_head]."""
        return Stream((self.site,), self.heads, self.third).cut(tensor)


@dataclass(frozen=True)
class Edit:
    """Other values in one row of a batch.

    Attributes:
        target: where.
        row: of the batch.
        function: what is there to what shall be there: [column, *width] to the same shape, or, with `heads`,
            [column, head, d_head].
        columns: which of the last columns, -1 being the last one fed; None is all of them.
        heads: which heads of a target that is cut into heads; None is all of them.
        told: called with the columns at which the edit was made, when it has been.
        reads: an earlier place in the model, whose rows at the same columns the function is given as well.
    """

    target: Target
    row: int
    function: Callable[..., Tensor]
    columns: range | None = None
    heads: tuple[int, ...] | None = None
    told: Callable[[range], None] | None = None
    reads: Target | None = None


Kept = dict[Site, Tensor]
"""What was at the places that edits read, in the forward pass under way."""


def targets_of(model: TracedModel, stream: Stream, *, point: str | None = None) -> list[Target]:
    """The targets of a stream, one per site; `point` is its name when it is one."""
    if point != "resid_mid":
        return [Target(site, stream.heads, stream.third) for site in stream.sites]
    family = family_of(model)
    place, below = family.points["mlp_out"], f".{family.points['resid_mid'].module}"
    found = []
    for site in stream.sites:
        layer = site.path.removesuffix(below)
        found.append(Target(site, carried=(Site(f"{layer}.{place.module}", place.side), Site(layer, "output"))))
    return found


def changes_of(model: TracedModel, edits: Iterable[Edit]) -> list[Change]:
    """The edits as blocks of a trace, for `capture.forward`. Edits of one target keep their order."""
    by_target: dict[Target, list[Edit]] = {}
    read: dict[Site, None] = {}
    for edit in edits:
        by_target.setdefault(edit.target, []).append(edit)
        if edit.reads is not None:
            read[edit.reads.site] = None
    kept: Kept = {}
    changes = [change_of(model, target, lambda _, at=target: by_target[at], kept) for target in in_order(by_target)]
    return changes + [keeping(model, site, kept) for site in read]


def in_order(targets: Iterable[Target]) -> list[Target]:
    """The order in which blocks are to be made: those that wait for one place are served in it.

    A carried target reads what the MLP adds after others have changed that, and writes what leaves the layer before
    others change this.
    """
    targets = list(targets)
    leaving = {target.carried[1] for target in targets if target.carried}
    return sorted(targets, key=lambda target: 1 if target.carried else 2 * (target.site in leaving))


def keeping(model: TracedModel, site: Site, kept: Kept) -> Change:
    """A place that edits elsewhere read, as a block of a trace; to come after all blocks that change something."""

    def change(_: Feeding) -> None:
        kept[site] = tensor_of(read_value(model, site), site)

    return change


def change_of(
    model: TracedModel, target: Target, edits: Callable[[Feeding], Sequence[Edit]], kept: Kept | None = None
) -> Change:
    """One target as a block of a trace; `edits` is asked for what to do there when the model has reached it."""

    def change(feeding: Feeding) -> None:
        value = read_value(model, target.site)  # also when nothing is to be done: a loop over steps must wait here
        if chosen := edits(feeding):
            _make(model, target, value, chosen, kept)

    return change


def _make(model: TracedModel, target: Target, value: Any, chosen: Sequence[Edit], kept: Kept | None) -> None:
    tensor = tensor_of(value, target.site)
    changed = edited(tensor, chosen, kept)
    write_value(model, target.site, with_tensor(value, target.site, changed))
    if target.carried is None:
        return
    added, leaving = target.carried
    part = tensor_of(read_value(model, added), added)
    whole = read_value(model, leaving)
    result = tensor_of(whole, leaving).clone()
    for row in {edit.row for edit in chosen}:
        # with the sum that the layer itself makes: rows of positions that were not edited come out as they were
        result[row] = changed[row] + part[row]
    write_value(model, leaving, with_tensor(whole, leaving, result))


def edited(
    tensor: Float[Tensor, "row column *width"], edits: Sequence[Edit], kept: Kept | None = None
) -> Float[Tensor, "row column *width"]:
    """A copy of the tensor with edits made, one after the other."""
    changed = tensor.clone()
    count = tensor.shape[1]
    for edit in edits:
        columns = present(edit.columns, count)
        if not columns:
            continue
        first = columns.start + count
        at = slice(first, first + len(columns) * columns.step, columns.step)
        rows = edit.target.cut(changed)[edit.row, at]
        if edit.reads is not None:
            assert kept is not None
            rows.copy_(edit.function(rows, edit.reads.cut(kept[edit.reads.site])[edit.row, at]))
        elif edit.heads is None:
            rows.copy_(edit.function(rows))
        else:
            heads = list(edit.heads)
            rows[:, heads] = edit.function(rows[:, heads])
        if edit.told is not None:
            edit.told(columns)
    return changed


def present(columns: range | None, count: int) -> range:
    """Those of some columns, counted from the end, that a tensor of `count` columns has."""
    if columns is None:
        return range(-count, 0)
    kept = [column for column in columns if column >= -count] if columns.start < -count else columns
    return columns[len(columns) - len(kept) :]


def read_value(model: TracedModel, site: Site) -> Any:
    """Inside a trace: what is at a site."""
    envoy: Any = envoy_of(model, site)
    return envoy.output if site.side == "output" else envoy.input


def write_value(model: TracedModel, site: Site, value: Any) -> None:
    """Inside a trace: put something else at a site."""
    envoy: Any = envoy_of(model, site)
    if site.side == "output":
        envoy.output = value
    else:
        envoy.input = value


def envoy_of(model: TracedModel, site: Site) -> Any:
    """The envoy of the module of a site."""
    return model.envoy if site == LOGITS else model.envoy.get(site.path)


def tensor_of(value: Any, site: Site) -> Tensor:
    """The tensor in what is at a site: itself, the first one of a tuple, or the logits of what the model returns."""
    tensor = value.logits if site == LOGITS else first_tensor(value)
    if tensor is None:
        raise RuntimeError(f"{site.path}.{site.side} held a tensor when the model was probed and holds none now")
    return tensor


def with_tensor(value: Any, site: Site, tensor: Tensor) -> Any:
    """`value`, with another tensor in the place of the one that `tensor_of` finds."""
    if site == LOGITS:
        value = copy.copy(value)
        value.logits = tensor
        return value
    if isinstance(value, tuple | list):
        at = next(index for index, item in enumerate(value) if isinstance(item, Tensor))
        return type(value)([*value[:at], tensor, *value[at + 1 :]])
    return tensor
