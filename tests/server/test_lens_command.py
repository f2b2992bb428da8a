"""`sightline lens`: a table, a file and a picture."""

import json
from pathlib import Path

import pytest
from matplotlib import image

from attribution.session import LocalSession
from server.commands import lens as command
from tests.models import N_LAYERS, save_tiny
from tests.server.command_line import cells, refusal, sightline

TEXT = "the rest is in a while"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def rows(stdout: str) -> list[list[str]]:
    """The table: its header and its rows."""
    lines = stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    return [cells(line) for line in lines[start : start + N_LAYERS + 2]]


def test_the_table_shows_what_the_lens_says_of_the_last_positions(folder: Path, tmp_path: Path):
    done = sightline("lens", folder, TEXT)
    assert done.exit_code == 0, done.stderr
    header, *table = rows(done.stdout)
    found = LocalSession(str(folder), store=tmp_path / "store").lens(TEXT)
    length = len(found["token_ids"])
    assert len(header) == command.IN_A_PIPE + 2
    assert [int(one.split()[-1]) for one in header[1:]] == [*range(length - command.IN_A_PIPE, length), length - 1]
    assert [row[0] for row in table] == ["0", "1", "2", "final"]
    for row, line in zip(table, found["cells"], strict=True):
        assert [one.split()[-1] for one in row[1:-1]] == [f"{c['top'][0]['probability']:.2f}" for c in line[-8:]]
        assert row[-1] == f"{line[-1]['kl']:.3g}"
    assert f"8 of {length} positions" in done.stdout


def test_layers_and_positions_are_chosen_and_the_file_holds_the_whole_result(folder: Path, tmp_path: Path):
    done = sightline(
        "lens", folder, TEXT, "--layers", "0,-1", "--positions", "1:3, -1", "--top-k", 2, "--output", "a/b.json"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    expected = LocalSession(str(folder), store=tmp_path / "store").lens(
        TEXT, layers=[0, -1], positions=["1:3", -1], top_k=2
    )
    assert found == expected
    assert found["layers"] == [0, N_LAYERS]
    assert found["positions"] == [1, 2, len(found["token_ids"]) - 1]
    assert "result: a/b.json" in done.stdout


def test_a_picture_is_drawn(folder: Path, tmp_path: Path):
    done = sightline("lens", folder, "the rest", "--picture", "deep/lens.png")
    assert done.exit_code == 0, done.stderr
    pixels = image.imread(tmp_path / "deep" / "lens.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.1
    assert "picture: deep/lens.png" in done.stdout


def test_without_a_model_the_embedded_one_is_shown_at_its_puzzle():
    done = sightline("lens")
    assert done.exit_code == 0, done.stderr
    header, *_ = lines = [cells(line) for line in done.stdout.splitlines() if line.startswith(("layer", "final"))]
    assert header[0] == "layer"
    answers = {one.split()[0] for one in lines[-1][1:-1]}
    assert answers <= {"'", r"'\n'"}  # a cell, with its blank before it, or the end of a row
    assert [float(one.split()[-1]) for one in lines[-1][1:-1]] == pytest.approx([1.0] * 8, abs=0.05)


def test_as_many_positions_as_the_terminal_is_wide(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert command._fitting() == 4
    monkeypatch.setenv("COLUMNS", "10")
    assert command._fitting() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["."], "cannot load '.'"),
        (["demo", "--layers", "0,x"], "--layers are numbers and ranges as 0,2,4:7, or all; found '0,x'"),
        (["demo", "--positions", ""], "--positions are numbers and ranges"),
        (["demo", "--layers", "99"], "layers is 99; allowed are 0 to 4"),
        (["demo", "--top-k", "0"], "'--top-k'"),
        (["demo", "--picture", "lens.txt"], "--picture ends in .png or .svg or .pdf; found 'lens.txt'"),
        (["demo", "--output", "."], "--output is a file; '.' is a folder"),
        (["demo", ""], "prompt has no token"),
    ],
)
def test_what_was_typed_wrong_is_told_in_one_line(arguments: list[str], words: str):
    result = sightline("lens", *arguments)
    assert words in refusal(result, 1 if "cannot load" in words else 2)
