"""One forward pass in which parts of the model write, or points of its stream hold, something else.

1. The sequence is repeated, one row per list of replacements; a row without any is the baseline, on the same path.
2. In one trace, layer by layer and in the order of the points inside a layer, the tensor at each point that anybody
   replaces is copied, and the positions and heads of the rows that ask for it are written.
3. The stream between attention and MLP goes two ways, into the MLP's norm and on to the sum behind it: where it is
   replaced, what leaves the layer is that stream and what the MLP adds to it.
"""

from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.block import family_of
from attribution.model.families import Place
from attribution.model.traced import TracedModel

POINTS = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Where something else can be put, in the order in which a layer computes them."""


@dataclass(frozen=True)
class Replacement:
    """What a point of a layer holds instead.

    Attributes:
        point: one of `POINTS`.
        value: [pos, width], of "z" [pos, head, d_head], with `head` [pos, d_head]; one position stands for all.
        head: of "z"; None is all of them.
        positions: where, one per position of `value`; None is everywhere.
    """

    point: str
    layer: int
    value: Tensor
    head: int | None = None
    positions: tuple[int, ...] | None = None


def replaced_logits(
    model: TracedModel, token_ids: list[int], rows: list[list[Replacement]], positions: list[int]
) -> Float[Tensor, "row pos vocab"]:
    """The logits at some positions of one sequence, once for each list of replacements."""
    ids = torch.tensor([token_ids] * len(rows), device=model.device)
    by_layer: dict[int, dict[str, list[tuple[int, Replacement]]]] = {}
    for row, replacements in enumerate(rows):
        for one in replacements:
            by_layer.setdefault(one.layer, {}).setdefault(one.point, []).append((row, one))
    keep = torch.tensor(positions, device=model.device)
    with torch.no_grad():
        with model.envoy.trace(input_ids=ids, use_cache=False, logits_to_keep=keep) as tracer:
            for layer in sorted(by_layer):
                _replace(model, layer, by_layer[layer])
            result = nnsight.save(tracer.result)
    return result.logits


def _replace(model: TracedModel, layer: int, wanted: dict[str, list[tuple[int, Replacement]]]) -> None:
    """Inside a trace: replace in one layer."""
    family = family_of(model)
    envoy: Any = model.envoy.get(family.layers)[layer]
    carried = sorted({row for row, _ in wanted.get("resid_mid", [])})
    kept: dict[str, Tensor] = {}
    for point in POINTS:
        chosen, place = wanted.get(point, []), family.points[point]
        if not chosen and not (carried and point in ("mlp_out", "resid_post")):
            continue
        module = envoy.get(place.module) if place.module else envoy
        tensor = (module.output if place.side == "output" else module.input).clone()
        if carried and point == "resid_post":
            tensor[carried] = kept["resid_mid"][carried] + kept["mlp_out"][carried]
        for row, one in chosen:
            _put(tensor[row], one, place, model.dimensions.n_heads)
        if place.side == "output":
            module.output = tensor
        else:
            module.input = tensor
        kept[point] = tensor


def _put(row: Float[Tensor, "pos width"], one: Replacement, place: Place, n_heads: int) -> None:
    """Write a replacement into one row of a point, in place."""
    target = row if place.heads is None else row.unflatten(-1, (n_heads, -1))
    if one.head is not None:
        target = target[:, one.head]
    value = one.value.to(target)
    if one.positions is None:
        target.copy_(value.expand_as(target))
    else:
        target[list(one.positions)] = value
