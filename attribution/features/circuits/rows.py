"""The exact linear effect of every feature, error and token on a target.

A target is a vector at a layer and a position: a feature's encoder column at what its encoder multiplies, or a logit's
direction at the final normed stream. With everything else held fixed the target's value is

    Σ features ⟨G, activation · decoder⟩ + Σ errors ⟨G, error⟩ + Σ tokens ⟨G, embedding⟩ + constant

with G the gradient at what each MLP adds and at the embeddings. Each term is an edge. The constant is what biases give:
of the encoder, the decoders, the norms and the attention.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attribution.features.circuits.replacement import Replacement

_AT_ONCE = 1 << 20
"""Numbers that features write and that are held at once: of all of a layer they may be more than its transcoder has."""


def n_columns(replacement: Replacement) -> int:
    """How many sources there are: the active features, an error per layer and position, the tokens."""
    return len(replacement.features) + (replacement.n_layers + 1) * replacement.n_positions


def effects(
    replacement: Replacement,
    depth: int,
    positions: Int[Tensor, "target"],
    vectors: Float[Tensor, "target width"],
) -> Float[Tensor, "target source"]:
    """What each source adds to some targets of one depth: features, errors by layer and position, tokens.

    Args:
        depth: the layer whose encoder the vectors are at; the number of layers for logits.
    """
    linear, count = replacement.linear, replacement.n_positions
    read = linear.final if depth == replacement.n_layers else replacement.reads[depth]
    grads = torch.zeros(len(positions), *read.shape, dtype=read.dtype, device=read.device)
    grads[torch.arange(len(positions)), positions] = vectors.to(grads)
    found = linear.backward(depth, read, grads)
    n_features, dtype = len(replacement.features), replacement.model.work_dtype
    rows = torch.zeros(len(positions), n_columns(replacement), dtype=dtype)
    for layer, grad in enumerate(found[1:]):
        grad = grad.to(dtype)
        errors = n_features + layer * count
        rows[:, errors : errors + count] = torch.einsum("tpd,pd->tp", grad, replacement.errors[layer]).cpu()
        if layer in replacement.transcoders:
            _add_features(replacement, layer, grad, rows)
    tokens = linear.values(0).to(dtype)
    rows[:, n_columns(replacement) - count :] = torch.einsum("tpd,pd->tp", found[0].to(dtype), tokens).cpu()
    return rows


def _add_features(replacement: Replacement, layer: int, grad: Tensor, rows: Tensor) -> None:
    """Contract the gradient of one layer with what its features write; they stand by position."""
    features, size = replacement.features, max(1, _AT_ONCE // grad.shape[-1])
    chosen = features.of_layer(layer)
    for first in range(chosen.start, chosen.stop, size):
        part = slice(first, min(first + size, chosen.stop))
        writes, start = replacement.writes(layer, part).to(grad), 0
        positions, counts = features.position[part].unique_consecutive(return_counts=True)
        for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
            stop = start + count
            rows[:, first + start : first + stop] = (grad[:, position] @ writes[start:stop].T).cpu()
            start = stop
