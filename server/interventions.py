"""Interventions of a request: what is changed inside the model while it answers.

1. `declare_interventions` checks fields, selectors, windows, heads and edges, which needs nothing read from disk.
2. `server.directions` reads what they name: steering vectors, and means over stored samples.
3. An `Acting` per choice gives the changes of each forward pass to its row, and keeps the receipts.

A further type is a field or two of the body, an entry of `server.intervention_body` and one of
`server.directions.function_of`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attribution.errors import BadSelector, InvalidRequest, SightlineError
from attribution.features.sources import FeatureStore
from attribution.interventions.edges import EdgeSpec, Span, check_edges, selected
from attribution.interventions.functions import Function
from attribution.model.block import Block
from attribution.model.edges import check_cuttable
from attribution.model.edits import Target, targets_of
from attribution.model.resolve import Resolved, resolve
from attribution.model.traced import TracedModel
from attribution.positions import Window, parse_window
from attribution.selectors import Point, parse_selector
from server.feature_steering import Clamps, Feature, find_feature
from server.intervention_body import InterventionBody, check_fields
from server.savepoints import check_window
from server.schemas import GenerationBody

POINTS_WITH_HEADS = ("q", "k", "v", "z")


@dataclass(frozen=True)
class Sited:
    """An intervention at a site of a given model, its function still to be made.

    Attributes:
        index: its place in the request.
        targets: what it changes, one per layer.
        point: the name of the point, None for a module's path.
        heads: which heads; None leaves the width whole.
        feature: of an autoencoder, when that is what it steers by.
    """

    index: int
    body: InterventionBody
    selector: Resolved
    targets: tuple[Target, ...]
    point: str | None
    heads: tuple[int, ...] | None
    window: Window
    feature: Feature | None = None

    @property
    def layers(self) -> list[int | None]:
        """The layer of each target; None where the selector names none."""
        return list(self.selector.layers) or [None] * len(self.targets)

    @property
    def described(self) -> dict[str, Any]:
        """What it is, for its receipt."""
        if self.feature is not None:
            return {"type": "feature", "selector": self.selector.text} | self.feature.described
        name = {} if self.body.name is None else {"name": self.body.name}
        return {"type": self.body.type, "selector": self.body.selector} | name


@dataclass(frozen=True)
class Knockout:
    """Edges of attention that are removed in a given model."""

    index: int
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    edges: tuple[EdgeSpec, ...]

    @property
    def described(self) -> dict[str, Any]:
        """What it is, for its receipt."""
        return {"type": "knockout", "selector": None}


Declared = Sited | Knockout


@dataclass(frozen=True)
class Ready:
    """An intervention at a site, with the function of each of its targets.

    Attributes:
        clamps: makes the function of a feature that is clamped, given whom it is to tell the activations it found.
    """

    sited: Sited
    functions: tuple[Function, ...]
    clamps: Clamps | None = None


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Say of an error raised inside which intervention of the request it is about."""
    where = f"interventions.{index}"
    try:
        yield
    except SightlineError as error:
        if (error.param or "").startswith(where):
            raise
        param = where if error.param is None else f"{where}.{error.param}"
        raise type(error)(f"{where}: {error.message}", param=param) from error


def declare_interventions(model: TracedModel, body: GenerationBody, features: FeatureStore) -> list[Declared]:
    """Check the interventions of a request against a model and the autoencoders at hand.

    Raises:
        InvalidRequest, BadSelector, BadPositions, OutOfRange, UnsupportedModel, SourceNotFound: naming the field.
    """
    if body.baseline and not body.interventions:
        raise InvalidRequest(
            "baseline compares an answer with interventions to one without, and this request has no interventions; "
            "leave it out, or name some",
            param="baseline",
        )
    declared: list[Declared] = []
    for index, one in enumerate(body.interventions or []):
        with naming(index):
            check_fields(one)
            declared.append(_declare(model, index, one, features))
    _refuse_two_views(declared)
    return declared


def _declare(model: TracedModel, index: int, body: InterventionBody, features: FeatureStore) -> Declared:
    if body.type == "knockout":
        return _knockout(model, index, body)
    if body.type != "feature":
        return _sited(model, index, body)
    feature = find_feature(model, body, features)
    site, targets = feature.site(model)
    return Sited(index, body, site, targets, feature.source.writes.point, None, parse_window(body.positions), feature)


# --- at a site


def _sited(model: TracedModel, index: int, body: InterventionBody) -> Sited:
    assert body.selector is not None
    parsed, resolved = parse_selector(body.selector), resolve(model, body.selector)
    point = parsed.name if isinstance(parsed, Point) else None
    if resolved.is_pattern:
        raise BadSelector(
            f"{body.selector!r}: the pattern is not edited; an intervention of type 'knockout' removes edges of it",
            param="selector",
        )
    (stream,) = resolved.streams
    for site in stream.sites:
        if site in model.sites and model.sites[site].visits > 1:
            raise BadSelector(
                f"{body.selector!r}: {site.path} runs {model.sites[site].visits} times in one forward pass, and which "
                "of them is meant cannot be said; choose a module inside or around it that runs once",
                param="selector",
            )
    targets = tuple(targets_of(model, stream, point=point))
    heads = _heads(body, point, resolved)
    return Sited(index, body, resolved, targets, point, heads, parse_window(body.positions))


def _heads(body: InterventionBody, point: str | None, resolved: Resolved) -> tuple[int, ...] | None:
    if body.heads is None:
        return None
    if point not in POINTS_WITH_HEADS:
        raise InvalidRequest(
            f"{resolved.text!r} has no heads; the points with heads are {', '.join(POINTS_WITH_HEADS)}", param="heads"
        )
    kind = "key/value heads" if point in ("k", "v") else "heads"
    return _chosen(body.heads, resolved.width[0], f"the {kind} of {point!r}")


def _chosen(numbers: list[int], count: int, what: str) -> tuple[int, ...]:
    if not numbers or len(set(numbers)) != len(numbers):
        raise InvalidRequest(f"heads names at least one head, and none twice; found {numbers}", param="heads")
    wrong = next((one for one in numbers if not 0 <= one < count), None)
    if wrong is not None:
        raise InvalidRequest(f"{what} are 0 to {count - 1}; found {wrong}", param="heads")
    return tuple(numbers)


def _refuse_two_views(declared: list[Declared]) -> None:
    """A point that is more than its module's tensor cannot be changed beside that tensor: each would undo the other."""
    seen: dict[Any, tuple[int, Target]] = {}
    for one in declared:
        for target in one.targets if isinstance(one, Sited) else ():
            index, other = seen.setdefault(target.site, (one.index, target))
            if other.carried != target.carried:
                raise InvalidRequest(
                    f"interventions.{one.index}: {target.site.path}.{target.site.side} is what the MLP's norm reads, "
                    f"and interventions.{index} changes the same place as another thing; use the point resid_mid, "
                    "which is the stream there, in both, or the module's path in both",
                    param=f"interventions.{one.index}.selector",
                )


# --- knockout


def _knockout(model: TracedModel, index: int, body: InterventionBody) -> Knockout:
    assert body.edges is not None
    check_cuttable(model)
    if not body.edges:
        raise InvalidRequest("edges is empty; it names at least one, as [[-1, 0]]", param="edges")
    dims = model.dimensions
    layers = set(selected(body.layers, dims.n_layers, "the layer", param="layers"))
    if not layers:
        raise InvalidRequest("layers is empty; it names at least one", param="layers")
    heads = None if body.heads is None else _chosen(body.heads, dims.n_heads, "the heads")
    return Knockout(index, tuple(sorted(layers)), heads, tuple(map(EdgeSpec.parse, body.edges)))


def check_interventions(model: TracedModel, declared: list[Declared], prompt: int, limit: int) -> None:
    """Check windows and edges for a prompt of `prompt` tokens and at most `limit` generated ones.

    Raises:
        BadPositions: a window that no token can fall in, or that ends beyond the last one.
        OutOfRange, InvalidArgument, NoKeyLeft: an edge that cannot be, or that leaves a query no key.
    """
    most = prompt + max(limit - 1, 0)
    cut: dict[tuple[int, int], tuple[EdgeSpec, ...]] = {}
    for one in declared:
        with naming(one.index):
            if isinstance(one, Sited):
                check_window(repr(one.selector.text), one.window, one.window.span(prompt, most), prompt, limit)
                continue
            for edge in one.edges:
                edge.resolved(prompt, most)
            for layer in one.layers:
                for head in range(model.dimensions.n_heads) if one.heads is None else one.heads:
                    cut[layer, head] = (*cut.get((layer, head), ()), *one.edges)
            _check_rows(model, cut, prompt, most)


def _check_rows(model: TracedModel, cut: dict[tuple[int, int], tuple[EdgeSpec, ...]], prompt: int, most: int) -> None:
    """See that all edges of a head together leave every query a key."""
    by_edges: dict[tuple[EdgeSpec, ...], dict[int, int | None]] = {}
    for (layer, _), edges in cut.items():
        windows = by_edges.setdefault(edges, {})
        if layer not in windows:
            windows[layer] = Block(model, layer).window
    for edges, windows in by_edges.items():
        check_edges(edges, prompt, min(most, _horizon(edges, windows, prompt)), windows)


def _horizon(edges: tuple[EdgeSpec, ...], windows: dict[int, int | None], prompt: int) -> int:
    """How many positions have to be looked at: behind the last end that an edge names, every query fares the same."""
    sides = [side for edge in edges for side in (edge.query, edge.key)]
    named = [end for side in sides for end in ((side.start, side.stop) if isinstance(side, Span) else (side,))]
    last = max([prompt, *(end for end in named if end is not None)])  # negative ones lie in the prompt
    return last + max(window or 0 for window in windows.values()) + 2
