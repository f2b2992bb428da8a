"""The sixteen rules, by hand."""

import numpy as np
import pytest

from puzzles import PuzzleError, apply_relation, side_neighbor_fn_defs, side_neighbor_relations

# One grid for all: K is 0, and every kind of pair (black or coloured cell, black or coloured source) occurs.
GRID = np.array([[0, 1, 2], [3, 0, 0], [0, 0, 4]])


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        # every row moves one cell to the right, black comes in at the left
        ("shift right", [[0, 0, 1], [0, 3, 0], [0, 0, 0]]),
        ("shift left", [[1, 2, 0], [0, 0, 0], [0, 4, 0]]),
        # every column moves one cell down, black comes in at the top
        ("shift down", [[0, 0, 0], [0, 1, 2], [3, 0, 0]]),
        ("shift up", [[3, 0, 0], [0, 0, 4], [0, 0, 0]]),
        # only black cells change: (1, 1) has 3 at its left, (1, 2) has black there
        ("paint right", [[0, 1, 2], [3, 3, 0], [0, 0, 4]]),
        ("paint left", [[1, 1, 2], [3, 0, 0], [0, 4, 4]]),
        ("paint down", [[0, 1, 2], [3, 1, 2], [3, 0, 4]]),
        ("paint up", [[3, 1, 2], [3, 0, 4], [0, 0, 4]]),
        # a coloured source wins: (0, 2) takes the 1 at its left
        ("cover right", [[0, 1, 1], [3, 3, 0], [0, 0, 4]]),
        ("cover left", [[1, 2, 2], [3, 0, 0], [0, 4, 4]]),
        ("cover down", [[0, 1, 2], [3, 1, 2], [3, 0, 4]]),
        ("cover up", [[3, 1, 2], [3, 0, 4], [0, 0, 4]]),
        # a coloured source clears: (0, 2) has 1 at its left
        ("erase right", [[0, 1, 0], [3, 0, 0], [0, 0, 4]]),
        ("erase left", [[0, 0, 2], [3, 0, 0], [0, 0, 4]]),
        ("erase down", [[0, 1, 2], [3, 0, 0], [0, 0, 4]]),
        ("erase up", [[0, 1, 2], [3, 0, 0], [0, 0, 4]]),
    ],
)
def test_each_rule_gives_the_grid_worked_out_by_hand(relation, expected):
    assert apply_relation(relation, GRID).tolist() == expected


def test_a_vertical_erase_clears_below_or_above_a_coloured_cell():
    column = np.array([[1], [2], [0]])
    assert apply_relation("erase down", column).tolist() == [[1], [0], [0]]
    assert apply_relation("erase up", column).tolist() == [[0], [2], [0]]


def test_a_vertical_cover_and_paint_differ_where_both_cells_are_coloured():
    column = np.array([[1], [2], [0]])
    assert apply_relation("cover down", column).tolist() == [[1], [1], [2]]
    assert apply_relation("paint down", column).tolist() == [[1], [2], [2]]


def test_a_rule_acts_on_every_grid_of_a_stack_by_itself():
    stack = np.stack([GRID, GRID.T])
    both = apply_relation("shift right", stack)
    assert both[0].tolist() == apply_relation("shift right", GRID).tolist()
    assert both[1].tolist() == apply_relation("shift right", GRID.T).tolist()


def test_there_are_sixteen_rules_and_each_has_one_plain_sentence_that_starts_with_its_name():
    assert len(set(side_neighbor_relations)) == 16
    assert tuple(side_neighbor_fn_defs) == tuple(side_neighbor_relations)
    for relation, sentence in side_neighbor_fn_defs.items():
        assert sentence.startswith(f"{relation}: ")
        assert sentence.isascii()
        assert sentence.endswith(".")
        assert "\n" not in sentence
    assert len(set(side_neighbor_fn_defs.values())) == 16


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(PuzzleError, match=r"'paint sideways'.*allowed.*paint right"):
        apply_relation("paint sideways", GRID)
