"""Ablation: what the answer's log-probability loses when heads and MLPs write nothing, or the same thing everywhere.

1. The sample runs again in rows of shared batches: as it was, and once for each set of components with the outputs of
   its heads (before the output projection) and what its MLPs add to the stream set to zero or to a mean over a dataset.
2. The answer's log-probability is Σ_i log softmax_C(logits at pos_i)[label_i], in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.means import Means
from attribution.model.replaced import Replacement, replaced_logits
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps
from attribution.store import StoredSample

BATCH_TOKENS = 4096
"""How many tokens the rows of one batch have together at most; one row may have more."""


@dataclass(frozen=True)
class Components:
    """Heads as (layer, head), and MLPs by their layer."""

    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What is scored: `labels` index the candidates (`checks.answer`), of which None are the whole vocabulary."""

    positions: list[int]
    labels: list[int]
    candidate_ids: list[int] | None


def ablated(
    model: TracedModel, sample: StoredSample, sets: Sequence[Components], means: Means | None, answer: Answer
) -> Steps[Float[Tensor, "row pos"]]:
    """The log-probability of each label, in nats: as the sample was, then with each set of components ablated.

    Args:
        means: what is put in place of what they write; None is zero.
    """
    rows = [[], *(_replacements(model, one, means) for one in sets)]
    size = max(1, BATCH_TOKENS // sample.seq_len)
    found = []
    for start in range(0, len(rows), size):
        logits = replaced_logits(model, sample.token_ids, rows[start : start + size], answer.positions).double()
        if answer.candidate_ids is not None:
            logits = logits[..., answer.candidate_ids]
        labels = torch.tensor(answer.labels, device=logits.device).expand(len(logits), -1)[..., None]
        found.append(logits.log_softmax(-1).gather(-1, labels)[..., 0].cpu())
        yield Progress(min(start + size, len(rows)), len(rows))
    return torch.cat(found)


def _replacements(model: TracedModel, components: Components, means: Means | None) -> list[Replacement]:
    if means is None:
        dims = model.dimensions
        head, mlp = torch.zeros(1, dims.d_head), torch.zeros(1, dims.d_model)
        return [
            *(Replacement(layer, number, head) for layer, number in components.heads),
            *(Replacement(layer, None, mlp) for layer in components.mlps),
        ]
    return [
        *(Replacement(layer, number, means.z[layer, :, number]) for layer, number in components.heads),
        *(Replacement(layer, None, means.mlp_out[layer]) for layer in components.mlps),
    ]
