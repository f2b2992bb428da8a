"""One traced forward of which everything is kept that is linear once attention, norms and MLPs are held fixed.

1. The stream that enters the first layer is a leaf: the embeddings (token and position).
2. Attention: q and k are detached after their norms, so that the pattern is constant; the values, the output projection
   and its biases are the model's own modules.
3. Norms of the stream (before attention, before the MLP, before the head, and after a sublayer where a family has
   some) keep their scale; taking the mean off stays linear. Their outputs keep the values that the model computed, only
   their gradient is that of the frozen norm.
4. What each MLP adds to the stream is a leaf. What of it is linear in what the MLP reads (the skip of a transcoder)
   can be given as a function, and flows on; its value stays the model's.
5. Kept are what each MLP reads, the leaves, and the final normed stream, for `torch.autograd.grad` outside the trace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import GradientsRefused
from attribution.model.block import Block, family_of, read_norm
from attribution.model.families import Place
from attribution.model.traced import TracedModel
from attribution.norms import FrozenNorm

READ_AT = ("resid_mid", "mlp_in", "mlp_normalised")
"""Where something that stands for an MLP can read: the stream, the normed stream, the same before weight and bias."""

Passes = Callable[[Tensor, Tensor], Tensor]
"""What of an MLP's output is linear in what is read, [*rows, pos, d_read] to [*rows, pos, d_model]; constants may be in
it. The second argument is what was read where scales are held fixed at."""


@dataclass(frozen=True)
class Reader:
    """What stands for the MLP of a layer: where it reads (one of `READ_AT`), and what of it is linear, if anything."""

    point: str
    passes: Passes | None = None


@dataclass(frozen=True)
class Linearised:
    """One sequence, with the graph of what is linear. All tensors are in the model's dtype; values are the model's.

    Attributes:
        leaves: the stream that enters the first layer, then what the MLP of each layer adds.
        reads: what each layer's reader reads; None where a layer has none.
        final: the normed stream that the output head reads.
        logits: of the last position, softcapped where the model does that.
    """

    leaves: tuple[Float[Tensor, "1 pos d_model"], ...]
    reads: tuple[Float[Tensor, "pos d_model"] | None, ...]
    final: Float[Tensor, "pos d_model"]
    logits: Float[Tensor, "vocab"]

    def values(self, depth: int) -> Float[Tensor, "pos d_model"]:
        """The values of a leaf: 0 is the embedding, ℓ + 1 what the MLP of layer ℓ adds."""
        return self.leaves[depth][0].detach()

    def backward(
        self, depth: int, read: Float[Tensor, "pos width"], grads: Float[Tensor, "target pos width"]
    ) -> list[Float[Tensor, "target pos d_model"]]:
        """The gradient of ⟨read, each of grads⟩ with respect to the first `depth` + 1 leaves.

        Args:
            depth: of what is read: ℓ for something that the reader of layer ℓ reads, the number of layers for the head.
            read: one of `reads`, `final`, or what was computed of them.
        """
        leaves = self.leaves[: depth + 1]
        found = torch.autograd.grad(read, leaves, grads, is_grads_batched=True, retain_graph=True)
        return [one[:, 0] for one in found]


def check_differentiable(model: TracedModel) -> None:
    """See that a gradient can pass through the modules of this model.

    Raises:
        GradientsRefused: it is quantised.
    """
    if model.quantization is not None:
        raise GradientsRefused(
            f"{model.id!r} is quantised ({model.quantization}), and a circuit's gradients would pass its kernels; load "
            "it without quantization",
            param="model",
        )


def linearise(model: TracedModel, token_ids: list[int], readers: Mapping[int, Reader]) -> Linearised:
    """Run the model once over one sequence; `readers` by layer.

    Raises:
        GradientsRefused: the model is quantised.
        UnsupportedModel: its points are not proved.
    """
    check_differentiable(model)
    family = family_of(model)
    ids = torch.tensor([token_ids], device=model.device)
    leaves: list[Tensor] = []
    reads: list[Tensor | None] = []
    with torch.enable_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=1) as tracer:
            layers = model.envoy.get(family.layers)
            embedding = nnsight.save(layers[0].input.detach().requires_grad_())
            layers[0].input = embedding
            for layer in range(model.dimensions.n_layers):
                _freeze_attention(model, layers[layer], layer)
                read, leaf = _cut_mlp(model, layers[layer], layer, readers.get(layer))
                reads.append(None if read is None else nnsight.save(read))
                leaves.append(nnsight.save(leaf))
            final_norm = model.envoy.get(family.final_norm)
            _freeze(final_norm, read_norm(model, final_norm._module).at(final_norm.input.detach()))
            final = nnsight.save(final_norm.output)
            result = nnsight.save(tracer.result)
    return Linearised(
        leaves=(embedding, *leaves),
        reads=tuple(None if one is None else one[0] for one in reads),
        final=final[0],
        logits=result.logits[0, -1].detach(),
    )


def _freeze_attention(model: TracedModel, layer: Any, index: int) -> None:
    """Inside a trace: q and k are constants, and the norms before and after attention keep their scale."""
    family, block = family_of(model), Block(model, index)
    norm = layer.get(family.attn_norm)
    _freeze(norm, block.attn_norm.at(norm.input.detach()))
    _detach_query_and_key(layer, family.points["q"], family.points["k"])
    if family.attn_post_norm is not None:
        post = layer.get(family.attn_post_norm)
        _freeze(post, read_norm(model, post._module).at(post.input.detach()))


def _detach_query_and_key(layer: Any, query: Place, key: Place) -> None:
    for place in dict.fromkeys((query.module, key.module)):
        module = layer.get(place)
        if query.third is None:
            module.output = module.output.detach()
        else:  # one module for q, k and v
            q, k, v = module.output.chunk(3, dim=-1)
            module.output = torch.cat([q.detach(), k.detach(), v], dim=-1)


def _cut_mlp(model: TracedModel, layer: Any, index: int, reader: Reader | None) -> tuple[Tensor | None, Tensor]:
    """Inside a trace: what the reader of a layer reads, and the leaf that what the MLP adds has become."""
    family = family_of(model)
    norm = layer.get(family.mlp_norm)
    read = None
    if reader is not None:
        frozen = Block(model, index).mlp_norm.at(norm.input.detach())
        read = _read(reader.point, frozen, norm.input, norm.output.detach())
    norm.output = norm.output.detach()
    out = layer.get(family.points["mlp_out"].module)
    leaf = out.output.detach().requires_grad_()
    out.output = (
        leaf
        if read is None or reader is None or reader.passes is None
        else _with(leaf, reader.passes(read, read.detach()))
    )
    return read, leaf


def _read(point: str, frozen: FrozenNorm, mid: Tensor, normed: Tensor) -> Tensor:
    if point == "resid_mid":
        return mid
    if point == "mlp_in":
        return _with(normed, frozen(mid.to(frozen.norm_scale)))
    return frozen.scaled(mid.to(frozen.norm_scale)).to(mid.dtype)


def _freeze(module: Any, frozen: FrozenNorm) -> None:
    """Inside a trace: the module's output keeps its value and gets the gradient of the frozen norm."""
    linear = frozen(module.input.to(frozen.norm_scale))
    module.output = _with(module.output.detach(), linear)


def _with(value: Tensor, linear: Tensor) -> Tensor:
    """`value`, with the gradient of `linear`."""
    return value + (linear - linear.detach()).to(value.dtype)


def logit_directions(
    model: TracedModel, token_ids: list[int]
) -> tuple[Float[Tensor, "logit d_model"], Float[Tensor, "logit"]]:
    """U_t − mean U of some tokens, and their biases less the mean bias, in the dtype of the attribution."""
    unembedding: Any = model.module.get_output_embeddings()
    weight, dtype = unembedding.weight.detach(), model.work_dtype
    directions = weight[token_ids].to(dtype) - weight.mean(0, dtype=dtype)
    if unembedding.bias is None:
        return directions, directions.new_zeros(len(token_ids))
    bias = unembedding.bias.detach().to(dtype)
    return directions, bias[token_ids] - bias.mean()
