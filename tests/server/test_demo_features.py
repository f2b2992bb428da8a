"""`sightline demo --features`, as a user runs it: a real server in a process of its own, the SDK and the client."""

import re
from pathlib import Path

import pytest

from puzzles import gen_puzzle
from server.commands import demo_features
from tests.server.command_line import sightline


def test_the_demo_names_features_of_an_answer_and_changes_the_cell_that_it_should_by_clamping_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_features.run(tmp_path)
    said = capsys.readouterr().out
    colour = demo_features.colour_feature()
    # the features of colours are on where the answer has these colours
    assert re.search(rf"' {colour.letter}' +{colour.index} at \d+: on a \w+ \({colour.letter}\) cell", said)
    # piped, a feature has its description on one line, whatever its length
    assert all(line.count("(F1") == len(re.findall(r"\(F1 [^)]*\)", line)) for line in said.splitlines())
    assert "1 of 16 cells changed by the clamp; 16 of 16 are now what the rule says" in said
    assert '"operation": "clamp"' in said
    assert f'"index": {colour.index}' in said
    assert '"active_positions": 0' in said


def test_what_the_rule_gives_with_another_cell_is_right_by_hand():
    puzzle = gen_puzzle(**demo_features.PUZZLE)
    row, column = demo_features.CELL
    expected = [list(cells) for cells in puzzle.test_output]
    expected[row][column + 1] = "G"  # shift right: the neighbour takes the cell's colour
    assert [list(cells) for cells in demo_features.with_colour(puzzle, "G")] == expected
    assert puzzle.test_input[row][column] != "G"


def test_the_command_has_the_option():
    assert "--features" in sightline("demo", "--help").stdout
