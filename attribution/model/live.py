"""The model as it is, with something added to its stream: forward, and the gradient of what comes out.

Depth 0 is the stream that enters the first layer, ℓ + 1 what the MLP of layer ℓ adds. Nothing is held fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.activations import BATCH_TOKENS
from attribution.model.block import family_of, read_norm
from attribution.model.linearised import check_differentiable
from attribution.model.traced import TracedModel


@dataclass(frozen=True)
class Addition:
    """Something that is added in one row of a batch.

    Attributes:
        row: from 1; row 0 stays as it is.
        depth: 0 for the embedding, ℓ + 1 for what the MLP of layer ℓ adds.
        position: None is all of them.
        value: [d_model], or [pos, d_model] at all positions.
    """

    row: int
    depth: int
    position: int | None
    value: Tensor


def added(value: Float[Tensor, "row pos d_model"], additions: Sequence[Addition], depth: int) -> Tensor:
    """`value` with what is added at one depth."""
    value = value.clone()
    for one in additions:
        if one.depth == depth:
            value[one.row, slice(None) if one.position is None else one.position] += one.value.to(value)
    return value


@dataclass(frozen=True)
class Final:
    """The end of the stream at the last position, per row.

    Attributes:
        normed: what the output head reads.
        at_fixed_scale: the same, had the final norm kept the scale of row 0.
    """

    normed: Float[Tensor, "row d_model"]
    at_fixed_scale: Float[Tensor, "row d_model"]


def run_live(model: TracedModel, token_ids: list[int], additions: Sequence[Addition]) -> Final:
    """Run the model with a row for each set of additions, of which none is empty, and one without any."""
    last, size = max((one.row for one in additions), default=0), rows_at_once(len(token_ids))
    parts = []
    for first in range(0, max(1, last), size):
        part = [replace(one, row=one.row - first) for one in additions if first < one.row <= first + size]
        parts.append(_run_live(model, token_ids, part))
    normed, fixed = [one.normed for one in parts], [one.at_fixed_scale for one in parts]
    return Final(*(torch.cat([rows[0][:1], *(one[1:] for one in rows)]) for rows in (normed, fixed)))


def rows_at_once(length: int) -> int:
    """How many rows of a sequence are run in one batch beside the sequence as it is."""
    return max(1, BATCH_TOKENS // length - 1)


def _run_live(model: TracedModel, token_ids: list[int], additions: Sequence[Addition]) -> Final:
    family = family_of(model)
    rows = 1 + max((one.row for one in additions), default=0)
    ids = torch.tensor([token_ids] * rows, device=model.device)
    wanted = sorted({one.depth for one in additions})
    with torch.no_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            layers = model.envoy.get(family.layers)
            if 0 in wanted:
                layers[0].input = added(layers[0].input, additions, 0)
            for depth in [one for one in wanted if one]:
                module = layers[depth - 1].get(family.points["mlp_out"].module)
                module.output = added(module.output, additions, depth)
            norm = model.envoy.get(family.final_norm)
            stream, final = nnsight.save(norm.input), nnsight.save(norm.output)
    frozen = read_norm(model, model.module.get_submodule(family.final_norm)).at(stream[:1, -1])
    return Final(final[:, -1], frozen(stream[:, -1].to(frozen.norm_scale)))


def live_gradients(
    model: TracedModel, token_ids: list[int], depth: int, directions: Float[Tensor, "target d_model"]
) -> tuple[Float[Tensor, "target pos d_model"], Float[Tensor, "d_model"]]:
    """The gradient of ⟨final normed stream of the last position, each direction⟩, by what is added at a depth.

    Returns:
        The gradients, and the final normed stream of the last position.

    Raises:
        GradientsRefused: the model is quantised.
    """
    check_differentiable(model)
    family = family_of(model)
    ids = torch.tensor([token_ids], device=model.device)
    with torch.enable_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            layers = model.envoy.get(family.layers)
            if depth == 0:
                leaf = nnsight.save(layers[0].input.detach().requires_grad_())
                layers[0].input = leaf
            else:
                module = layers[depth - 1].get(family.points["mlp_out"].module)
                leaf = nnsight.save(module.output.detach().requires_grad_())
                module.output = leaf
            final = nnsight.save(model.envoy.get(family.final_norm).output)
        last = final[0, -1]
        wanted = directions.to(last)
        found = [torch.autograd.grad(last, leaf, one, retain_graph=True)[0][0] for one in wanted]
    return torch.stack(found), last.detach()
