"""One forward pass in which heads and MLPs write something else.

1. The sequence is repeated, one row per set of replacements; a row without any is the baseline, on the same path.
2. In one trace, layer by layer, the heads' outputs before the projection and what the MLPs add to the stream are
   replaced in the rows that ask for it.
"""

from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.block import family_of
from attribution.model.traced import TracedModel


@dataclass(frozen=True)
class Replacement:
    """What a head writes instead (`z`, [pos, d_head]) or, with `head` None, an MLP ([pos, d_model]).

    One position stands for all.
    """

    layer: int
    head: int | None
    value: Tensor


def replaced_logits(
    model: TracedModel, token_ids: list[int], rows: list[list[Replacement]], positions: list[int]
) -> Float[Tensor, "row pos vocab"]:
    """The logits at some positions of one sequence, once for each list of replacements."""
    ids = torch.tensor([token_ids] * len(rows), device=model.device)
    by_layer: dict[int, list[tuple[int, Replacement]]] = {}
    for row, replacements in enumerate(rows):
        for one in replacements:
            by_layer.setdefault(one.layer, []).append((row, one))
    keep = torch.tensor(positions, device=model.device)
    with torch.no_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=keep) as tracer:
            for layer in sorted(by_layer):
                _replace(model, layer, by_layer[layer])
            result = nnsight.save(tracer.result)
    return result.logits


def _replace(model: TracedModel, layer: int, wanted: list[tuple[int, Replacement]]) -> None:
    """Inside a trace: replace in one layer, attention before MLP."""
    points = family_of(model).points
    envoy: Any = model.envoy.get(family_of(model).layers)[layer]
    heads = [(row, one) for row, one in wanted if one.head is not None]
    if heads:
        module = envoy.get(points["z"].module)
        z = module.input.clone().unflatten(-1, (model.dimensions.n_heads, -1))
        for row, one in heads:
            z[row, :, one.head] = one.value.to(z)
        module.input = z.flatten(-2)
    mlps = [(row, one) for row, one in wanted if one.head is None]
    if mlps:
        module = envoy.get(points["mlp_out"].module)
        written = module.output.clone()
        for row, one in mlps:
            written[row] = one.value.to(written)
        module.output = written
