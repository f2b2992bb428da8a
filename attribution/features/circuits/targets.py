"""Which logits are explained."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument
from attribution.features.circuits.trace import Logits
from attribution.model.linearised import logit_directions
from attribution.model.traced import TracedModel
from attribution.prompts import token_id_of

MOST_TARGETS = 100


Choose = Callable[[Tensor], Logits]
"""The logits that are explained, given those of the whole vocabulary."""


def choose_logits(
    model: TracedModel,
    logits: Float[Tensor, "vocab"],
    targets: Sequence[int | str] | None,
    max_logits: int,
    logit_probability: float,
) -> Logits:
    """The tokens that are named, or the most likely ones: at most `max_logits`, and no more than hold the probability.

    Raises:
        OutOfRange, InvalidArgument: a target that is no token, or one that is named twice.
    """
    probabilities = logits.double().softmax(-1).cpu()
    if targets is None:
        top = probabilities.topk(min(max_logits, len(probabilities)))
        needed = int((top.values.cumsum(0) < logit_probability).sum()) + 1
        chosen = top.indices[:needed].tolist()
    else:
        if not 1 <= len(targets) <= MOST_TARGETS:
            raise InvalidArgument(
                f"targets names {len(targets)} tokens; 1 to {MOST_TARGETS} are explained at once", param="targets"
            )
        chosen = [token_id_of(model, one, "targets") for one in targets]
        if len(set(chosen)) < len(chosen):
            raise InvalidArgument(f"targets names a token twice: {chosen}", param="targets")
    directions, offsets = logit_directions(model, chosen)
    return Logits(chosen, directions, offsets, probabilities[torch.tensor(chosen)].tolist())
