"""What clamping a feature does to the answers of the embedded model, held against the rule itself.

1. A feature that fires on cells of a colour is clamped at one cell of the test grid, which has another colour.
2. The rule says what the answer would be if that cell had the feature's colour: some cells should change, others not.
3. Both shares are counted, over held-out puzzles; every cell is predicted after the right ones before it.
4. The value is a multiple of what the feature has where it fires, chosen on other puzzles than those it is measured on;
   beside it stands a feature drawn at random, clamped at the same value at the same cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.activations import padded
from attribution.features.autoencoder import Autoencoder
from attribution.features.measuring import Piece
from attribution.features.places import place_stream
from attribution.model.capture import forward
from attribution.model.edits import Edit, changes_of, targets_of
from attribution.model.traced import TracedModel
from puzzles import COLOURS, apply_relation, gen_puzzle, side_neighbor_relations
from puzzles.corpus import Encode
from puzzles.labels import Labelled, label_puzzle
from puzzles.puzzle import Puzzle, to_letters

CHOSEN, MEASURED = 7_000_000, 8_000_000
"""Seeds of the puzzles on which values are chosen, and of those on which clamps are measured."""
EACH = 3
"""Puzzles of each rule."""
MULTIPLES = (2, 3, 4)


@dataclass(frozen=True)
class Trial:
    """A puzzle, the cell of its test grid that is clamped, and what the answer would be with another colour there."""

    puzzle: Puzzle
    text: Labelled
    position: int
    expected: list[str]


@dataclass(frozen=True)
class Effect:
    """What a clamp does: of the cells that should change the share that becomes what it should, and of the others the
    share that stays; with how many there are of each.
    """

    changed: float
    n_changed: int
    stayed: float
    n_stayed: int


@dataclass(frozen=True)
class Clamp:
    """A feature of a colour, the value that it is clamped at, what that does, and what a random feature does."""

    index: int
    colour: str
    value: float
    effect: Effect
    random: int
    random_effect: Effect


def trials(encode: Encode, colour: str, seed: int, each: int = EACH) -> list[Trial]:
    """`each` puzzles of every rule, with one test cell of another colour whose change would change the answer."""
    draw, found = np.random.default_rng([seed, COLOURS.index(colour)]), []
    for relation in side_neighbor_relations:
        for number in range(each):
            puzzle = gen_puzzle(relation, 4, 4, 4, seed + number)
            text = label_puzzle(puzzle, encode)
            inputs = [place for place, one in enumerate(text.labels) if one["part"] == "test input" and "colour" in one]
            options = []
            for place, position in enumerate(inputs):
                expected = answer_with(puzzle, *divmod(place, 4), colour)
                if puzzle.test_input[place // 4][place % 4] != colour and expected != puzzle.answers:
                    options.append(Trial(puzzle, text, position, expected))
            if options:
                found.append(options[int(draw.integers(len(options)))])
    return found


def answer_with(puzzle: Puzzle, row: int, column: int, colour: str) -> list[str]:
    """The right answer of a puzzle if one cell of its test grid had this colour."""
    grid = np.array([[COLOURS.index(cell) for cell in cells] for cells in puzzle.test_input])
    grid[row, column] = COLOURS.index(colour)
    return [cell for cells in to_letters(apply_relation(puzzle.relation, grid)) for cell in cells]


def clamped(autoencoder: Autoencoder, index: int, value: float):
    """x + (value − f(x)) · direction: the feature at this value, and what is not reconstructed kept."""
    direction = autoencoder.directions([index])[0]

    def function(rows: Tensor) -> Tensor:
        return rows + (value - autoencoder.encode(rows)[:, index])[:, None] * direction

    return function


def answers(
    model: TracedModel, encode: Encode, piece: Piece, tried: Sequence[Trial], index: int, value: float | None
) -> list[list[str]]:
    """The colour predicted for each answer cell of each trial, with the feature clamped; None clamps nothing."""
    (target,) = targets_of(model, place_stream(model, piece.writes), point=piece.writes.point)
    colours = torch.tensor([encode(f" {colour}")[0] for colour in COLOURS])
    found = []
    for first in range(0, len(tried), 12):
        group = tried[first : first + 12]
        batch = padded(model, [one.text.token_ids for one in group])
        batch = type(batch)(batch.ids, batch.mask, batch.positions, None, batch.ids.shape[1])
        edits = []
        for row, one in enumerate(group):
            column = one.position - len(one.text.token_ids)
            if value is not None:
                edits.append(
                    Edit(target, row, clamped(piece.autoencoder, index, value), columns=range(column, column + 1))
                )
        logits, _ = forward(model, batch, [], changes_of(model, edits))
        for row, one in enumerate(group):
            cells = torch.tensor(one.text.answer) - 1 - len(one.text.token_ids)
            found.append([COLOURS[best] for best in logits[row, cells][:, colours].argmax(-1).tolist()])
    return found


def effect(tried: Sequence[Trial], before: list[list[str]], after: list[list[str]]) -> Effect:
    """The shares, over all cells that the model got right without the clamp."""
    changed, stayed = [], []
    for trial, old, new in zip(tried, before, after, strict=True):
        for right, was, expected, now in zip(trial.puzzle.answers, old, trial.expected, new, strict=True):
            if was == right:
                (changed if expected != right else stayed).append(now == expected)
    return Effect(float(np.mean(changed)), len(changed), float(np.mean(stayed)), len(stayed))


def measure_clamp(
    model: TracedModel, encode: Encode, piece: Piece, index: int, colour: str, typical: float, seed: int = 0
) -> Clamp:
    """What clamping a feature of a colour does, at the best of some multiples of its typical activation."""

    def found(tried: Sequence[Trial], clamped_index: int, value: float) -> Effect:
        before = answers(model, encode, piece, tried, clamped_index, None)
        return effect(tried, before, answers(model, encode, piece, tried, clamped_index, value))

    chosen, measured = trials(encode, colour, CHOSEN), trials(encode, colour, MEASURED)
    effects = {multiple * typical: found(chosen, index, multiple * typical) for multiple in MULTIPLES}
    value = round(max(effects, key=lambda one: effects[one].changed + effects[one].stayed))
    random = int(np.random.default_rng([seed, index]).integers(piece.autoencoder.n_features))
    return Clamp(index, colour, value, found(measured, index, value), random, found(measured, random, value))
