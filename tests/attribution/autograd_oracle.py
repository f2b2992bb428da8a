"""Oracles for the attribution: every number once more, by torch.autograd through transformers' own modules.

Nothing here knows nnsight or Sightline. Each interpolation point is a call of its own, and sums are in float64.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.attribution.plain_layers import (
    Path,
    attention_path,
    bias,
    exact,
    layers_of,
    logits_path,
    mlp_path,
    record,
    scale_of,
)

VARIES = {"attn_v": "v", "attn_q": "q", "attn_k": "k", "attn_a": "qk"}
DETACHED = {"mlp_i": "gate_proj", "mlp_g": "up_proj"}
TINY = 1e-300


def log_probability(
    logits: Tensor, pos_ids: Sequence[int], labels: Sequence[int], candidate_ids: Sequence[int] | None
) -> Tensor:
    """Σ of the labels' log-probabilities among the candidates, in nats, from logits [1, position, token]."""
    rows = logits[0, list(pos_ids)].double()
    options = list(range(rows.shape[1])) if candidate_ids is None else list(candidate_ids)
    chosen = [options.index(label) for label in labels]
    return rows[:, options].log_softmax(-1)[range(len(chosen)), chosen].sum()


def points_of(steps: int | None, rule: str) -> list[tuple[float, float]]:
    """The interpolation points α and their weights."""
    steps = 4 if steps is None else steps
    if steps == 0:
        return [(1.0, 1.0)]
    if rule == "uniform":
        return [(i / steps, 1 / (steps + 1)) for i in range(steps + 1)]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [((1 + node) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)]


def _integrated(objective: Path, x: Tensor, points: list[tuple[float, float]]) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.float64)
    for alpha, weight in points:
        leaf = (alpha * x).detach().requires_grad_()
        total += weight * torch.autograd.grad(objective(leaf), leaf)[0].double()
    return total


def reference_gradient(
    model: Any,
    ids: list[int],
    node_type: str,
    layer: int,
    head: int,
    pos_ids: list[int],
    output_grad: Tensor | None = None,
    labels: list[int] | None = None,
    candidate_ids: list[int] | None = None,
    steps: int | None = None,
    rule: str = "gauss_legendre",
    src_pos_ids: list[int] | None = None,
) -> dict[str, Any]:
    """The integrated gradient of one node: `gradient` [1, result position, e], `objective`, `objective_at_zero`
    and `completeness_error` (the MLP's two nodes share it: only their sum is complete)."""
    seen = record(model, ids)
    points = points_of(0 if node_type == "attn_a" else steps, rule)
    if node_type == "lm_head":
        x, path = seen["pre"][-1], logits_path(model, seen)
        whole = path
    elif node_type in VARIES:
        x, path = seen["pre"][layer], attention_path(model, seen, layer, head, VARIES[node_type])
        whole = path
    else:
        x, path = seen["mid"][layer], mlp_path(model, seen, layer, DETACHED[node_type])
        whole = mlp_path(model, seen, layer, None)
    sources = pos_ids if node_type not in ("attn_v", "attn_k", "attn_a") or src_pos_ids is None else src_pos_ids

    def objective(write: Path) -> Path:
        if node_type == "lm_head":
            return lambda x: log_probability(write(x), pos_ids, labels or [], candidate_ids)
        assert output_grad is not None
        grad = output_grad.double()
        return lambda x: (write(x)[:, pos_ids].double() * grad).sum()

    with exact(model):
        with path as write:
            gradient = complete = _integrated(objective(write), x, points)
            at_x, at_zero = (float(objective(write)(point).detach()) for point in (x, torch.zeros_like(x)))
        if whole is not path:
            with whole as write:
                complete = _integrated(objective(write), x, points)
    difference = at_x - at_zero
    return {
        "gradient": gradient[:, sources].to(x.dtype),
        "objective": at_x,
        "objective_at_zero": at_zero,
        "completeness_error": abs(float((complete * x.double()).sum()) - difference) / max(abs(difference), TINY),
    }


def _strictly_upstream(component: float, downstream_layers: Sequence[float]) -> Tensor:
    return torch.tensor([1.0 if component < depth else 0.0 for depth in downstream_layers], dtype=torch.float64)


def _stream_at(seen: dict[str, Any], depth: float) -> Tensor:
    return seen["mid"][int(depth)] if depth % 1 else seen["pre"][int(depth)]


def reference_residual(
    model: Any,
    ids: list[int],
    pos_ids: list[int],
    downstream_grads: Tensor,
    downstream_layers: Sequence[float],
    from_layer: int = 0,
    to_layer: int | None = None,
    per_position: bool = False,
) -> dict[str, Tensor]:
    """What every component writes, times the gradients [G, position, e]: `attr` [L, n + 1, G] (with `per_position`
    [L, n + 1, G, position]), `embedding` [G], `attn_bias` [L, G] and `total` [G]; attr, embedding and biases
    sum to the total where the range of layers reaches the downstream nodes."""
    seen, grads = record(model, ids), downstream_grads.double()
    layers, n = layers_of(model), model.config.num_attention_heads
    last = len(layers) - 1 if to_layer is None else to_layer

    def times_gradients(written: Tensor) -> Tensor:
        return (written[:, pos_ids].double() * grads).sum(-1)

    attr = torch.zeros(len(layers), n + 1, *grads.shape[:2], dtype=torch.float64)
    attn_bias = torch.zeros(len(layers), grads.shape[0], dtype=torch.float64)
    for index in range(from_layer, last + 1):
        gate = _strictly_upstream(index, downstream_layers)[:, None]
        for head in range(n):
            attr[index, head] = times_gradients(head_write(layers[index], seen, index, head, n)) * gate
        attr[index, n] = (
            times_gradients(seen["mlp"][index]) * _strictly_upstream(index + 0.5, downstream_layers)[:, None]
        )
        constant = (bias(layers[index]) * post_scale(layers[index], seen, index)).expand_as(seen["mid"][index])
        attn_bias[index] = (times_gradients(constant) * gate).sum(-1)
    total = [
        (_stream_at(seen, depth)[0, pos_ids].double() * grad).sum()
        for depth, grad in zip(downstream_layers, grads, strict=True)
    ]
    return {
        "attr": attr if per_position else attr.sum(-1),
        "embedding": times_gradients(seen["pre"][from_layer]).sum(-1),
        "attn_bias": attn_bias,
        "total": torch.stack(total),
    }


def post_scale(layer: Any, seen: dict[str, Any], index: int) -> Tensor | float:
    """What Gemma 2's post-norm multiplies the attention's output with at this input; 1 elsewhere."""
    norm = layer.norm_attention
    return 1.0 if norm is None else scale_of(norm, seen["attention"][index]) * (1 + norm.weight.detach())


def head_write(layer: Any, seen: dict[str, Any], index: int, head: int, n: int) -> Tensor:
    """What one head adds to the stream, [1, position, e]: the output projection of its z alone."""
    z = seen["z"][index]
    alone = torch.zeros_like(z)
    width = z.shape[-1] // n
    alone[..., head * width : (head + 1) * width] = z[..., head * width : (head + 1) * width]
    with torch.no_grad():
        return (layer.out_proj(alone) - bias(layer)) * post_scale(layer, seen, index)


def reference_attn_attribution(
    model: Any,
    ids: list[int],
    layer: int,
    head: int,
    downstream_grads: Tensor,
    pos_ids: list[int],
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The pattern of a head and its attribution, each [query, key]: the derivative is taken by the pattern itself."""
    seen, held = record(model, ids), {}
    with exact(model), attention_path(model, seen, layer, head, "pattern", held) as write:
        written = write(seen["pre"][layer])
        pattern = held["pattern"]
        attributed = torch.zeros(len(pos_ids), len(ids), dtype=torch.float64)
        for grad in downstream_grads:
            objective = (written[0, pos_ids].double() * grad.double()).sum()
            slope = torch.autograd.grad(objective, pattern, retain_graph=True)[0][0, head, pos_ids].double()
            attributed += pattern[0, head, pos_ids].detach().double() * (slope if signed else slope.abs())
    return pattern[0, head, pos_ids].detach(), attributed


def reference_ablation(
    model: Any,
    ids: list[int],
    heads: list[tuple[int, int]],
    mlps: list[int],
    mode: str,
    labels: list[int],
    candidate_ids: list[int] | None,
    pos_ids: list[int],
    dataset: list[list[int]],
) -> tuple[float, float]:
    """The labels' summed log-probability as it is, and with heads' z and MLPs' writes replaced, in nats."""
    layers, n = layers_of(model), model.config.num_attention_heads
    runs = [record(model, sample) for sample in dataset] if mode != "zero" else []

    def replacement(name: str, index: int, like: Tensor) -> Tensor:
        if mode == "zero":
            return torch.zeros_like(like)
        if mode == "position_mean":
            return torch.stack([run[name][index] for run in runs]).mean(0)
        return torch.cat([run[name][index] for run in runs], dim=1).mean(1, keepdim=True).expand_as(like)

    def replace_head(index: int, head: int) -> Any:
        def hook(module: Any, args: Any) -> Any:
            z, width = args[0].clone(), args[0].shape[-1] // n
            part = slice(head * width, (head + 1) * width)
            z[..., part] = replacement("z", index, z)[..., part]
            return (z,)

        return layers[index].out_proj.register_forward_pre_hook(hook)

    def replace_mlp(index: int) -> Any:
        module = layers[index].norm_mlp or layers[index].mlp
        return module.register_forward_hook(lambda module, args, output: replacement("mlp", index, output))

    before = log_probability(record(model, ids)["logits"], pos_ids, labels, candidate_ids)
    with ExitStack() as hooks:
        for handle in [replace_head(*pair) for pair in heads] + [replace_mlp(index) for index in mlps]:
            hooks.callback(handle.remove)
        after = log_probability(record(model, ids)["logits"], pos_ids, labels, candidate_ids)
    return float(before), float(after)
