"""The model run forward with the same things held fixed by value as `linearised` holds fixed in its gradients.

It shares no step with the backward pass: in one batch the first row is the sequence as it is, and every other row takes
from it

1. q and k of every layer, and so the pattern,
2. the scale of every norm of the stream,
3. what every MLP adds, but for what is linear in what it reads, where that is given,

while something is added to the embeddings or to what an MLP adds. What follows is linear in it, and read off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.block import family_of
from attribution.model.linearised import Reader
from attribution.model.live import Addition, added
from attribution.model.traced import TracedModel


@dataclass(frozen=True)
class Held:
    """What was read, per row; row 0 is the sequence as it is.

    Attributes:
        reads: what each layer's reader reads; None where a layer has none.
        final: the normed stream that the output head reads.
    """

    reads: tuple[Float[Tensor, "row pos d_model"] | None, ...]
    final: Float[Tensor, "row pos d_model"]


def run_held(
    model: TracedModel, token_ids: list[int], additions: Sequence[Addition], readers: Mapping[int, Reader]
) -> Held:
    """Run the model forward, with a row for each set of additions and one without any."""
    family = family_of(model)
    rows = 1 + max((one.row for one in additions), default=0)
    ids = torch.tensor([token_ids] * rows, device=model.device)
    reads: list[Tensor | None] = []
    with torch.no_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            layers = model.envoy.get(family.layers)
            layers[0].input = added(layers[0].input, additions, 0)
            for number in range(model.dimensions.n_layers):
                layer = layers[number]
                _hold_attention(model, layer)
                read = _held_mlp(model, layer, readers.get(number), additions, number + 1)
                reads.append(None if read is None else nnsight.save(read))
            norm = model.envoy.get(family.final_norm)
            final = nnsight.save(_held_norm(norm._module, norm.input, norm.output))
    return Held(tuple(reads), final)


def _hold_attention(model: TracedModel, layer: Any) -> None:
    family = family_of(model)
    norm = layer.get(family.attn_norm)
    norm.output = _held_norm(norm._module, norm.input, norm.output)
    query, key = family.points["q"], family.points["k"]
    for name in dict.fromkeys((query.module, key.module)):
        module = layer.get(name)
        out = module.output.clone()
        fixed = 2 * out.shape[-1] // 3 if query.third is not None else out.shape[-1]  # of a fused one, q and k
        out[..., :fixed] = out[:1, ..., :fixed]
        module.output = out
    if family.attn_post_norm is not None:
        post = layer.get(family.attn_post_norm)
        post.output = _held_norm(post._module, post.input, post.output)


def _held_mlp(
    model: TracedModel, layer: Any, reader: Reader | None, additions: Sequence[Addition], depth: int
) -> Tensor | None:
    family = family_of(model)
    norm = layer.get(family.mlp_norm)
    mid, normed = norm.input, _held_norm(norm._module, norm.input, norm.output)
    read = None if reader is None else {"resid_mid": mid, "mlp_in": normed}.get(reader.point)
    if reader is not None and read is None:
        read = _centred(norm._module, mid) / _deviation(norm._module, mid)[:1]
    module = layer.get(family.points["mlp_out"].module)
    out = module.output[:1].expand_as(module.output)
    if reader is not None and reader.passes is not None and read is not None:
        out = out + (reader.passes(read, read[:1]) - reader.passes(read[:1], read[:1])).to(out)
    module.output = added(out, additions, depth)
    return read


def _held_norm(module: Any, x: Tensor, normed: Tensor) -> Tensor:
    """What a norm gives with the scale of the first row: what it gave, times how much larger its own scale made it."""
    deviation = _deviation(module, x)
    bias = getattr(module, "bias", None)
    bias = 0 if bias is None else bias
    return ((normed - bias) * (deviation / deviation[:1]) + bias).to(normed.dtype)


def _deviation(module: Any, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return (_centred(module, x).square().mean(-1, keepdim=True) + eps).sqrt()


def _centred(module: Any, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
