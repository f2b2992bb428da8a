"""What is proved when a model is loaded.

`probe` runs one forward over a few tokens and records what every module takes and returns: selectors are checked
against that table. `prove` shows that the points of the family are what they claim to be:

1. every point is there, one row per token, with the width that the config says,
2. the identities hold in every layer: mid = pre + attn_out, post = mid + mlp_out, pattern · v = z,
3. a layer taken apart (`attribution.model.block`) is the layer: its norms frozen at their input are its norms, and its
   heads and bias together are what its attention adds,
4. overwriting a point changes the logits, so it lies on the path of the computation.
"""

from dataclasses import replace

import nnsight
import torch
from torch import Tensor

from attribution.model.block import Block
from attribution.model.capture import Batch, Stream, forward
from attribution.model.families import Place
from attribution.model.guard import kernel_tolerance
from attribution.model.resolve import stream_of
from attribution.model.traced import PROBE_ROWS, PROBE_TOKENS, Seen, Site, TracedModel, first_tensor

_KEEP = 3
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def probe_batch(model: TracedModel, rows: int) -> Batch:
    """A few rows of distinct tokens."""
    ids = (torch.arange(rows * PROBE_TOKENS) * 7 + 11).remainder(model.dimensions.d_vocab)
    ids = ids.view(rows, PROBE_TOKENS)
    positions = torch.arange(PROBE_TOKENS).expand(rows, -1)
    device = model.device
    return Batch(ids.to(device), torch.ones_like(ids).to(device), positions.to(device), None, _KEEP)


def probe(model: TracedModel) -> dict[Site, Seen]:
    """Run one forward and record the tensors at the input and output of every module."""
    batch = probe_batch(model, PROBE_ROWS)
    with torch.no_grad():
        with model.envoy.trace(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, logits_to_keep=_KEEP
        ) as tracer:
            kept = tracer.cache(include_inputs=True, device=None)
    sites: dict[Site, Seen] = {}
    for name in model.module_names:
        full = f"{model.envoy.path}.{name}"
        if full not in kept:
            continue
        entry = kept[full]
        for side, value in (("output", entry.output), ("input", entry.input)):
            tensor = first_tensor(value)
            if tensor is not None:
                sites[Site(name, side)] = replace(_seen(tensor), visits=len(entry))
    return sites


def _seen(tensor: Tensor) -> Seen:
    shape = tuple(tensor.shape)
    for tokens, tail in ((PROBE_TOKENS, False), (_KEEP, True)):
        if shape[:2] == (PROBE_ROWS, tokens):
            return Seen(shape[2:], tensor.dtype, True, tail)
    return Seen(shape, tensor.dtype, False, False)


def prove(model: TracedModel) -> str | None:
    """Prove the points of a family. Returns None, or the sentence that says what failed."""
    family = model.family
    assert family is not None
    dims = model.dimensions
    layers = list(range(dims.n_layers))
    streams = {name: stream_of(model, name, layers) for name in family.points}
    for name, stream in streams.items():
        for site in stream.sites:
            if site not in model.sites or not model.sites[site].tokenwise:
                return f"the point {name} is not at {site.path}.{site.side}"
    values = _values(model, streams)
    return (
        _wrong_shape(model, values)
        or _broken_identity(model, values)
        or _wrong_parts(model, values)
        or _dead_point(model)
    )


def _values(model: TracedModel, streams: dict[str, Stream]) -> dict[str, Tensor]:
    _, captured = forward(model, probe_batch(model, 1), streams.values())
    return {name: captured[stream][:, 0] for name, stream in streams.items()}


def _wrong_shape(model: TracedModel, values: dict[str, Tensor]) -> str | None:
    dims = model.dimensions
    heads, kv = (dims.n_heads, dims.d_head), (dims.n_kv_heads, dims.d_head)
    widths = {"q": heads, "z": heads, "k": kv, "v": kv}
    for name, value in values.items():
        expected = (dims.n_layers, PROBE_TOKENS, *widths.get(name, (dims.d_model,)))
        if tuple(value.shape) != expected:
            return f"the point {name} has the shape {list(value.shape)}, expected {list(expected)}"
    return None


def _broken_identity(model: TracedModel, values: dict[str, Tensor]) -> str | None:
    group = model.dimensions.n_heads // model.dimensions.n_kv_heads
    rows = list(range(PROBE_TOKENS))
    mixed = torch.stack(
        [
            torch.einsum("hqk,khd->qhd", Block(model, layer).pattern_of(q, k, rows), v.repeat_interleave(group, dim=1))
            for layer, (q, k, v) in enumerate(zip(values["q"], values["k"], values["v"], strict=True))
        ]
    )
    claims = {
        "resid_mid = resid_pre + attn_out": (values["resid_mid"], values["resid_pre"] + values["attn_out"]),
        "resid_post = resid_mid + mlp_out": (values["resid_post"], values["resid_mid"] + values["mlp_out"]),
        "z = pattern · v": (values["z"], mixed),
    }
    return _first_broken(model, claims)


def _wrong_parts(model: TracedModel, values: dict[str, Tensor]) -> str | None:
    layer = model.dimensions.n_layers // 2
    block = Block(model, layer)
    pre, mid, z = (values[name][layer].to(block.device) for name in ("resid_pre", "resid_mid", "z"))
    parts = {
        "attention": (block.attn_norm, block.family.attn_norm, pre),
        "MLP": (block.mlp_norm, block.family.mlp_norm, mid),
    }
    claims = {
        f"the norm before the {name}, frozen": (block.own.get_submodule(path)(x), norm.at(x)(x.to(block.dtype)))
        for name, (norm, path, x) in parts.items()
    }
    broken = _first_broken(model, claims)
    if broken or model.gradients_refused is not None:  # without dense weights nothing is said of single heads
        return broken
    written = block.head_writes(z, list(range(model.dimensions.n_heads))).sum(1)
    if block.o_bias is not None:
        scale = block.attn_write_scale(z)
        written = written + (block.o_bias if scale is None else block.o_bias * scale)
    slack = 0.0 if model.quantization is None else kernel_tolerance(model.quantization)
    return _first_broken(model, {"attn_out = Σ heads + bias": (values["attn_out"][layer], written.cpu())}, slack)


def _first_broken(model: TracedModel, claims: dict[str, tuple[Tensor, Tensor]], slack: float = 0.0) -> str | None:
    for claim, (left, right) in claims.items():
        error = float((left.double() - right.double()).norm() / left.double().norm().clamp_min(1e-30))
        if not error <= max(_TOLERANCE.get(model.dtype, 1e-1), slack):
            return f"{claim} does not hold (relative error {error:.1e})"
    return None


def _dead_point(model: TracedModel) -> str | None:
    family = model.family
    assert family is not None
    names = list(family.points)
    base = f"{family.layers}.{model.dimensions.n_layers // 2}"
    batch = probe_batch(model, 1)
    rows = len(names) + 1
    inputs = {
        "input_ids": batch.ids.expand(rows, -1),
        "attention_mask": batch.mask.expand(rows, -1),
        "position_ids": batch.positions.expand(rows, -1),
    }
    targets = []
    for name in names:
        place = family.points[name]
        envoy = model.envoy.get(f"{base}.{place.module}" if place.module else base)
        targets.append((envoy, place))
    with torch.no_grad(), model.envoy.trace(**inputs) as tracer:
        for row, (envoy, place) in enumerate(targets, start=1):
            if place.side == "input":
                envoy.input = _disturbed(envoy.input, row, place)
            else:
                envoy.output = _disturbed(envoy.output, row, place)
        result = nnsight.save(tracer.result)
    changes = (result.logits[1:] - result.logits[:1]).abs().amax(dim=(1, 2))
    dead = [name for name, change in zip(names, changes.tolist(), strict=True) if not change > 0]
    return f"overwriting {', '.join(dead)} does not change the logits" if dead else None


def _disturbed(value: Tensor, row: int, place: Place) -> Tensor:
    changed = value.clone()
    part = changed[row] if place.third is None else changed[row].chunk(3, dim=-1)[place.third]
    part += torch.linspace(-1, 1, part.numel(), device=part.device).view(part.shape).to(part.dtype)
    return changed
