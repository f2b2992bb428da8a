"""How far two next-token distributions are apart.

Softmax, logarithms and sums are computed in float64 from the logits: in float32 the sum of a divergence of 1e-5 loses
its second digit. Divergences are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-10
"""Entries of which either probability is not above this are left out of a divergence."""


@dataclass(frozen=True)
class Changed:
    """A token whose probability changed.

    Attributes:
        rank: 1 is the token that changed most.
        abs_diff: |baseline_prob − ablated_prob|.
    """

    rank: int
    token_id: int
    baseline_prob: float
    ablated_prob: float
    abs_diff: float


def kl_divergence(
    baseline: Float[Tensor, "*rows vocab"], other: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """Σ p ln(p/q) of each row, over entries where both exceed `SMALLEST`; p is of `baseline`, q of `other`.

    Both are logits. A row with a logit of NaN gives NaN.
    """
    log_p, log_q = baseline.double().log_softmax(-1), other.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where((p > SMALLEST) & (q > SMALLEST), p * (log_p - log_q), 0.0).sum(-1)
    undefined = p.isnan().any(-1) | q.isnan().any(-1)  # NaN exceeds nothing: it would count as no difference
    return terms.masked_fill(undefined, float("nan"))


def logit_difference(
    baseline: Float[Tensor, "*rows vocab"], other: Float[Tensor, "*rows vocab"], token_ids: Sequence[int]
) -> Float[Tensor, "*rows token"]:
    """baseline − other of the logits of some tokens, in float64; positive: the other lost support for the token."""
    chosen = list(token_ids)
    return baseline[..., chosen].double() - other[..., chosen].double()


def top_changed(baseline: Float[Tensor, "vocab"], other: Float[Tensor, "vocab"], count: int) -> list[Changed]:
    """The `count` tokens with the largest |p − q|, largest first, of equal ones the lower id; both are logits."""
    p, q = baseline.double().softmax(-1), other.double().softmax(-1)
    difference = (p - q).abs()
    order = difference.sort(descending=True, stable=True).indices[:count].tolist()
    return [
        Changed(rank, token, float(p[token]), float(q[token]), float(difference[token]))
        for rank, token in enumerate(order, start=1)
    ]
