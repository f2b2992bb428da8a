"""Rows in pieces that fit in memory, and rows along the path of integration."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.integrate import Points
from attribution.norms import FrozenNorm

_MOST_ELEMENTS = 2**25  # of the largest intermediate tensor


def pieces(rows: int, elements: int) -> Iterator[list[int]]:
    """The numbers 0 … rows − 1 in runs, given how many elements each takes in the largest intermediate tensor."""
    size = max(1, _MOST_ELEMENTS // max(elements, 1))
    for start in range(0, rows, size):
        yield list(range(start, min(rows, start + size)))


def normed_rows(
    points: Points, frozen: FrozenNorm, x: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "point pos d_model"]:
    """Ñ(α·x) for every interpolation point α: a frozen norm is affine, so that two evaluations give all."""
    return points.rows(frozen(torch.zeros_like(x)), frozen(x))
