"""Ablation: what the answer's log-probability loses when heads and MLPs write nothing, or the same thing everywhere.

1. The sample runs again in two rows of one batch: as it was, and with the outputs of the heads (before the output
   projection) and what the MLPs add to the stream set to zero or to the mean over a dataset.
2. The answer's log-probability is Σ_i log softmax_C(logits at pos_i)[label_i], in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.replaced import Replacement, replaced_logits
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps
from attribution.store import StoredSample


@dataclass(frozen=True)
class Ablated:
    """Log-probabilities of the labels, in nats, before and after."""

    before: Float[Tensor, "pos"]
    after: Float[Tensor, "pos"]


@dataclass(frozen=True)
class Components:
    """Heads as (layer, head), and MLPs by their layer."""

    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()


def ablated(
    model: TracedModel,
    sample: StoredSample,
    replacements: list[Replacement],
    positions: list[int],
    labels: list[int],
    candidate_ids: list[int] | None,
) -> Ablated:
    """Run the sample with and without replacements; `labels` index the candidates (`checks.answer`)."""
    logits = replaced_logits(model, sample.token_ids, [[], replacements], positions).double()
    if candidate_ids is not None:
        logits = logits[..., candidate_ids]
    chosen = torch.tensor(labels, device=logits.device).expand(2, -1)[..., None]
    before, after = logits.log_softmax(-1).gather(-1, chosen)[..., 0].cpu()
    return Ablated(before, after)


def zeros(model: TracedModel, components: Components) -> list[Replacement]:
    """Replacements by nothing."""
    dims = model.dimensions
    heads = [Replacement(layer, head, torch.zeros(dims.d_head)) for layer, head in components.heads]
    return heads + [Replacement(layer, None, torch.zeros(dims.d_model)) for layer in components.mlps]


def means(samples: Iterable[StoredSample], count: int, components: Components) -> Steps[list[Replacement]]:
    """Replacements by the mean over all positions of all samples, `count` of them; one step per sample."""
    heads: dict[tuple[int, int], Tensor] = {}
    mlps: dict[int, Tensor] = {}
    tokens = 0
    for number, sample in enumerate(samples, start=1):
        tokens += sample.seq_len
        for layer in sorted({layer for layer, _ in components.heads}):
            z = sample.read("z", layer).double().sum(0)
            for head in (head for at, head in components.heads if at == layer):
                heads[layer, head] = heads.get((layer, head), torch.zeros(())) + z[head]
        for layer in components.mlps:
            mlps[layer] = mlps.get(layer, torch.zeros(())) + sample.read("mlp_out", layer).double().sum(0)
        yield Progress(number, count)
    found = [Replacement(layer, head, total / tokens) for (layer, head), total in heads.items()]
    return found + [Replacement(layer, None, total / tokens) for layer, total in mlps.items()]
