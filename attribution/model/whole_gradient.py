"""The gradient of an objective with respect to what every head and MLP writes, through the whole model at once.

1. One traced forward of one sequence, whose gradients begin at the stream that enters the first layer.
2. The heads' outputs before the projection and what the MLPs add to the stream are kept as they pass.
3. `torch.autograd.grad` outside the trace, which patches nothing of the process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import GradientsRefused
from attribution.model.block import family_of
from attribution.model.traced import TracedModel


@dataclass(frozen=True)
class Passed:
    """What passed in one forward, or its gradient.

    Attributes:
        z: of the heads, before the output projection.
        mlp_out: what the MLPs add to the stream.
    """

    z: Float[Tensor, "layer pos head d_head"]
    mlp_out: Float[Tensor, "layer pos d_model"]


def whole_gradient(
    model: TracedModel, token_ids: list[int], positions: list[int], objective: Callable[[Tensor], Tensor]
) -> tuple[Passed, Passed]:
    """What passed, and the gradient of `objective` of the logits [pos, vocab] at `positions`.

    Raises:
        GradientsRefused: the model is quantised, and its kernels have no gradient.
    """
    family = family_of(model)
    if model.quantization is not None:
        raise GradientsRefused(
            f"{model.id!r} is quantised ({model.quantization}), and a gradient through the whole model would pass its "
            "kernels; compute_node_gradient takes the dense weights of one layer",
            param="model",
        )
    ids, keep = torch.tensor([token_ids], device=model.device), torch.tensor(positions, device=model.device)
    heads: list[Tensor] = []
    mlps: list[Tensor] = []
    with torch.enable_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=keep) as tracer:
            layers = model.envoy.get(family.layers)
            layers[0].input = layers[0].input.detach().requires_grad_()
            for layer in range(model.dimensions.n_layers):
                heads.append(nnsight.save(layers[layer].get(family.points["z"].module).input))
                mlps.append(nnsight.save(layers[layer].get(family.points["mlp_out"].module).output))
            result = nnsight.save(tracer.result)
        grads = torch.autograd.grad(objective(result.logits[0]), [*heads, *mlps])
    return _passed(model, [*heads, *mlps]), _passed(model, list(grads))


def _passed(model: TracedModel, tensors: list[Tensor]) -> Passed:
    rows = [one[0].detach().cpu() for one in tensors]
    layers = len(rows) // 2
    z = torch.stack(rows[:layers]).unflatten(-1, (model.dimensions.n_heads, -1))
    return Passed(z, torch.stack(rows[layers:]))
