"""The plain model with hooks that put other values at its points: the oracle of ablation and patching.

Nothing here knows nnsight or Sightline. The stream between attention and MLP is written in place, where the layer's sum
and its norm see the same memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.attribution.plain_layers import layers_of, record


@dataclass(frozen=True)
class Put:
    """`value`, [1, position, …], at a point, for one head or all, at some positions or (None) all."""

    point: str
    layer: int
    value: Tensor
    head: int | None = None
    positions: Sequence[int] | None = None


def points_of(model: Any, ids: list[int]) -> dict[str, list[Tensor]]:
    """What the plain model has at each point, per layer, [1, position, …]; z is [1, position, head, d_head]."""
    seen, layers, n = record(model, ids), layers_of(model), model.config.num_attention_heads
    with torch.no_grad():
        added = [
            out if layer.norm_attention is None else layer.norm_attention(out)
            for layer, out in zip(layers, seen["attention"], strict=True)
        ]
    return {
        "resid_pre": seen["pre"][:-1],
        "z": [z.unflatten(-1, (n, -1)) for z in seen["z"]],
        "attn_out": added,
        "resid_mid": seen["mid"],
        "mlp_out": seen["mlp"],
        "resid_post": _last_outputs(model, ids),
    }


def _last_outputs(model: Any, ids: list[int]) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: found.append(output)) for module in decoders_of(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def decoders_of(model: Any) -> Any:
    """The decoder layers themselves."""
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def logits_with(model: Any, ids: list[int], puts: Sequence[Put]) -> Tensor:
    """The logits, [position, token], with values put in place one after the other."""
    with ExitStack() as hooks, torch.no_grad():
        for put in puts:
            hooks.callback(_hooked(model, put).remove)
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def _hooked(model: Any, put: Put) -> Any:
    layer, whole = layers_of(model)[put.layer], decoders_of(model)[put.layer]
    n = model.config.num_attention_heads
    at = slice(None) if put.positions is None else list(put.positions)

    def written(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        cut = changed.unflatten(-1, (n, -1)) if put.point == "z" else changed
        value = put.value.to(cut).expand(-1, cut.shape[1], *put.value.shape[2:])
        if put.head is None:
            cut[:, at] = value[:, at]
        else:
            cut[:, at, put.head] = value[:, at, put.head]
        return changed

    def at_input(module: Any, args: Any) -> Any:
        return (written(args[0]), *args[1:])

    def in_place(module: Any, args: Any) -> None:
        args[0].copy_(written(args[0]))

    def at_output(module: Any, args: Any, output: Any) -> Any:
        return written(output)

    return {
        "resid_pre": lambda: whole.register_forward_pre_hook(at_input),
        "z": lambda: layer.out_proj.register_forward_pre_hook(at_input),
        "attn_out": lambda: (layer.norm_attention or layer.out_proj).register_forward_hook(at_output),
        "resid_mid": lambda: layer.norm_mid.register_forward_pre_hook(in_place),
        "mlp_out": lambda: (layer.norm_mlp or layer.mlp).register_forward_hook(at_output),
        "resid_post": lambda: whole.register_forward_hook(at_output),
    }[put.point]()


def label_scores(
    logits: Tensor, pos_ids: Sequence[int], labels: Sequence[int], candidates: Sequence[int] | None
) -> float:
    """Σ of the labels' log-probabilities among the candidates, in nats, by logarithms of sums of exponentials."""
    total = 0.0
    for position, label in zip(pos_ids, labels, strict=True):
        row = logits[position].double()
        among = row if candidates is None else row[list(candidates)]
        total += float(row[label] - among.logsumexp(0))
    return total


def logit_gap(logits: Tensor, pos_ids: Sequence[int], labels: Sequence[int], against: Sequence[int]) -> float:
    """Σ of the labels' logits less those of the tokens that they are compared with."""
    rows = logits.double()
    return sum(float(rows[p, a] - rows[p, b]) for p, a, b in zip(pos_ids, labels, against, strict=True))
