"""What clustering costs: the distances of a thousand heads, against the same sums with a logarithm for every pair."""

from collections.abc import Callable

import torch
from torch import Tensor

from attribution.heads import cluster_heads, compute_js_matrix
from benchmarks.table import Row
from benchmarks.timing import in_turn, milliseconds, ratio

NOTE = (
    "1,000 heads × 500 rows is estimated from fewer rows (40): the time grows with them. The base takes the "
    "logarithms of all pairs, row block by row block, over a tenth of the pairs, times ten."
)
HEADS, ROWS, KEYS, MEASURED = 1000, 500, 200, 40
_BLOCK = 20  # heads; fits a tenth of them


def run(rounds: int) -> list[Row]:
    """The distances of a thousand heads, and all of clustering."""
    scores = torch.randn(HEADS, MEASURED, KEYS, generator=torch.Generator().manual_seed(0))
    patterns = (scores * 3).softmax(-1)
    named = {divmod(number, 40): pattern for number, pattern in enumerate(patterns)}
    distances = compute_js_matrix(patterns)
    times = in_turn(
        {
            "base": lambda: _logarithms(patterns, HEADS // 10),
            "ours": lambda: compute_js_matrix(patterns),
            "linkage": lambda: cluster_heads(named, _given(distances)),
        },
        rounds,
    )
    times["base"] = [10 * one for one in times["base"]]
    whole = {name: [ROWS / MEASURED * one for one in times[name]] for name in ("base", "ours")}
    return [
        Row(
            f"distances of {HEADS} heads × {ROWS} rows × {KEYS} keys",
            "< 0.6",
            ratio(times, "ours", "base"),
            milliseconds(whole["base"], whole["ours"]),
        ),
        Row(f"linkage, groups and metrics of {HEADS} heads", "", None, milliseconds(times["linkage"])),
    ]


def _given(distances: Tensor) -> Callable[[object], Tensor]:
    return lambda _: distances


def _logarithms(patterns: Tensor, heads: int) -> Tensor:
    """Σ m·ln m of the first heads with all, half of the pairs left out: what the plain formula costs."""
    entries = patterns.flatten(1) + 1e-30
    sums = torch.zeros(heads, len(entries) // 2, dtype=torch.float64)
    for piece in entries.split(1024, dim=1):
        for row in range(0, heads, _BLOCK):
            for column in range(0, sums.shape[1], _BLOCK):
                middle = (piece[row : row + _BLOCK, None] + piece[column : column + _BLOCK]).div_(2)
                sums[row : row + _BLOCK, column : column + _BLOCK] += torch.linalg.vecdot(middle, middle.log())
    return sums
