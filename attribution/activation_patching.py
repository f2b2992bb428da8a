"""Activation patching: the corrupted sample run again with activations of the clean one put in their place.

1. The clean sample runs once. The corrupted one runs in rows of shared batches: as it was, and once for each set of
   patches, whose activations were stored when the clean sample was run.
2. Each run is scored (`attribution.rerun`) by the log-probability of the labels, and by the difference of their logits
   and those of other tokens.
3. The recovery of a set is (patched − corrupted) / (clean − corrupted): 0 where it changes nothing, 1 where it brings
   the clean value back. It has no value where clean and corrupted are the same up to rounding.

(Heimersheim and Nanda, "How to use and interpret activation patching", 2024; its linear estimate is in
`attribution.patching`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attribution.model.traced import TracedModel
from attribution.operation import Steps
from attribution.rerun import Answer, Scores, rerun
from attribution.stored import StoredSample
from attribution.written import of_sample, replacement


@dataclass(frozen=True)
class Patch:
    """One activation that is taken over: `point` of `layer`, of "z" one head or all, at some positions or all."""

    point: str
    layer: int
    head: int | None = None
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Effect:
    """One metric, summed over the positions of the answer.

    Attributes:
        recovery: None, with `note` saying why, where clean and corrupted do not differ.
    """

    clean: float
    corrupted: float
    patched: Float[Tensor, "set"]
    recovery: Float[Tensor, "set"] | None
    note: str | None


@dataclass(frozen=True)
class Effects:
    """Both metrics; `logit_diff` is None where the labels are compared with nothing."""

    log_prob: Effect
    logit_diff: Effect | None


def patched(
    model: TracedModel,
    clean: StoredSample,
    corrupted: StoredSample,
    sets: Sequence[Sequence[Patch]],
    answer: Answer,
) -> Steps[Effects]:
    """What the answer is worth with each set of patches."""
    found = of_sample(model, clean)
    own = yield from rerun(model, clean.token_ids, [[]], 1, answer)
    rows = (
        [replacement(found, one.point, one.layer, one.head, one.positions) for one in patches]
        for patches in ([], *sets)
    )
    scores = yield from rerun(model, corrupted.token_ids, rows, 1 + len(sets), answer)
    return Effects(
        _effect("log_prob", own, scores), None if answer.against is None else _effect("logit_diff", own, scores)
    )


def _effect(metric: str, clean: Scores, runs: Scores) -> Effect:
    before = float(getattr(clean, metric).sum())
    corrupted, *_ = values = getattr(runs, metric).sum(-1)
    gap, least = before - float(corrupted), 2 * max(clean.rounding, runs.rounding)
    if abs(gap) > least:
        return Effect(before, float(corrupted), values[1:], (values[1:] - corrupted) / gap, None)
    note = (
        f"clean and corrupted differ by {gap:.3g}, which is not above what rounding can make of them ({least:.3g}): "
        "there is nothing to recover"
    )
    return Effect(before, float(corrupted), values[1:], None, note)
