"""An autoencoder by loops over Python's floats, and random ones: what the vectorised one is held against."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from attribution.features.autoencoder import Autoencoder, Gate

D_IN, N_FEATURES, D_OUT = 6, 13, 5
ACTIVATIONS = ("relu", "topk", "jumprelu", "gated")
NORMALISATIONS = ("none", "layer_norm", "constant_norm")


def random_autoencoder(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Autoencoder:
    """A random one; as an option d_out for a transcoder, skip, and the fields of `Autoencoder`."""
    draw = torch.Generator().manual_seed(seed)
    d_in, n, d_out = options.pop("d_in", D_IN), options.pop("n", N_FEATURES), options.pop("d_out", None)

    def random(*shape: int, scale: float = 0.6) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    activation = options.setdefault("activation", "relu")
    if activation == "topk":
        options.setdefault("k", 4)
    if activation == "jumprelu":
        options["threshold"] = random(n).abs()
    if activation == "gated":
        options["gate"] = Gate(random(n), random(n), random(n))
    if options.pop("skip", False):
        options["W_skip"] = random(d_in, d_out or d_in)
    return Autoencoder(
        W_enc=random(d_in, n),
        b_enc=None if activation == "gated" else random(n),
        W_dec=random(n, d_out or d_in),
        b_dec=random(d_out or d_in),
        **options,
    )


def every_autoencoder() -> Iterator[tuple[str, Autoencoder]]:
    """One of every combination that there is, with its name."""
    for activation, normalisation, centred in product(ACTIVATIONS, NORMALISATIONS, (False, True)):
        common = {"activation": activation, "normalisation": normalisation, "centred": centred}
        for subtracts, rescaled in product((False, True), (False, True) if activation == "topk" else (False,)):
            named = "-".join(f"{value}" for value in (activation, normalisation, centred, subtracts, rescaled))
            yield named, random_autoencoder(subtracts_b_dec=subtracts, rescaled=rescaled, **common)
        if activation == "gated":
            continue
        for skip in (False, True):
            named = "-".join(f"{value}" for value in (activation, normalisation, centred, "transcoder", skip))
            yield named, random_autoencoder(d_out=D_OUT, skip=skip, restores=False, **common)


def by_loops(one: Autoencoder, row: list[float]) -> tuple[list[float], list[float], list[float]]:
    """What the activation function sees, the activations, and what is written, for one row."""
    width, n, d_out = len(row), len(one.W_dec), len(one.b_dec)
    W_enc, W_dec, b_dec = one.W_enc.tolist(), one.W_dec.tolist(), one.b_dec.tolist()
    if one.centred:
        row = [value - sum(row) / width for value in row]
    read, scale, shift = _normalised(one, row)
    if one.subtracts_b_dec:
        read = [value - bias for value, bias in zip(read, b_dec, strict=True)]
    norms = [math.sqrt(sum(value * value for value in W_dec[j])) for j in range(n)]
    pre, gates = [], []
    for j in range(n):
        dot = sum(read[i] * W_enc[i][j] for i in range(width))
        if one.gate is None:
            pre.append((dot + one.b_enc[j].item()) * (norms[j] if one.rescaled else 1))
        else:
            gates.append(dot + one.gate.b_gate[j].item() > 0)
            scaled = sum(read[i] * W_enc[i][j] * math.exp(one.gate.r_mag[j].item()) for i in range(width))
            pre.append(scaled + one.gate.b_mag[j].item())
    features = _activated(one, pre, gates)
    written = list(b_dec)
    for j in range(n):
        for o in range(d_out):
            written[o] += features[j] * W_dec[j][o] / (norms[j] if one.rescaled else 1)
    if one.W_skip is not None:
        written = [written[o] + sum(row[i] * one.W_skip[i][o].item() for i in range(width)) for o in range(d_out)]
    if one.restores:
        written = [value * scale + shift for value in written]
    return pre, features, written


def _normalised(one: Autoencoder, row: list[float]) -> tuple[list[float], float, float]:
    width = len(row)
    if one.normalisation == "layer_norm":
        mean = sum(row) / width
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (width - 1))
        return [(value - mean) / (deviation + 1e-5) for value in row], deviation, mean
    if one.normalisation == "constant_norm":
        scale = math.sqrt(sum(value * value for value in row) / width)
        return [value / scale for value in row], scale, 0.0
    return row, 1.0, 0.0


def _activated(one: Autoencoder, pre: list[float], gates: list[bool]) -> list[float]:
    if one.activation == "topk":
        kept = sorted(range(len(pre)), key=lambda j: -pre[j])[: one.k]
        return [max(0.0, value) if j in kept else 0.0 for j, value in enumerate(pre)]
    if one.activation == "jumprelu":
        return [max(0.0, value) if value > one.threshold[j].item() else 0.0 for j, value in enumerate(pre)]
    if one.activation == "gated":
        return [max(0.0, value) if gates[j] else 0.0 for j, value in enumerate(pre)]
    return [max(0.0, value) for value in pre]
