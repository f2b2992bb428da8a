"""`sightline attribute`: prompts of a file on a tiny model, and what it refuses. The puzzles are of the slow tests."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import image

from attribution import Graph, LocalSession
from attribution.faithful import ranked_heads
from tests.models import N_HEADS, N_LAYERS, save_tiny
from tests.server.command_line import cells, refusal, sightline

PROMPTS = [("the rest is in", " a"), ("one and two", " and"), ("a while", " the"), ("in the", " one")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("model"))


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_prompts_of_a_file_become_a_graph_with_its_faithfulness(folder: Path, tmp_path: Path):
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in PROMPTS]
    prompts = written(tmp_path / "p.jsonl", *lines, "")
    done = sightline("attribute", folder, "--prompts", prompts, "--heads", 4, "--draws", 2, "--out", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    assert f"4 of {N_LAYERS * N_HEADS} heads, found by 3 samples, measured on 1 others" in done.stdout
    record = json.loads((tmp_path / "o" / "faithfulness.json").read_text())
    measured, curves = record["faithfulness"], record["curves"]
    assert f"kept {measured['kept']:.1%}" in done.stdout
    assert len(measured["heads"]) == 4
    assert curves["graph"][curves["sizes"].index(4)] == pytest.approx(measured["kept"], abs=1e-5)
    table = [cells(line) for line in done.stdout.splitlines() if line.strip()[:1].isdigit() and "%" in line]
    assert [int(row[0]) for row in table if row[0].isdigit()] == curves["sizes"]
    graph = Graph.load(tmp_path / "o" / "graph.json", LocalSession(str(folder), store=tmp_path / "store"))
    assert {tuple(head) for head in measured["heads"]} == set(ranked_heads(graph))
    for name in ("graph.png", "faithfulness.png"):
        assert image.imread(tmp_path / "o" / name).std() > 0


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "answer": " the"}'], "has 1 prompts; at least three"),
        (['{"prompt": "a", "answer": " the"}', "no json"], "line 2"),
        (['{"prompt": "a"}'], "line 1: 'answer'"),
        (['{"prompt": "a", "answer": ""}'], "line 1: .* by tokens of its own"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused_by_its_line(
    folder: Path, tmp_path: Path, lines: list[str], words: str
):
    done = sightline("attribute", folder, "--prompts", written(tmp_path / "p.jsonl", *lines), "--out", tmp_path / "o")
    assert re.search(words, refusal(done, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rule", "paint sideways"), "paint right"),
        (("--size", "3"), "3x3"),
    ],
)
def test_what_is_typed_wrong_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str):
    done = sightline("attribute", *arguments, "--out", tmp_path / "o")
    assert words in refusal(done, 2)
