"""A sample run again, once for each list of replacements, and what the answer is worth in each run.

1. The runs are rows of shared batches, of so many tokens and logits at most.
2. The answer is scored by Σ_i log softmax_C(logits at pos_i)[label_i], and by Σ_i (logit of label_i − logit of
   against_i), in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from attribution import checks
from attribution.errors import NotFinite
from attribution.model.replaced import Replacement, replaced_logits
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps

BATCH_TOKENS, BATCH_LOGITS = 2048, 2**25
"""How many tokens the rows of one batch have together at most, and how many logits are scored; one row may have more.

On two cores, 4096 tokens take 10 to 20 % longer a row (models of 0.9 M and 24 M parameters), and 1024 the same.
"""


@dataclass(frozen=True)
class Answer:
    """What is scored.

    Attributes:
        positions: where the logits are read: the answer at token p is predicted at p − 1.
        labels: for each, an index into the candidates, of which None are the whole vocabulary.
        label_ids: the same labels as tokens.
        against: for each, the token that the label's logit is compared with; None compares with nothing.
    """

    positions: list[int]
    labels: list[int]
    label_ids: list[int]
    candidate_ids: list[int] | None
    against: list[int] | None = None

    @classmethod
    def of(
        cls,
        model: TracedModel,
        tokens: int,
        labels: list[int] | None,
        candidate_ids: list[int] | None,
        pos_ids: list[int] | None,
        against: list[int] | None = None,
    ) -> "Answer":
        """The answer that a caller names, in a sample of so many tokens.

        Raises:
            InvalidArgument, OutOfRange, ShapeMismatch: naming the argument.
        """
        vocabulary, positions = model.dimensions.d_vocab, checks.positions("pos_ids", pos_ids, tokens)
        chosen = checks.answer(vocabulary, labels, candidate_ids, len(positions))
        if against is not None:
            if len(against) != len(positions):
                raise checks.mismatch("against", f"{len(against)} entries", f"{len(positions)}, one per label")
            for token in against:
                checks.in_range("against", token, vocabulary, "the token ids of this model")
        return cls(positions, chosen, list(labels or []), candidate_ids, against)


@dataclass(frozen=True)
class Scores:
    """What the answer is worth in some runs.

    Attributes:
        log_prob: of each label among the candidates, in nats.
        logit_diff: of each label's logit and that of the token it is compared with; None where there is none.
        rounding: what one step of the model's dtype is at the largest of the logits that were read.
    """

    log_prob: Float[Tensor, "row pos"]
    logit_diff: Float[Tensor, "row pos"] | None
    rounding: float


def rerun(
    model: TracedModel, token_ids: list[int], rows: Iterable[list[Replacement]], count: int, answer: Answer
) -> Steps[Scores]:
    """Run a sequence once for each list of replacements.

    Args:
        rows: `count` of them, asked for when their batch comes.

    Raises:
        NotFinite: a label's log-probability is NaN or infinite in one of the runs.
    """
    scored = max(1, len(answer.positions) * model.dimensions.d_vocab)
    size = max(1, min(BATCH_TOKENS // len(token_ids), BATCH_LOGITS // scored))
    source, found = iter(rows), []
    for start in range(0, count, size):
        batch = list(islice(source, size))
        found.append(_score(replaced_logits(model, token_ids, batch, answer.positions), answer))
        _check_finite(found[-1].log_prob, start, batch)
        yield Progress(start + len(batch), count)
    diffs = [one.logit_diff for one in found if one.logit_diff is not None]
    return Scores(
        torch.cat([one.log_prob for one in found]),
        torch.cat(diffs) if diffs else None,
        max(one.rounding for one in found),
    )


def _score(logits: Float[Tensor, "row pos vocab"], answer: Answer) -> Scores:
    rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max())
    logits = logits.double()
    diff = None
    if answer.against is not None:
        diff = (_picked(logits, answer.label_ids) - _picked(logits, answer.against)).cpu()
    return Scores(log_probabilities(logits, answer).cpu(), diff, rounding)


def log_probabilities(logits: Float[Tensor, "row pos vocab"], answer: Answer) -> Float[Tensor, "row pos"]:
    """log softmax_C(logits at pos_i)[label_i], in float64."""
    chosen = logits.double()
    if answer.candidate_ids is not None:
        chosen = chosen[..., answer.candidate_ids]
    return _picked(chosen.log_softmax(-1), answer.labels)


def _check_finite(log_prob: Float[Tensor, "row pos"], start: int, batch: list[list[Replacement]]) -> None:
    wrong = (~log_prob.isfinite()).any(-1).nonzero().flatten().tolist()
    if wrong:
        how = "with what was put in place" if batch[wrong[0]] else "as it is"
        raise NotFinite(
            f"the model computes NaN or inf for this sample {how} (run {start + wrong[0]}): its answer is worth no "
            "number that others could be compared with"
        )


def _picked(values: Float[Tensor, "row pos token"], tokens: list[int]) -> Float[Tensor, "row pos"]:
    at = torch.tensor(tokens, device=values.device).expand(len(values), -1)
    return values.gather(-1, at[..., None])[..., 0]
