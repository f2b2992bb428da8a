"""What a selector names in a given model: streams of sites, or the reason why it names nothing."""

from dataclasses import dataclass
from math import prod

import torch

from attribution.errors import BadSelector
from attribution.model.capture import Stream
from attribution.model.families import Place
from attribution.model.traced import LOGITS, PROBE_ROWS, PROBE_TOKENS, Seen, Site, TracedModel
from attribution.positions import Window
from attribution.selectors import Index, ModulePath, Point, parse_selector, pick

_SHOWN = 12


@dataclass(frozen=True)
class Resolved:
    """A selector in a given model.

    Attributes:
        text: the selector as it was written.
        streams: what to capture: one stream, or (q, k) for a pattern.
        layers: the indices that the selector names; () for a module without an index.
        stacked: whether the result has a first axis over `layers`.
        width: the shape after the position axis, per layer; the key axis of a pattern is 0 here.
        dtype: of the captured tensor.
    """

    text: str
    streams: tuple[Stream, ...]
    layers: tuple[int, ...]
    stacked: bool
    width: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_pattern(self) -> bool:
        """Whether the pattern is to be recomputed from q and k."""
        return len(self.streams) == 2

    @property
    def tail(self) -> bool:
        """Whether only the positions whose logits are computed pass here."""
        return self.streams[0].tail

    def span(self, window: Window, prompt: int, tokens: int) -> range:
        """The positions kept. At the output head `all` starts where the first token is drawn."""
        if self.tail and window.name == "all":
            return range(prompt - 1, tokens)
        return window.span(prompt, tokens)

    def bytes_for(self, kept: int, tokens: int, dtype: torch.dtype | None) -> int:
        """The bytes of `kept` positions of a sequence of `tokens` positions."""
        rows = max(1, len(self.layers)) * kept
        if self.is_pattern:
            return rows * self.width[0] * tokens * (dtype or self.dtype).itemsize
        return rows * prod(self.width) * (dtype or self.dtype).itemsize


def resolve(model: TracedModel, text: str) -> Resolved:
    """Find what `text` names in `model`.

    Raises:
        BadSelector: saying which part failed and what exists there.
    """
    selector = parse_selector(text)
    if isinstance(selector, ModulePath):
        return _resolve_module(model, selector)
    if selector.name == "logits":
        stream = Stream((LOGITS,), tail=True)
        return Resolved(text, (stream,), (), False, (model.dimensions.d_vocab,), model.dtype)
    return _resolve_point(model, selector)


def _resolve_point(model: TracedModel, point: Point) -> Resolved:
    if model.family is None or point.index is None:
        readable = (site.path for site, seen in model.sites.items() if site.side == "output" and seen.tokenwise)
        raise BadSelector(
            f"{point.text!r}: {model.id} has no points ({model.note}); name modules by their path, as in "
            f"'{min(readable, default='lm_head')}.output'",
            param="selector",
        )
    dims = model.dimensions
    layers = pick(point.index, dims.n_layers, point.text, f"the list of layers of {model.id}")
    names = ("q", "k") if point.name == "pattern" else (point.name,)
    streams = tuple(stream_of(model, name, layers) for name in names)
    seen = model.sites[streams[0].sites[0]]
    width = tuple(streams[0].cut(torch.empty(seen.shape, device="meta")).shape)
    if point.name == "pattern":
        width = (dims.n_heads, 0)
    return Resolved(point.text, streams, tuple(layers), isinstance(point.index, slice), width, seen.dtype)


def stream_of(model: TracedModel, name: str, layers: list[int]) -> Stream:
    """The stream of a point (other than pattern and logits) over some layers of a model that has points."""
    family = model.family
    assert family is not None
    place: Place = family.points[name]
    paths = [f"{family.layers}.{layer}" + (f".{place.module}" if place.module else "") for layer in layers]
    heads = {"query": model.dimensions.n_heads, "kv": model.dimensions.n_kv_heads, None: None}[place.heads]
    return Stream(tuple(Site(path, place.side) for path in paths), heads, place.third)


def _resolve_module(model: TracedModel, selector: ModulePath) -> Resolved:
    paths, layers, stacked = [""], (), False
    for part in selector.parts:
        if isinstance(part, str):
            paths = [_child(model, path, part, selector.text) for path in paths]
            continue
        members = _members(model, paths[0], part, selector.text)
        layers, stacked = (tuple(members), isinstance(part, slice)) if not stacked else (layers, stacked)
        paths = [f"{path}.{member}" for path in paths for member in members]
    sites = tuple(Site(path, selector.side) for path in paths)
    seen = [_token_site(model, site, selector.text) for site in sites]
    if len({(one.shape, one.dtype, one.tail) for one in seen}) > 1:
        raise BadSelector(
            f"{selector.text!r}: the modules that it names have different shapes ({seen[0].shape}, ...); select them "
            "one by one",
            param="selector",
        )
    stream = Stream(sites, tail=seen[0].tail)
    return Resolved(selector.text, (stream,), layers if stacked else (), stacked, seen[0].shape, seen[0].dtype)


def _child(model: TracedModel, path: str, name: str, text: str) -> str:
    child = f"{path}.{name}" if path else name
    if child in model.module_names:
        return child
    raise BadSelector(
        f"{text!r}: {path or 'the model'} has no part {name!r}; it has {_shown(_children(model, path))}",
        param="selector",
    )


def _members(model: TracedModel, path: str, index: Index, text: str) -> list[int]:
    count = sum(child.isdigit() for child in _children(model, path))
    if count == 0:
        raise BadSelector(f"{text!r}: {path or 'the model'} is not a list of modules", param="selector")
    return pick(index, count, text, path)


def _children(model: TracedModel, path: str) -> list[str]:
    start = f"{path}." if path else ""
    return sorted(
        {name[len(start) :] for name in model.module_names if name.startswith(start) and "." not in name[len(start) :]}
    )


def _shown(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _token_site(model: TracedModel, site: Site, text: str) -> Seen:
    seen = model.sites.get(site)
    if seen is None:
        raise BadSelector(
            f"{text!r}: {site.path} has no tensor at its {site.side} when the model runs; its parts are "
            f"{_shown(_children(model, site.path))}",
            param="selector",
        )
    if not seen.tokenwise:
        raise BadSelector(
            f"{text!r}: the {site.side} of {site.path} is not one row per token (for {PROBE_ROWS} rows of "
            f"{PROBE_TOKENS} tokens its shape is {list(seen.shape)})",
            param="selector",
        )
    return seen
