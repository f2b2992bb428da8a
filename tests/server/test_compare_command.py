"""`sightline compare`: tables and a file."""

import json
from pathlib import Path

import pytest

from attribution.session import LocalSession
from tests.models import save_tiny
from tests.server.command_line import cells, refusal, sightline

TEXTS, TERMS = ["the rest is in a while", "ä 漢 the other"], ["the", "absent"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(save_tiny(family, root / family)) for family in ("llama", "gpt2")]


def table(stdout: str, header: str, rows: int) -> list[list[str]]:
    lines = stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{header} "))
    return [cells(line) for line in lines[start : start + rows + 1]]


def test_the_tables_show_the_result_and_the_file_holds_it(folders: list[str], tmp_path: Path):
    (tmp_path / "texts.txt").write_text(f"\n{TEXTS[1]}\n  \n", encoding="utf-8")
    arguments = ["--text", TEXTS[0], "--file", "texts.txt", "--term", "the", "--term", "absent", "--json", "a/b.json"]
    done = sightline("compare", *folders, *arguments)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    expected = LocalSession(store=tmp_path / "store").compare(folders, TEXTS, TERMS, top_features=3)
    assert found == expected
    header, *rows = table(done.stdout, "sentence", 3)
    assert header == ["sentence", "bytes", "llama", "gpt2", "note"]
    for row, one in zip(rows, found["sentences"], strict=False):
        values = [one["models"][name]["bits_per_byte"] for name in folders]
        shown = [f"{value:.3f}" + "*" * (value == min(values)) for value in values]
        assert row == [one["text"], str(one["compared_bytes"]), *shown, "from character 1 on"]
    assert rows[2] == ["all 2", *(f"{one['bits_per_byte']:.3f}" for one in found["models"])]
    header, the, absent = table(done.stdout, "term", 2)
    assert header[2:5] == ["llama tokens", "llama log p", "llama rank"]
    own = found["terms"][0]["models"][folders[1]]
    assert the[:2] == ["'the'", "2 of 3"]
    assert the[-3:] == [f"{own[name]:.4g}" for name in ("n_tokens", "logprob", "mean_rank")]
    assert absent == ["'absent'", "not found", *"––––––"]
    assert f"llama ({folders[0]}): 281 tokens, float32, begins with nothing" in done.stdout
    assert "result: a/b.json" in done.stdout


def test_options_reach_the_operation(folders: list[str], tmp_path: Path):
    options = ["--term", "THE", "--ignore-case", "--whole-words", "--features", "0", "--dtype", "float64"]
    done = sightline("compare", folders[0], "--text", TEXTS[1], *options, "--json", "x.json")
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    given = {"case_sensitive": False, "whole_words": True, "top_features": 0, "dtype": "float64"}
    assert found == LocalSession(store=tmp_path / "store").compare(folders[:1], TEXTS[1:], ["THE"], **given)
    assert found["terms"][0]["n_occurrences"] == 1
    assert found["models"][0]["dtype"] == "float64"


def test_a_model_that_fails_is_told_and_the_others_are_shown(folders: list[str], tmp_path: Path):
    broken = save_tiny("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    done = sightline("compare", broken, folders[0], "--text", TEXTS[0])
    assert done.exit_code == 1
    told, last = done.stderr.splitlines()
    assert told.startswith(f"{broken} failed: cannot load")
    assert last == f"sightline: 1 of 2 models failed: {broken}"
    assert table(done.stdout, "sentence", 1)[0] == ["sentence", "bytes", "llama", "note"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo"], "there is no sentence; give --text TEXT or --file FILE"),
        (["demo", "demo", "--text", "a"], "models names 'demo' twice"),
        (["nope", "--text", "a"], "there is no such model, and nothing was loaded: 'nope'"),
        (["demo", "--text", ""], "sentences.0 is empty"),
        (["demo", "--text", "a", "--term", ""], "domain_terms.0 is empty"),
        (["demo", "--text", "a", "--json", "."], "--json is a file; '.' is a folder"),
        (["demo", "--text", "a", "--features", "-1"], "'--features'"),
        (["demo", "--text", "a", "--dtype", "int3"], "dtype is one of"),
        (["demo", "--file", "empty.txt"], "empty.txt has no sentence"),
        ([], "Missing argument"),
    ],
)
def test_what_was_typed_wrong_is_told_in_one_line(arguments: list[str], words: str, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert words in refusal(sightline("compare", *arguments), 2)


@pytest.mark.parametrize(("content", "words"), [(b"\xff\xfe", "is no text in UTF-8"), (None, "No such file")])
def test_a_file_that_cannot_be_read_is_told(content: bytes | None, words: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    assert words in refusal(sightline("compare", "demo", "--file", "x.txt"), 1)
