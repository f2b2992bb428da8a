"""Attribution to what was written to the residual stream, and to the attention pattern.

A component (a head, or the MLP, of a layer) writes to the stream; a downstream gradient G says how much each direction
of the stream matters. The attribution of the component is their product, summed over positions:

1. G goes back through the output projection: ⟨W_O^h z, G⟩ = ⟨z, W_O^h G⟩, for all heads and gradients at once (through
   the frozen scale of a post-norm where the family has one),
2. components that are not strictly upstream of a gradient's node are 0: attention of layer ℓ is at depth ℓ.0, its MLP
   at ℓ.5, and it counts when that is below the node's depth.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.model.block import Block, family_of
from attribution.model.traced import TracedModel
from attribution.store import StoredSample


@dataclass(frozen=True)
class Downstream:
    """Gradients of nodes downstream with respect to the stream at some positions.

    Attributes:
        grads: in the dtype of the attribution.
        depths: the depth of each node: ℓ for attention of layer ℓ, ℓ + ½ for its MLP, L for `lm_head`.
    """

    positions: list[int]
    grads: Float[Tensor, "node pos d_model"]
    depths: list[float]
    layers: range

    @classmethod
    def of(
        cls,
        model: TracedModel,
        sample: StoredSample,
        pos_ids: list[int],
        grads: list[Tensor],
        depths: list[float],
        from_layer: int,
        to_layer: int | None,
    ) -> "Downstream":
        """Check the arguments of an attribution against a model and a sample.

        Raises:
            InvalidArgument, OutOfRange, ShapeMismatch: naming the argument.
        """
        family_of(model)
        count = model.dimensions.n_layers
        last = count - 1 if to_layer is None else to_layer
        checks.in_range("from_layer", from_layer, count, f"the layers of {model.id}")
        checks.in_range("to_layer", last, count, f"the layers of {model.id}")
        if last < from_layer:
            raise checks.out_of_range("to_layer", last, f"it is at least from_layer ({from_layer})")
        positions = checks.positions("pos_ids", pos_ids, sample.seq_len)
        if len(depths) != len(grads):
            raise checks.mismatch("downstream_layers", f"{len(depths)} entries", f"{len(grads)}, one per gradient")
        for depth in depths:
            if not 0 <= depth <= count or depth * 2 != int(depth * 2):
                raise checks.out_of_range(
                    "downstream_layers", depth, f"a depth is a layer 0 to {count}, or a layer and a half for its MLP"
                )
        stacked = stack_grads(model, grads, len(positions))
        return cls(positions, stacked, [float(depth) for depth in depths], range(from_layer, last + 1))

    def mask(self, depth: float) -> Float[Tensor, "node"]:
        """1 for the nodes that a component at `depth` is upstream of, else 0."""
        return torch.tensor([float(depth < node) for node in self.depths], dtype=self.grads.dtype)

    def masks(self, half: float) -> Float[Tensor, "layer node"]:
        """`mask` at depth ℓ + `half` for each of the layers."""
        return torch.stack([self.mask(layer + half) for layer in self.layers])


def stack_grads(model: TracedModel, grads: list[Tensor], count: int) -> Float[Tensor, "node pos d_model"]:
    """Downstream gradients `[1, pos, hidden]` or `[pos, hidden]`, stacked, in the dtype of the attribution.

    Raises:
        InvalidArgument: there is none.
        ShapeMismatch: one of them does not fit the positions.
    """
    if not grads:
        raise InvalidArgument("downstream_grads is empty; it holds at least one gradient", param="downstream_grads")
    width = model.dimensions.d_model
    rows = [grad[0] if grad.dim() == 3 and len(grad) == 1 else grad for grad in grads]
    for row in rows:
        checks.shape("downstream_grads", row, (count, width), "len(pos_ids), hidden size")
    return torch.stack([row.to("cpu", model.work_dtype) for row in rows])


def residual_attribution(
    model: TracedModel, sample: StoredSample, downstream: Downstream
) -> Float[Tensor, "layer column node pos"]:
    """⟨what each head and each MLP writes, G⟩ per position; the MLP is the last column. Zero outside of the layers."""
    dims, layers = model.dimensions, downstream.layers
    grads, dtype = downstream.grads, model.work_dtype
    shape = (dims.n_layers, dims.n_heads + 1, len(grads), len(downstream.positions))
    scores = torch.zeros(shape, dtype=dtype)
    all_z = sample.read("z", layers, downstream.positions)
    mlp_out = sample.read("mlp_out", layers, downstream.positions).to(dtype)
    mlps = torch.einsum("lpe,gpe->lgp", mlp_out, grads)
    blocks = [Block(model, layer) for layer in layers]
    heads = [_head_scores(block, z, grads.to(block.device)).cpu() for block, z in zip(blocks, all_z, strict=True)]
    scores[layers.start : layers.stop, :-1] = torch.stack(heads) * downstream.masks(0.0)[:, None, :, None]
    scores[layers.start : layers.stop, -1] = mlps * downstream.masks(0.5)[..., None]
    return scores


def _head_scores(block: Block, z: Tensor, grads: Tensor) -> Float[Tensor, "heads node pos"]:
    scale = block.attn_write_scale(z)
    if scale is not None:
        grads = grads * scale
    weight = block.weight("o").to(block.dtype)
    at_z = (grads @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2])
    return torch.einsum("phd,gphd->hgp", z.to(block.device, block.dtype), at_z)


@dataclass(frozen=True)
class ResidualTerms:
    """What closes the sum: embedding + Σ attribution + Σ attn_bias = total.

    Attributes:
        embedding: ⟨the stream entering `from_layer`, G⟩; for `from_layer` 0 that is the embedding.
        attn_bias: ⟨the bias of each output projection, G⟩ (the MLP's bias is in the MLP's column).
        total: ⟨the stream that the node reads, G⟩; it closes when `to_layer` leaves nothing out below the node.
    """

    embedding: Float[Tensor, "node"]
    attn_bias: Float[Tensor, "layer node"]
    total: Float[Tensor, "node"]


def residual_terms(model: TracedModel, sample: StoredSample, downstream: Downstream) -> ResidualTerms:
    """The terms of the residual stream that no head and no MLP writes."""
    grads, positions, dtype = downstream.grads, downstream.positions, model.work_dtype
    entering = sample.read("resid", downstream.layers.start, positions).to(dtype)
    bias = torch.zeros(model.dimensions.n_layers, len(grads), dtype=dtype)
    for layer in downstream.layers:
        block = Block(model, layer)
        if block.o_bias is not None:
            scale = block.attn_write_scale(sample.read("z", layer, positions))
            written = block.o_bias.to(dtype) if scale is None else block.o_bias.to(dtype) * scale
            bias[layer] = (grads * written.cpu()).sum((-1, -2)) * downstream.mask(float(layer))
    read = [_stream_at(model, sample, depth, positions).to(dtype) for depth in downstream.depths]
    total = torch.stack([(stream * grad).sum() for stream, grad in zip(read, grads, strict=True)])
    return ResidualTerms(torch.einsum("pe,gpe->g", entering, grads), bias, total)


def _stream_at(model: TracedModel, sample: StoredSample, depth: float, positions: list[int]) -> Tensor:
    """The stream at a depth: what attention of that layer reads, or for a half its MLP."""
    layer = int(depth)
    resid = sample.read("resid", layer, positions)
    if layer == depth:
        return resid
    return resid + Block(model, layer).attn_out(sample.read("z", layer, positions)).cpu()


def attention_attribution(
    model: TracedModel,
    sample: StoredSample,
    layer: int,
    head: int,
    positions: list[int],
    grads: Float[Tensor, "node pos d_model"],
    *,
    signed: bool,
) -> tuple[Float[Tensor, "query key"], Float[Tensor, "query key"]]:
    """The pattern of a head, and the pattern times what each of its edges matters: A · Σ_g |⟨G_i, W_O^h v_j⟩|."""
    block = Block(model, layer)
    resid = sample.read("resid", layer, list(range(max(positions) + 1)))
    pattern = block.pattern(resid, positions, [head])[0].to(block.dtype)
    (value,) = block.project(resid, "v")
    value = value[:, head // (block.dims.n_heads // block.dims.n_kv_heads)].to(block.dtype)
    scale = block.attn_write_scale(sample.read("z", layer, positions))
    grads = grads.to(block.device) if scale is None else grads.to(block.device) * scale
    matters = grads @ block.weight("o")[head].to(block.dtype).T @ value.T
    scores = pattern * (matters if signed else matters.abs()).sum(0)
    unseen = sample.seq_len - len(resid)
    return tuple(torch.nn.functional.pad(one, (0, unseen)).cpu() for one in (pattern, scores))  # type: ignore[return-value]
