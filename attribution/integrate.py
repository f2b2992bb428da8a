"""Integrated gradients along the path from 0 to an activation, and how complete they are.

1. Interpolation points α_k and weights w_k of a rule (definitions: `docs/attribution.md`).
2. The gradient of the node's objective, averaged over the points: Σ_k w_k · ∂O(α_k x)/∂x. All points are rows of one
   batch.
3. Its completeness error: |⟨gradient, x⟩ − (O(x) − O(0))| / |O(x) − O(0)|, in float64.

Sundararajan et al., "Axiomatic attribution for deep networks" (2017).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Rule = Literal["gauss_legendre", "uniform"]
DEFAULT_STEPS = 4
AUTO_ERROR, AUTO_MOST_STEPS = 1e-3, 64
_TINY = 1e-30


@runtime_checkable
class Path(Protocol):
    """A node reading α·x: what `integrate` needs to know of it. Axis 0 of results is the heads (1 where none)."""

    x: Float[Tensor, "pos d_model"]

    def gradient(self, points: "Points", rows: list[int]) -> Float[Tensor, "heads chosen d_model"]:
        """Σ_k w_k · ∂O(α_k x)/∂x for each head, at some of the positions."""
        ...

    def complete_gradient(self, points: "Points") -> Float[Tensor, "heads pos d_model"]:
        """The same at all positions, and for the whole of what the completeness error is about."""
        ...

    def objective(self, alpha: float) -> Float[Tensor, "heads"]:
        """O(α·x) for each head."""
        ...


@dataclass(frozen=True)
class Points:
    """Interpolation points in [0, 1] and their weights, which sum to 1."""

    alphas: tuple[float, ...]
    weights: tuple[float, ...]

    def rows(self, normed_zero: Tensor, normed: Tensor) -> Tensor:
        """The values of an affine map along the path, one row per point: its values at 0 and at x are given."""
        alphas = torch.tensor(self.alphas, dtype=normed.dtype, device=normed.device)
        return normed_zero + alphas.view(-1, *[1] * normed.dim()) * (normed - normed_zero)

    def weigh(self, rows: Float[Tensor, "point *rest"]) -> Float[Tensor, "*rest"]:
        """The weighted sum over the points."""
        weights = torch.tensor(self.weights, dtype=rows.dtype, device=rows.device)
        return torch.einsum("k,k...->...", weights, rows)


@dataclass(frozen=True)
class Integrated:
    """An integrated gradient and how far to trust it; one entry per head.

    Attributes:
        gradient: at the positions that were asked for.
        objective: O(x), in float64.
        objective_at_zero: O(0).
        completeness_error: relative, see the head of this module.
        steps: how many interpolation points were taken; 0 is the plain gradient.
    """

    gradient: Float[Tensor, "heads chosen d_model"]
    objective: Float[Tensor, "heads"]
    objective_at_zero: Float[Tensor, "heads"]
    completeness_error: Float[Tensor, "heads"]
    steps: int


@cache
def interpolation(steps: int, rule: Rule) -> Points:
    """The points of a rule: `steps` Gauss–Legendre nodes, or the `steps` + 1 ends of equal parts; 0 is α = 1 alone."""
    if steps == 0:
        return Points((1.0,), (1.0,))
    if rule == "uniform":
        alphas = np.linspace(0, 1, steps + 1)
        return Points(tuple(alphas.tolist()), (1 / (steps + 1),) * (steps + 1))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return Points(tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist()))


def integrate(
    path: Path, rows: list[int], steps: int | Literal["auto"] | None, rule: Rule
) -> Float[Tensor, "heads chosen d_model"]:
    """The integrated gradient alone, at some of the path's positions; `steps` of None is `DEFAULT_STEPS`."""
    if steps == "auto":
        return integrate_with_report(path, rows, steps, rule).gradient
    return path.gradient(interpolation(DEFAULT_STEPS if steps is None else steps, rule), rows)


def integrate_with_report(path: Path, rows: list[int], steps: int | Literal["auto"] | None, rule: Rule) -> Integrated:
    """The integrated gradient with its completeness error.

    With "auto" the number of points doubles from `DEFAULT_STEPS` until the error of every head is below `AUTO_ERROR`,
    or `AUTO_MOST_STEPS` is reached.
    """
    at_x, at_zero = path.objective(1.0), path.objective(0.0)
    count = DEFAULT_STEPS if steps in (None, "auto") else int(steps)
    while True:
        points = interpolation(count, rule)
        complete = path.complete_gradient(points)
        error = completeness_error(complete, path.x, at_x - at_zero)
        if steps != "auto" or count >= AUTO_MOST_STEPS or bool((error < AUTO_ERROR).all()):
            return Integrated(path.gradient(points, rows), at_x, at_zero, error, count)
        count *= 2


def completeness_error(
    gradient: Float[Tensor, "heads pos d_model"], x: Float[Tensor, "pos d_model"], difference: Float[Tensor, "heads"]
) -> Float[Tensor, "heads"]:
    """|⟨gradient, x⟩ − difference| / |difference|, in float64."""
    product = (gradient.double() * x.double()).sum((-1, -2))
    return (product - difference.double()).abs() / difference.double().abs().clamp_min(_TINY)
