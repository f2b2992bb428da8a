"""Puzzles: pure, unambiguous, and refused with a reason when asked for wrongly."""

import subprocess
import sys

import numpy as np
import pytest

from puzzles import COLOURS, PuzzleError, apply_relation, gen_puzzle, side_neighbor_relations
from puzzles.sampling import acceptable


def numbers(grid):
    return np.array([[COLOURS.index(cell) for cell in row] for row in grid])


MANY = [gen_puzzle(n=3 + seed % 3, m=3 + seed // 3 % 3, n_train=1 + seed % 5, seed=seed) for seed in range(120)]


def test_the_same_arguments_give_the_same_puzzle_and_another_seed_another():
    assert gen_puzzle(seed=7) == gen_puzzle(seed=7)
    assert gen_puzzle(seed=7) != gen_puzzle(seed=8)
    assert gen_puzzle(seed=7).test_input != gen_puzzle(n_train=4, seed=7).test_input


def test_the_global_random_state_neither_matters_nor_changes():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = gen_puzzle(seed=3)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert gen_puzzle(seed=3) == first


def test_a_puzzle_has_the_size_and_the_number_of_examples_asked_for():
    puzzle = gen_puzzle(n=3, m=5, n_train=2, seed=0)
    grids = [grid for pair in puzzle.examples for grid in pair] + [puzzle.test_input, puzzle.test_output]
    assert len(puzzle.examples) == 2
    assert {(len(grid), len(row)) for grid in grids for row in grid} == {(3, 5)}
    assert puzzle.shape == (3, 5)


def test_all_outputs_follow_from_the_rule_and_differ_from_their_inputs():
    for puzzle in MANY:
        for given, answer in (*puzzle.examples, (puzzle.test_input, puzzle.test_output)):
            assert apply_relation(puzzle.relation, numbers(given)).tolist() == numbers(answer).tolist()
            assert given != answer


def test_every_rule_that_explains_the_examples_gives_the_same_answer():
    for puzzle in MANY:
        for relation in side_neighbor_relations:
            if all(
                apply_relation(relation, numbers(given)).tolist() == numbers(answer).tolist()
                for given, answer in puzzle.examples
            ):
                answer = apply_relation(relation, numbers(puzzle.test_input))
                assert answer.tolist() == numbers(puzzle.test_output).tolist()


def test_an_ambiguous_puzzle_is_rejected():
    # One coloured cell whose right neighbour is black: shift leaves black behind, paint and cover both fill.
    # In the test grid two colours meet, so paint keeps the second and cover overwrites it.
    example = [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    test = [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    paint, shift = (np.array([side_neighbor_relations.index(name)]) for name in ("paint right", "shift right"))
    inputs = np.array([[example, test]])
    assert not acceptable(inputs, paint)[0]
    assert acceptable(inputs, shift)[0]
    assert acceptable(np.array([[test, test]]), paint)[0]


def test_a_puzzle_that_changes_nothing_is_rejected():
    still = [[0, 0, 1], [0, 0, 0], [0, 0, 0]]  # painting right leaves the last column as it is
    moving = [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    paint = np.array([side_neighbor_relations.index("paint right")])
    assert not acceptable(np.array([[still, moving, moving]]), paint)[0]
    assert not acceptable(np.array([[moving, moving, still]]), paint)[0]
    assert acceptable(np.array([[moving, moving, moving]]), paint)[0]


def test_the_rule_is_one_of_those_asked_for_and_all_of_them_occur():
    names = ("paint up", "erase left", "shift down")
    assert {gen_puzzle(names, 3, 3, 2, seed).relation for seed in range(40)} == set(names)
    assert gen_puzzle("cover left", seed=1).relation == "cover left"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"relations": ["paint sideways"]}, "unknown relation 'paint sideways'.*allowed: shift right"),
        ({"relations": []}, "no relation given"),
        ({"n": 2}, "n is 2 .allowed: 3 to 5"),
        ({"m": 6}, "m is 6 .allowed: 3 to 5"),
        ({"n_train": 0}, "n_train is 0 .allowed: 1 to 20"),
        ({"n": 3.0}, "n must be an integer, not 3.0"),
        ({"m": True}, "m must be an integer, not True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_found_and_what_is_allowed(arguments, words):
    with pytest.raises(PuzzleError, match=words):
        gen_puzzle(**arguments)


def test_the_package_imports_neither_torch_nor_transformers_nor_the_other_packages():
    code = (
        "import puzzles, sys; heavy = {'torch', 'transformers', 'tokenizers', 'attribution', 'server'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
