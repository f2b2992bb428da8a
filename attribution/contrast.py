"""A direction from two groups of examples: the difference of their means.

Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2024), section 3; with as many positive as
negative examples it is the mean of the differences of pairs, whichever way they are paired.

1. Every example gives one vector per layer: the mean of the activation over its window of positions.
2. The direction is the mean over the positive examples minus the mean over the negative ones, in float64.
3. It is scaled to a norm, where one is asked for.
4. How well it tells the groups apart is told twice: for the examples that it was made from, and, as in a space much
   wider than there are examples these are always told apart, for pairs that were left out (Airola et al., "An
   experimental comparison of cross-validation techniques for estimating the area under the ROC curve", 2011).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.activations import batches, padded
from attribution.errors import BadPositions, BadSelector, CannotFit, InvalidArgument, NotFinite
from attribution.model.capture import forward
from attribution.model.resolve import Resolved, resolve
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps
from attribution.positions import Window

_TIE = 1e-11  # of the largest score: what differs by less is rounding
_PAIRS = 2**22  # of a positive and a negative example, whose scores are in memory at once


@dataclass(frozen=True)
class Examples:
    """The prompts of both groups as tokens, the positive ones first; `names` are those of the arguments."""

    tokens: list[list[int]]
    names: list[str]
    positive: int


@dataclass(frozen=True)
class Contrast:
    """The difference of two means.

    Attributes:
        direction: in float64, before any scaling.
        statistics: per layer, as JSON; see `statistics_of`.
    """

    direction: Float[Tensor, "layer *width"]
    statistics: list[dict[str, Any]]


# --- one vector per example


def direction_site(model: TracedModel, selector: str) -> Resolved:
    """What `selector` names, when it has one vector per token at every position.

    Raises:
        BadSelector: it names nothing, or a pattern, or what only the last positions pass.
    """
    site = resolve(model, selector)
    if site.is_pattern or site.tail:
        what = "a pattern is no vector" if site.is_pattern else "only the last position of a prompt passes there"
        raise BadSelector(
            f"{selector!r}: {what}; take a place that has a vector per token, such as 'resid_post[3]'", param="selector"
        )
    return site


def example_means(
    model: TracedModel, site: Resolved, examples: Examples, window: Window
) -> Steps[Float[Tensor, "example layer *width"]]:
    """The mean activation of each example over its window, in the dtype of scores; one step per batch.

    Raises:
        BadPositions: the window selects no token of one of them.
        NotFinite: the model computes NaN or inf for one of them.
        CannotFit: what is kept of the examples would not fit into memory.
    """
    lengths = [len(tokens) for tokens in examples.tokens]
    spans = [site.span(window, length, length) for length in lengths]
    for span, length, name in zip(spans, lengths, examples.names, strict=True):
        if not span:
            raise BadPositions(f"positions select no token of {name}, which has {length}", param="positions")
    shape = (len(lengths), len(site.streams[0].sites), *site.width)
    _check_room(shape, model.work_dtype)
    found, done = torch.empty(shape, dtype=model.work_dtype), 0
    for batch in batches(lengths):
        (captured,) = forward(model, padded(model, [examples.tokens[index] for index in batch]), site.streams)[
            1
        ].values()
        for row, index in enumerate(batch):
            kept = captured[:, row, -lengths[index] :][:, torch.tensor(spans[index])].double().mean(1)
            if not kept.isfinite().all():
                raise NotFinite(f"the model computes NaN or inf at {site.text} for {examples.names[index]}")
            found[index] = kept
        done += len(batch)
        yield Progress(done, len(lengths))
    return found


def _check_room(shape: Sequence[int], dtype: torch.dtype) -> None:
    needed, there = torch.Size(shape).numel() * dtype.itemsize, psutil.virtual_memory().available
    if needed > there // 2:
        raise CannotFit(
            f"the activations of {shape[0]} examples in {shape[1]} layers take {needed:,} bytes and {there:,} are "
            "free: give fewer examples, or fewer layers at a time",
            param="selector",
        )


# --- the difference of the means


def contrast(found: Float[Tensor, "example layer *width"], positive: int, layers: Sequence[int | None]) -> Contrast:
    """The difference of the means of the first `positive` examples and of the others; `layers` name the layers.

    Raises:
        InvalidArgument: in some layer there is none.
    """
    flat = found.flatten(2)
    directions, statistics, none = [], [], []
    for index, layer in enumerate(layers):
        rows = flat[:, index].double()
        means = rows[:positive].mean(0), rows[positive:].mean(0)
        direction = means[0] - means[1]
        if float(direction.norm()) <= 10 * torch.finfo(found.dtype).eps * float(means[0].norm()):
            none.append("" if layer is None else f" in layer {layer}")
        directions.append(direction.view(found.shape[2:]))
        statistics.append({"layer": layer} | statistics_of(rows[:positive], rows[positive:]))
    if none:
        raise InvalidArgument(
            f"the positive and the negative examples have the same mean{' and'.join(none)}, there is no direction: "
            "give other examples or positions, or leave the layer out",
            param="positive",
        )
    return Contrast(torch.stack(directions), statistics)


def scaled(direction: Float[Tensor, "layer *width"], norm: float | None) -> Float[Tensor, "layer *width"]:
    """The direction of every layer with this norm; None leaves it as it is."""
    if norm is None:
        return direction
    length = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
    return direction * (norm / length)


def statistics_of(
    positive: Float[Tensor, "positive width"], negative: Float[Tensor, "negative width"]
) -> dict[str, float | None]:
    """What is to be known of a difference of means, from the vectors of both groups in float64.

    Returns:
        positive_norm, negative_norm, difference_norm: of the two means and their difference.
        cosine: of the two means; None when one of them is 0.
        auc: the share of pairs of a positive and a negative example in which the positive one lies further along the
            direction, ties counted half.
        auc_held_out: the same, each pair judged by the direction that the other examples give; None with fewer than
            two examples in a group.
    """
    means = positive.mean(0), negative.mean(0)
    norms = [float(mean.norm()) for mean in means]
    direction = means[0] - means[1]
    return {
        "positive_norm": norms[0],
        "negative_norm": norms[1],
        "difference_norm": float(direction.norm()),
        "cosine": float(means[0] @ means[1]) / (norms[0] * norms[1]) if all(norms) else None,
        "auc": _auc(positive @ direction, negative @ direction),
        "auc_held_out": _auc_held_out(positive, negative) if min(len(positive), len(negative)) > 1 else None,
    }


def _auc(positive: Float[Tensor, "positive"], negative: Float[Tensor, "negative"]) -> float:
    tie = _TIE * max(float(positive.abs().max()), float(negative.abs().max()))
    wins = 0.0
    for rows in positive.split(max(1, _PAIRS // len(negative))):
        wins += _wins(rows[:, None] - negative, tie)
    return wins / (len(positive) * len(negative))


def _auc_held_out(positive: Float[Tensor, "positive width"], negative: Float[Tensor, "negative width"]) -> float:
    """Leave-pair-out: ⟨x − y, P' − N'⟩ > 0, where P' = (n P − x)/(n − 1) is the mean of the positive ones without x.

    All pairs at once, from inner products alone. Taking a common vector off changes nothing, and keeps more digits.
    """
    centre = (positive.mean(0) + negative.mean(0)) / 2
    positive, negative = positive - centre, negative - centre
    (n, m), (p, q) = (len(positive), len(negative)), (positive.mean(0), negative.mean(0))
    own_x = (n * (positive @ p) - positive.square().sum(1)) / (n - 1)  # ⟨x, P'⟩
    own_y = (m * (negative @ q) - negative.square().sum(1)) / (m - 1)  # ⟨y, N'⟩
    size = max(float(positive.square().sum(1).max()), float(negative.square().sum(1).max()))
    wins = 0.0
    for start in range(0, n, step := max(1, _PAIRS // m)):
        x = positive[start : start + step]
        between = x @ negative.T
        other_x = (m * (x @ q)[:, None] - between) / (m - 1)  # ⟨x, N'⟩
        other_y = (n * (negative @ p) - between) / (n - 1)  # ⟨y, P'⟩
        wins += _wins(own_x[start : start + step, None] - other_x - other_y + own_y, _TIE * size)
    return wins / (n * m)


def _wins(scores: Tensor, tie: float) -> float:
    return float((scores > tie).sum()) + 0.5 * float((scores.abs() <= tie).sum())
