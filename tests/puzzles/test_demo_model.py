"""The shipped model on puzzles and words it was not trained on."""

import os
from collections import defaultdict

import numpy as np
import pytest

from puzzles import demo_model_path
from puzzles.evaluate import (
    WAYS,
    Score,
    answer_greedily,
    format_table,
    held_out,
    load,
    score_cells,
    score_generated,
    write_prompt,
)
from puzzles.layout import CANONICAL
from puzzles.smalltalk import CHATS, FALLBACK, HELLO


@pytest.fixture(scope="module")
def shipped():
    return load(demo_model_path())


def share(scores):
    return np.mean([cell for score in scores for cell in score.right])


def test_the_folder_is_small_readable_and_whole():
    weights = demo_model_path() / "model.safetensors"
    assert weights.stat().st_size < 8e6
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names <= {path.name for path in demo_model_path().iterdir()}
    assert all(os.access(path, os.R_OK) for path in demo_model_path().iterdir())


def test_nearly_all_cells_are_right_for_every_size(shipped):
    by_size = defaultdict(list)
    for score in score_cells(*shipped, list(held_out(1, "inferred")), "inferred"):
        by_size[score.size].append(score)
    assert len(by_size) == 9
    assert share([score for found in by_size.values() for score in found]) >= 0.99
    assert min(share(found) for found in by_size.values()) >= 0.95  # 16 puzzles a size: one may go wrong


@pytest.mark.parametrize(("way", "least"), [("named", 0.99), ("spacing", 0.98), ("one example", 0.97)])
def test_nearly_all_cells_are_right_when_asked_in_other_ways(shipped, way, least):
    assert share(score_cells(*shipped, list(held_out(1, way, [(3, 5), (4, 3)])), way)) >= least


def test_whole_answers_are_right_when_the_model_writes_them_alone(shipped):
    puzzles = list(held_out(1, "inferred", [(5, 4)]))
    scores = score_generated(*shipped, puzzles, "inferred")
    assert np.mean([score.generated for score in scores]) >= 0.8


@pytest.mark.parametrize("greeting", ["hello", "Hello!", "HELLO", "hi", "Hi there!", "hey"])
def test_a_greeting_is_answered_with_who_it_is(shipped, greeting):
    assert answer_greedily(*shipped, [greeting]) == [HELLO]


def test_an_unknown_sentence_is_answered_with_an_example_to_send(shipped):
    asked = ["What is the capital of Portugal?", "My grandmother bakes apricot cakes on Sundays."]
    assert answer_greedily(*shipped, asked) == [FALLBACK, FALLBACK]


def test_the_example_that_the_model_offers_is_a_puzzle_that_it_solves(shipped):
    example = FALLBACK[FALLBACK.index("Input:") :]
    assert answer_greedily(*shipped, [example]) == [" K K K\n Y Y Y\n B R G"]  # paint right


def test_the_rule_is_named_when_asked_for_in_a_second_turn(shipped):
    model, tokenizer = shipped
    right = 0
    puzzles = list(held_out(1, "inferred", [(4, 4)]))
    for puzzle in puzzles:
        answer = CANONICAL.grid(puzzle.test_output)
        first = write_prompt(puzzle, "inferred")
        turns = f"{first}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\nWhich rule?"
        right += answer_greedily(model, tokenizer, [turns], 8) == [puzzle.relation]
    assert right >= 0.9 * len(puzzles)


def test_varied_spacing_is_never_canonical_and_the_same_each_time():
    puzzles = list(held_out(1, "spacing", [(3, 3)]))
    varied = [write_prompt(puzzle, "spacing") for puzzle in puzzles]
    assert varied == [write_prompt(puzzle, "spacing") for puzzle in puzzles]
    assert all(text != write_prompt(puzzle, "inferred") for text, puzzle in zip(varied, puzzles, strict=True))


def test_the_table_counts_cells_and_whole_grids():
    cells = [
        Score("inferred", "shift up", "3x4", (True, True, False, True)),
        Score("inferred", "shift up", "3x4", (True, True, True, True)),
        Score("named", "shift up", "3x4", (False, True, True, True)),
    ]
    generated = [
        Score("inferred", "shift up", "3x4", (), True),
        Score("inferred", "shift up", "3x4", (), False),
    ]
    rows = [row.split(" | ") for row in format_table(cells, generated).splitlines() if row.startswith("| 3x4")]
    # 7 of 8 cells, 3 of 4 cells, nothing asked, nothing asked, 1 of 2 grids, 1 of 2 answers, nothing asked
    assert rows == [["| 3x4", "87.50", "75.00", "–", "–", "50.00", "50.00", "– |"]]
    assert len(WAYS) == 4
    assert {answer for answer, _ in CHATS} >= {HELLO, FALLBACK}
