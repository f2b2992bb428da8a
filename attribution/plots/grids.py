"""Attention over the grids of a puzzle: cells as cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.plots.style import OTHERS, Picture, numbers
from puzzles.puzzle import Grid, GridRanges, Puzzle

_FILL = {"K": "#333333", "B": "#3B6FD4", "G": "#3FA34D", "R": "#D1423A", "Y": "#F2CF45"}
_LETTER = {"K": "white", "B": "white", "G": "black", "R": "white", "Y": "black"}
_FRAME = "#E040FB"  # no colour of a cell
_CELL = 0.42  # inches
_RADIUS = 0.38  # of the largest disc, in cells: it leaves the letter in the corner free
_SEEN = 0.003  # of the largest disc: what is smaller would be a dot


@dataclass(frozen=True)
class _Panel:
    """One grid and where its cells lie among the tokens."""

    name: str
    grid: Grid
    ranges: GridRanges


def grid_attention(
    puzzle: Puzzle,
    attention: Float[Tensor, "*query key"],
    queries: Sequence[int],
    title: str,
    *,
    what: str = "attention",
) -> Figure:
    """What some queries look at, as discs on the cells of the puzzle: the area of a disc is the mass on its cell.

    The mean over the queries. Cells of the answer that none of them has seen yet are left grey, the cells that they
    predict are framed. Each grid's share of all mass stands above it, and what lies outside of the grids below.

    Args:
        puzzle: with its token ranges, as `Result.puzzle` has them.
        attention: over all tokens of the conversation, one row per query (for one query a row alone will do). An
            attribution will do as well, when it has no sign.
        queries: the token positions of the rows.
        what: what the mass is, for the labels.

    Raises:
        InvalidArgument: the puzzle has no ranges; a mass is negative or not finite, or there is none at all.
        ShapeMismatch: rows and queries do not fit, or the tokens do not reach to the end of the answer.
    """
    mass = _mass(attention, queries)
    panels = _panels(puzzle)
    last = max(stop for panel in panels for row in panel.ranges for _, stop in row)
    if last > len(mass):
        raise checks.mismatch("attention", f"{len(mass)} keys", f"at least {last}: the puzzle's answer ends there")
    masses = [_cells(mass, panel.ranges) for panel in panels]
    largest = max(float(one.max()) for one in masses)
    rows, columns = puzzle.shape
    across = -(-len(panels) // 4)  # pairs of grids, in two rows that are read one after the other
    figure = Picture(
        figsize=(across * 2 * (columns + 0.9) * _CELL, 2 * (rows + 1.3) * _CELL + 0.9), layout="constrained"
    )
    places = figure.subplots(2, across * 2, squeeze=False)
    for axes in places.flat:
        axes.axis("off")
    order = [cast(Axes, one) for one in places.flat][: len(panels)]
    for axes, panel, cells in zip(order, panels, masses, strict=True):
        _draw(axes, panel, cells / (largest or 1), queries)
        axes.set_title(f"{panel.name}\n{cells.sum() / mass.sum():.0%}", fontsize=9)
    outside = 1 - sum(float(one.sum()) for one in masses) / mass.sum()
    figure.suptitle(title)
    figure.supxlabel(
        f"share of the {what} above each grid; outside of the grids: {outside:.0%}. Largest disc: "
        f"{largest / mass.sum():.1%}. Framed: the cells to predict",
        fontsize=9,
    )
    return figure


def _mass(attention: Tensor, queries: Sequence[int]) -> np.ndarray:
    """The mean over the queries, one entry per key."""
    values = np.atleast_2d(numbers("attention", attention))
    if values.ndim != 2 or len(values) != len(queries):
        raise checks.mismatch("attention", f"the shape {list(attention.shape)}", f"[{len(queries)}, keys], as queries")
    for query in queries:
        checks.in_range("queries", query, values.shape[1], "the keys")
    if (values < 0).any() or not values.any():
        raise InvalidArgument(
            "attention has negative entries or no mass at all; of a signed attribution draw the positive part and the "
            "negative part by themselves",
            param="attention",
        )
    return values.mean(0)


def _panels(puzzle: Puzzle) -> list[_Panel]:
    if puzzle.ranges is None:
        raise InvalidArgument(
            "the puzzle has no token ranges; take that of Result.from_puzzle, or give gen_prompt a tokenizer",
            param="puzzle",
        )
    found = []
    for number, (grids, ranges) in enumerate(zip(puzzle.examples, puzzle.ranges.examples, strict=True), start=1):
        found += [_Panel(f"input {number}", grids[0], ranges[0]), _Panel(f"output {number}", grids[1], ranges[1])]
    test = _Panel("test input", puzzle.test_input, puzzle.ranges.test_input)
    return [*found, test, _Panel("answer", puzzle.test_output, puzzle.ranges.answer)]


def _cells(mass: np.ndarray, ranges: GridRanges) -> np.ndarray:
    """The mass on every cell of a grid."""
    return np.array([[mass[start:stop].sum() for start, stop in row] for row in ranges])


def _draw(axes: Axes, panel: _Panel, sizes: np.ndarray, queries: Sequence[int]) -> None:
    """One grid with its discs; `sizes` are 1 for the largest of the picture."""
    rows, columns = sizes.shape
    known = max(queries)
    for (row, column), size in np.ndenumerate(sizes):
        letter, (start, _) = panel.grid[row][column], panel.ranges[row][column]
        seen = panel.name != "answer" or start <= known
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor=_FILL[letter] if seen else "#EEEEEE", edgecolor="white")
        )
        colour = _LETTER[letter] if seen else OTHERS
        axes.text(column + 0.06, row + 0.06, letter, color=colour, ha="left", va="top", fontsize=6)
        if size > _SEEN:
            axes.add_patch(Circle((column + 0.5, row + 0.5), _RADIUS * size**0.5, facecolor="white", edgecolor="black"))
    for row, column in np.ndindex(rows, columns):
        if panel.name == "answer" and panel.ranges[row][column][0] - 1 in queries:
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=_FRAME, linewidth=2.5))
    axes.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05), aspect="equal")
