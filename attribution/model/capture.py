"""One traced forward pass, with the sites that were asked for.

1. Trace the model once over a left-padded batch, its key/value cache given from outside.
2. Keep the union of the modules that anyone asked for: `tracer.cache` needs no order and no loop.
3. What changes something is a block of the trace of its own, which runs when the model reaches the place that it waits
   for; what was kept is what everybody has left there.
4. Read each site from what was kept, and stack the layers of each stream on the CPU.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attribution.model.traced import LOGITS, Site, TracedModel, first_tensor

_ROWS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Batch:
    """The input of one forward: left-padded rows.

    Attributes:
        ids: the tokens fed now, [row, fed].
        mask: 1 for tokens and 0 for padding, over the cached and the fed columns, [row, column].
        positions: the position of each fed token, [row, fed]; padding has any.
        cache: transformers' cache, extended by the forward; None runs without one.
        keep: how many of the last fed columns get logits.
    """

    ids: Int[Tensor, "row fed"]
    mask: Int[Tensor, "row column"]
    positions: Int[Tensor, "row fed"]
    cache: object | None
    keep: int


Feeding = Callable[[], tuple[Tensor, int]]
"""Says what is being fed: the mask, [row, column] over the cached and the fed columns, and how many are fed.

To be asked when the model has reached a place: where one block waits for step after step, not before.
"""

Change = Callable[[Feeding], None]
"""A block of a trace that changes something (`attribution.model.edits`)."""


@dataclass(frozen=True)
class Stream:
    """The same site in one or more layers, with how its last axis is cut.

    Attributes:
        sites: one per layer.
        heads: cut the last axis into this many heads; None leaves it.
        third: take this third of the last axis first (fused projections).
        tail: whether only the last `keep` columns pass here.
    """

    sites: tuple[Site, ...]
    heads: int | None = None
    third: int | None = None
    tail: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        """Cut the last axis: [..., width] to [..., heads, d_head]."""
        if self.third is not None:
            tensor = tensor.chunk(3, dim=-1)[self.third]
        if self.heads is not None:
            tensor = tensor.unflatten(-1, (self.heads, -1))
        return tensor


def forward(
    model: TracedModel, batch: Batch, streams: Iterable[Stream], changes: Sequence[Change] = ()
) -> tuple[Float[Tensor, "row kept vocab"], dict[Stream, Tensor]]:
    """Run the model once; call it on the model's own thread.

    Args:
        changes: what changes something on the way; those that wait for one place are served in this order.

    Returns:
        The logits of the last `batch.keep` columns, and for each stream [layer, row, column, ...] on the CPU, in the
        model's dtype; `column` counts all fed columns, or the last `keep` of a tail.
    """
    streams = list(streams)
    modules = sorted({f"{model.envoy.path}.{site.path}" for s in streams for site in s.sites if site != LOGITS})
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": batch.positions,
        "past_key_values": batch.cache,
        "use_cache": batch.cache is not None,
        "logits_to_keep": batch.keep,
    }
    with torch.no_grad():
        if changes:
            logits, kept = _trace_with_changes(model, inputs, modules, batch, changes)
        else:
            logits, kept = _trace_with_cache(model, inputs, modules) if modules else (_trace(model, inputs), None)
    return logits, {stream: _stack(model, stream, logits, kept) for stream in streams}


def _trace(model: TracedModel, inputs: dict[str, object]) -> Tensor:
    with model.envoy.trace(**inputs) as tracer:
        result = nnsight.save(tracer.result)
    return result.logits


def _trace_with_cache(model: TracedModel, inputs: dict[str, object], modules: list[str]) -> tuple[Tensor, object]:
    with model.envoy.trace(**inputs) as tracer:
        kept = tracer.cache(modules=modules, include_inputs=True, device=None)
        result = nnsight.save(tracer.result)
    return result.logits, kept


def _trace_with_changes(
    model: TracedModel, inputs: dict[str, object], modules: list[str], batch: Batch, changes: Sequence[Change]
) -> tuple[Tensor, object]:
    kept = None
    with model.envoy.trace(**{name: value for name, value in inputs.items() if name not in _ROWS}) as tracer:
        with tracer.invoke(**{name: inputs[name] for name in _ROWS}):
            if modules:
                kept = tracer.cache(modules=modules, include_inputs=True, device=None)
            result = nnsight.save(tracer.result)
        for change in changes:
            with tracer.invoke():
                change(lambda: (batch.mask, batch.ids.shape[1]))
    return result.logits, kept


def _stack(model: TracedModel, stream: Stream, logits: Tensor, kept: object | None) -> Tensor:
    layers = [stream.cut(read_site(model, site, logits, kept)) for site in stream.sites]
    if len({layer.device for layer in layers}) > 1:
        layers = [layer.cpu() for layer in layers]
    return torch.stack(layers).cpu()


def read_site(model: TracedModel, site: Site, logits: Tensor, kept: object | None) -> Tensor:
    """One site of a traced forward, [row, column, ...]."""
    if site == LOGITS:
        return logits
    entry = kept[f"{model.envoy.path}.{site.path}"]  # type: ignore[index]
    tensor = first_tensor(entry.output if site.side == "output" else entry.input)
    if tensor is None:
        raise RuntimeError(f"{site.path}.{site.side} held a tensor when the model was probed and holds none now")
    return tensor
