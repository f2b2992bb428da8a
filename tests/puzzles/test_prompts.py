"""The text of a puzzle, where its cells lie among the tokens, and answers read back."""

import re

import pytest

from puzzles import (
    COLOURS,
    PuzzleError,
    format_grid,
    gen_prompt,
    gen_puzzle,
    parse_grid,
    side_neighbor_fn_defs,
)
from puzzles.layout import Layout

SIZES = [(3, 3, 1), (3, 5, 2), (5, 3, 3), (5, 5, 5)]


def pairs_of(puzzle):
    """Every grid next to its token ranges."""
    for example, ranges in zip(puzzle.examples, puzzle.ranges.examples, strict=True):
        yield from zip(example, ranges, strict=True)
    yield puzzle.test_input, puzzle.ranges.test_input
    yield puzzle.test_output, puzzle.ranges.answer


def conversation_ids(tokenizer, prompt, answer):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_prompt_is_written_in_canonical_spacing():
    puzzle = gen_puzzle("shift right", 3, 3, 1, seed=0)
    (given, output), test = puzzle.examples[0], puzzle.test_input
    prompt, answers, returned = gen_prompt(puzzle)
    blocks = [
        f"Input:\n{format_grid(given)}",
        f"Output:\n{format_grid(output)}",
        f"Input:\n{format_grid(test)}",
    ]
    assert prompt == "\n\n".join(blocks)
    assert answers == [cell for row in puzzle.test_output for cell in row]
    assert returned.ranges is None


def test_a_definition_comes_first_and_only_that_of_the_puzzles_rule():
    puzzle = gen_puzzle("paint up", 3, 3, 1, seed=0)
    named, inferred = gen_prompt(puzzle, side_neighbor_fn_defs)[0], gen_prompt(puzzle)[0]
    assert named == "Rule: " + side_neighbor_fn_defs["paint up"] + "\n\n" + inferred
    assert named.count("paint") == 1
    assert "paint" not in inferred


def test_a_missing_definition_is_refused():
    with pytest.raises(PuzzleError, match=r"no definition of 'paint up'.*it has erase up"):
        gen_prompt(gen_puzzle("paint up"), {"erase up": "erase up: clears."})


@pytest.mark.parametrize("fn_defs", [None, side_neighbor_fn_defs])
@pytest.mark.parametrize(("n", "m", "n_train"), SIZES)
def test_every_range_decodes_to_its_cell_with_the_shipped_tokenizer(shipped_tokenizer, n, m, n_train, fn_defs):
    prompt, _, puzzle = gen_prompt(gen_puzzle(n=n, m=m, n_train=n_train), fn_defs, shipped_tokenizer)
    ids = conversation_ids(shipped_tokenizer, prompt, format_grid(puzzle.test_output))
    for grid, ranges in pairs_of(puzzle):
        decoded = [[shipped_tokenizer.decode(ids[start:stop]) for start, stop in row] for row in ranges]
        assert decoded == [[f" {cell}" for cell in row] for row in grid]
    assert len(puzzle.ranges.examples) == n_train


@pytest.mark.parametrize(("n", "m", "n_train"), SIZES)
def test_every_range_covers_its_cell_with_a_tokenizer_that_merges_across_cells(byte_level_tokenizer, n, m, n_train):
    prompt, _, puzzle = gen_prompt(gen_puzzle(n=n, m=m, n_train=n_train), None, byte_level_tokenizer)
    ids = conversation_ids(byte_level_tokenizer, prompt, format_grid(puzzle.test_output))
    for grid, ranges in pairs_of(puzzle):
        for row, row_ranges in zip(grid, ranges, strict=True):
            for cell, (start, stop) in zip(row, row_ranges, strict=True):
                assert f" {cell}" in byte_level_tokenizer.decode(ids[start:stop])
                assert f" {cell}" not in byte_level_tokenizer.decode(ids[start : stop - 1])


def test_ranges_of_one_grid_follow_each_other_and_grids_lie_in_reading_order(shipped_tokenizer):
    puzzle = gen_prompt(gen_puzzle(n=4, m=3, n_train=2), None, shipped_tokenizer)[2]
    starts = [start for _, ranges in pairs_of(puzzle) for row in ranges for start, _ in row]
    assert starts == sorted(set(starts))
    assert len(starts) == 6 * 12


def test_a_template_that_trims_the_answer_still_leaves_its_cells_spaced(shipped_tokenizer, byte_level_tokenizer):
    puzzle = gen_puzzle(n=3, m=3, n_train=1)
    byte_level_tokenizer.chat_template = byte_level_tokenizer.chat_template.replace(
        "message['content']", "message['content'] | trim"
    )
    prompt, _, placed = gen_prompt(puzzle, None, byte_level_tokenizer)
    asked = byte_level_tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    text = asked + format_grid(puzzle.test_output)
    ids = byte_level_tokenizer.encode(text, add_special_tokens=False)
    start, stop = placed.ranges.answer[0][0]
    assert byte_level_tokenizer.decode(ids[start:stop]).endswith(f" {puzzle.test_output[0][0]}")


def test_a_tokenizer_without_a_template_or_with_one_that_rewrites_the_prompt_is_refused(byte_level_tokenizer):
    byte_level_tokenizer.chat_template = None
    with pytest.raises(PuzzleError, match="has no chat template"):
        gen_prompt(gen_puzzle(), None, byte_level_tokenizer)
    byte_level_tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(PuzzleError, match="changes the user's message"):
        gen_prompt(gen_puzzle(), None, byte_level_tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(PuzzleError, match="fast tokenizer, with offsets, not Slow"):
        gen_prompt(gen_puzzle(), None, Slow())


def test_an_answer_is_read_back_to_the_grid_it_was_written_from():
    grid = gen_puzzle(n=3, m=5).test_output
    assert parse_grid(format_grid(grid)) == [list(row) for row in grid]
    assert parse_grid("K B\r\n\r\n  G R \n") == [["K", "B"], ["G", "R"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "answer is empty"),
        (" \n\n", "answer is empty"),
        (" K B\n K X", "line 2 of the answer has 'X' .allowed: K B G R Y"),
        (" K B\n KB", "line 2 of the answer has 'KB'"),
        (" K B\n K", "line 2 of the answer has 1 cells, line 1 has 2"),
        ("Hello! I am a small model", "line 1 of the answer has 'Hello!'"),
    ],
)
def test_an_answer_that_is_no_grid_is_refused_with_the_line(text, words):
    with pytest.raises(PuzzleError, match=words):
        parse_grid(text)


def test_varied_spacing_changes_nothing_but_spaces_and_newlines():
    puzzle = gen_puzzle(n=3, m=3, n_train=2)
    varied = Layout("\n", "\n", "\n\n", "\n", "\n\nOutput:\n", first_cell_spaced=False)
    text = varied.prompt(puzzle.examples, puzzle.test_input)
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", gen_prompt(puzzle)[0]) + "Output:"
    first = "".join(puzzle.examples[0][0][0])
    assert text.startswith("Input:\n\n" + " ".join(first) + "\n")
    assert set(COLOURS) >= set(first)
