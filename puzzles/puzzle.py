"""One puzzle: a few examples of an unnamed rule and a test grid to apply it to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzles.errors import PuzzleError
from puzzles.relations import COLOURS, apply_relation, side_neighbor_relations
from puzzles.sampling import draw_inputs

SIDES = range(3, 6)
EXAMPLE_COUNTS = range(1, 21)
PUZZLE_STREAM = 1
"""First word of every seed here; training draws from stream 0, so no ``gen_puzzle`` seed was trained on."""

Grid = tuple[tuple[str, ...], ...]
"""Rows of colour letters."""

GridRanges = tuple[tuple[tuple[int, int], ...], ...]
"""For every row, for every cell, its token range (start, stop), stop excluded."""


@dataclass(frozen=True)
class TokenRanges:
    """Where every cell lies among the tokens of the templated conversation, the assistant's answer included.

    ``examples`` has one (input, output) per example; ``answer`` is the grid in the assistant's turn. A range
    is the shortest run of tokens that covers the cell's letter and the space before it.
    """

    examples: tuple[tuple[GridRanges, GridRanges], ...]
    test_input: GridRanges
    answer: GridRanges


@dataclass(frozen=True)
class Puzzle:
    """A rule's name, its examples as (input, output), the test grid and its right answer.

    ``ranges`` is None until ``gen_prompt`` is given a tokenizer.
    """

    relation: str
    examples: tuple[tuple[Grid, Grid], ...]
    test_input: Grid
    test_output: Grid
    seed: int
    ranges: TokenRanges | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of every grid."""
        return len(self.test_input), len(self.test_input[0])

    @property
    def answers(self) -> list[str]:
        """The answer's colour letters, row by row."""
        return [cell for row in self.test_output for cell in row]


def to_letters(grid: np.ndarray) -> Grid:
    """Colour numbers ``[n, m]`` as rows of letters."""
    return tuple(tuple(COLOURS[colour] for colour in row) for row in grid)


def gen_puzzle(
    relations: str | Sequence[str] = side_neighbor_relations,
    n: int = 5,
    m: int = 5,
    n_train: int = 5,
    seed: int = 42,
) -> Puzzle:
    """The puzzle that belongs to these arguments: ``n`` rows, ``m`` columns, ``n_train`` examples.

    The rule is one of ``relations`` (a single name will do). Every output differs from its input, and any of
    the sixteen rules that also explains the examples gives the same answer.

    Raises: PuzzleError for an unknown relation, or a size, number of examples or seed outside what is
    allowed.
    """
    names = (relations,) if isinstance(relations, str) else tuple(relations)
    unknown = [name for name in names if name not in side_neighbor_relations]
    if unknown or not names:
        found = f"unknown relation {unknown[0]!r}" if unknown else "no relation given"
        raise PuzzleError(f"{found} (allowed: {', '.join(side_neighbor_relations)})")
    _check_integer("n", n, SIDES)
    _check_integer("m", m, SIDES)
    _check_integer("n_train", n_train, EXAMPLE_COUNTS)
    _check_integer("seed", seed, range(2**63))
    rng = np.random.default_rng([PUZZLE_STREAM, seed, n, m, n_train])
    relation = names[rng.integers(len(names))]
    inputs = draw_inputs(rng, np.array([side_neighbor_relations.index(relation)]), n_train, n, m)[0]
    outputs = apply_relation(relation, inputs)
    pairs = tuple((to_letters(given), to_letters(answer)) for given, answer in zip(inputs, outputs, strict=True))
    return Puzzle(relation, pairs[:-1], *pairs[-1], seed=int(seed))


def _check_integer(name: str, value: int, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise PuzzleError(f"{name} must be an integer, not {value!r}")
    if int(value) not in allowed:
        raise PuzzleError(f"{name} is {value} (allowed: {allowed.start} to {allowed.stop - 1})")
