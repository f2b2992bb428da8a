"""Ablation: what the answer's log-probability loses when parts of the model write nothing, or something else.

1. The sample runs again (`attribution.rerun`): as it was, and once for each set of components, in which its heads
   (before the output projection) and what its MLPs and whole layers add to the stream are set to zero, to a mean, or to
   what another sample has there.
2. With several samples to take from, every set runs once with each, and the log-probabilities are averaged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.replaced import Replacement
from attribution.model.traced import TracedModel
from attribution.operation import Steps
from attribution.rerun import Answer, rerun
from attribution.store import StoredSample
from attribution.written import Written, replacement


@dataclass(frozen=True)
class Components:
    """What is ablated together.

    Attributes:
        heads: as (layer, head).
        mlps: by their layer.
        layers: attention and MLP of these.
        positions: where; None is everywhere.
    """

    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    positions: tuple[int, ...] | None = None


def ablated(
    model: TracedModel,
    sample: StoredSample,
    sets: Sequence[Components],
    draws: Sequence[Callable[[], Written]],
    answer: Answer,
) -> Steps[Float[Tensor, "row pos"]]:
    """The log-probability of each label, in nats: as the sample was, then with each set of components ablated.

    Args:
        draws: each gives what is put in place of what they write, when its turn comes; at least one.
    """
    rows = _rows(sets, draws)
    scores = yield from rerun(model, sample.token_ids, rows, 1 + len(sets) * len(draws), answer)
    before, after = scores.log_prob[:1], scores.log_prob[1:].unflatten(0, (len(draws), len(sets)))
    return torch.cat([before, after.mean(0)])


def _rows(sets: Sequence[Components], draws: Sequence[Callable[[], Written]]) -> Iterator[list[Replacement]]:
    """Draw by draw, so that one sample is held at a time, or two where a batch has rows of both."""
    yield []
    for draw in draws:
        written = draw()
        for one in sets:
            yield _replacements(one, written)


def _replacements(components: Components, written: Written) -> list[Replacement]:
    at = components.positions
    return [
        *(replacement(written, "z", layer, head, at) for layer, head in components.heads),
        *(replacement(written, "mlp_out", layer, None, at) for layer in components.mlps),
        *(replacement(written, "attn_out", layer, None, at) for layer in components.layers),
        *(replacement(written, "mlp_out", layer, None, at) for layer in components.layers),
    ]
