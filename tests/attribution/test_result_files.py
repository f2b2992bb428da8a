"""Results on disk."""

import json
from pathlib import Path

import pytest

from attribution.errors import InvalidArgument
from attribution.result_files import load_results, save_results
from attribution.results import SampleRef
from puzzles import Result, demo_model_path, gen_puzzle


@pytest.fixture(scope="module")
def made() -> list[Result]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    found = [Result.from_puzzle(gen_puzzle(n=3, m=4, n_train=2, seed=seed), tokenizer, seed) for seed in range(2)]
    found[1].outputs = SampleRef("puzzles", 1)
    return [*found, Result(7, "no puzzle", ["K"], [3], [5], [5, 6], outputs=SampleRef("puzzles", "seven"))]


def test_results_come_back_as_they_were(made: list[Result], tmp_path: Path) -> None:
    path = save_results(made, tmp_path / "deep" / "results.json")
    loaded = load_results(path)
    assert loaded == made
    assert isinstance(loaded[0].puzzle, type(made[0].puzzle))
    assert loaded[1].outputs == SampleRef("puzzles", 1)
    assert loaded[0].query_positions == made[0].query_positions


@pytest.mark.parametrize("name", ["labels", "prompt", "puzzle", "outputs"])
def test_damaged_results_are_refused(made: list[Result], tmp_path: Path, name: str) -> None:
    path = save_results(made, tmp_path / "results.json")
    record = json.loads(path.read_text())
    record["results"][0][name] = {"a": 3}
    path.write_text(json.dumps(record))
    with pytest.raises(InvalidArgument, match="damaged file of results"):
        load_results(path)


def test_another_json_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InvalidArgument, match="of kind None and format None; expected 'results'"):
        load_results(tmp_path / "x.json")
