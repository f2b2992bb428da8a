"""Descriptions: Neuronpedia's exports and plain lines; what is broken costs its line and is reported."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from attribution.errors import InvalidArgument
from attribution.features.descriptions import PROBLEMS_KEPT, Descriptions, read_descriptions


def row(index: Any, text: Any = "colours", model: str = "gpt2-small", layer: str = "5-res-jb", **more: Any) -> str:
    said = {"modelId": model, "layer": layer, "index": index, "description": text}
    return json.dumps(said | {"explanationModelName": "gpt-x", "typeName": "oai_token-act-pair"} | more)


def zipped(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_an_export_is_read_from_its_folder_in_the_order_of_its_batches(tmp_path: Path):
    folder = tmp_path / "explanations"
    zipped(folder / "batch-10.jsonl.gz", row("7", "third"))
    zipped(folder / "batch-2.jsonl.gz", row("7", "second"), row("12", "twelve"))
    zipped(folder / "batch-0.jsonl.gz", row("7", " first "))
    for path in (tmp_path, folder):
        found = read_descriptions(path, 20)
        assert found.of(7) == "first"
        assert [one.text for one in found.all_of(7)] == ["first", "second", "third"]
        assert (found.all_of(7)[0].explainer, found.all_of(7)[0].method) == ("gpt-x", "oai_token-act-pair")
        assert (found.of(12), found.of(13), found.all_of(13), len(found)) == ("twelve", None, [], 2)
        assert (found.problems, found.n_problems) == ((), 0)


@pytest.mark.parametrize("name", ["one.jsonl", "one.jsonl.gz", "one.txt"])
def test_a_file_is_read_zipped_or_not_whatever_its_name(tmp_path: Path, name: str):
    lines = '{"index": 3, "description": "größe", "score": 0.9}\n\n{"index": "4", "description": "漢"}\r\n'
    (tmp_path / name).write_text(lines, encoding="utf-8")
    zipped(tmp_path / "zipped", lines)
    for path in (tmp_path / name, tmp_path / "zipped"):
        found = read_descriptions(path, 5)
        assert (found.of(3), found.of(4), found.n_problems) == ("größe", "漢", 0)
        assert found.all_of(3)[0].explainer is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "an object is expected"),
        ('{"description": "x"}', "its index is None"),
        ('{"index": "x", "description": "x"}', "its index is 'x'"),
        ('{"index": -1, "description": "x"}', "its index is -1"),
        ('{"index": 1.0, "description": "x"}', "its index is 1.0"),
        ('{"index": true, "description": "x"}', "its index is True"),
        ('{"index": 10, "description": "x"}', "the features are 0 to 9"),
        ('{"index": "10", "description": "x"}', "the features are 0 to 9"),
        ('{"index": 1}', "its description is None"),
        ('{"index": 1, "description": "  "}', "a text is expected"),
        ('{"index": 1, "description": 5}', "a text is expected"),
        ("[" * 100_000, "not JSON"),
        ('{"index": 1, "description": "' + "x" * (1 << 20) + '"}', "longer than"),
    ],
    ids=range(14),
)
def test_a_broken_line_costs_that_line_and_is_reported_with_its_number(tmp_path: Path, line: str, said: str):
    path = tmp_path / "said.jsonl"
    path.write_text("\n".join(['{"index": 1, "description": "one"}', line, '{"index": 9, "description": "nine"}']))
    found = read_descriptions(path, 10)
    assert (found.of(1), found.of(9), len(found)) == ("one", "nine", 2)
    assert found.n_problems == 1
    assert found.problems[0].startswith("said.jsonl, line 2: ")
    assert said in found.problems[0]


def test_bytes_that_are_no_text_are_a_problem_of_their_line(tmp_path: Path):
    (tmp_path / "said.jsonl").write_bytes(b'{"index": 1, "description": "one"}\n\xff\xfe{}\n')
    found = read_descriptions(tmp_path / "said.jsonl")
    assert (len(found), found.n_problems) == (1, 1)


def test_of_many_problems_some_are_told_and_all_are_counted(tmp_path: Path):
    (tmp_path / "said.jsonl").write_text('{"index": 1, "description": "one"}\n' + "broken\n" * 1000)
    found = read_descriptions(tmp_path / "said.jsonl")
    assert (len(found.problems), found.n_problems) == (PROBLEMS_KEPT, 1000)


def test_rows_of_another_model_or_source_are_left_out_when_one_is_named(tmp_path: Path):
    lines = [row("1"), row("1", "other layer", layer="6-res-jb"), row("2", "other model", model="gemma")]
    path = zipped(tmp_path / "batch-0.jsonl.gz", *lines, '{"index": 3, "description": "of none"}')
    found = read_descriptions(path, source_id="gpt2-small/5-res-jb")
    assert (found.of(1), found.of(2), found.of(3)) == ("colours", None, "of none")
    assert found.source == "gpt2-small/5-res-jb"
    assert found.n_problems == 2
    assert "its layer is '6-res-jb', and '5-res-jb' was asked for" in found.problems[0]
    assert "its modelId is 'gemma'" in found.problems[1]
    with pytest.raises(InvalidArgument, match="2 sources") as raised:  # a source id that two models have
        read_descriptions(path, source_id="5-res-jb")
    assert raised.value.param == "source_id"


def test_rows_of_several_sources_are_never_mixed(tmp_path: Path):
    path = zipped(tmp_path / "batch-0.jsonl.gz", row("1"), row("1", layer="6-res-jb"))
    with pytest.raises(InvalidArgument, match=r"gpt2-small/5-res-jb, gpt2-small/6-res-jb.*source_id"):
        read_descriptions(path)


def test_what_has_nothing_to_read_is_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("broken\nbroken\n")
    (tmp_path / "folder").mkdir()
    whole = gzip.compress(row("1").encode() * 100)
    (tmp_path / "short.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "wrong.jsonl.gz").write_bytes(whole[:20] + b"\0" * 20 + whole[40:])
    wanted = {
        "absent": "there are no descriptions at",
        "folder": "has no file of descriptions",
        "empty.jsonl": "no description that can be read",
        "broken.jsonl": r"2 lines were left out; broken.jsonl, line 1: it is not JSON",
        "short.jsonl.gz": "cannot be read: .*get the file anew",
        "wrong.jsonl.gz": "cannot be read: .*get the file anew",
    }
    for name, said in wanted.items():
        with pytest.raises(InvalidArgument, match=said) as raised:
            read_descriptions(tmp_path / name)
        assert raised.value.param == "descriptions"
    zipped(tmp_path / "x.gz", row("1"))
    with pytest.raises(InvalidArgument, match="no description that can be read"):
        read_descriptions(tmp_path / "x.gz", source_id="another")


def test_without_descriptions_no_feature_has_one():
    assert (Descriptions().of(0), Descriptions().all_of(0), len(Descriptions())) == (None, [], 0)


def test_features_are_found_by_words_of_any_of_their_descriptions(tmp_path: Path):
    lines = [row(9, "A Blue cell"), row(2, "after a red cell"), row(9, "the reddest CELL"), row(4, "nothing")]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    found = read_descriptions(tmp_path / "said.jsonl")
    assert list(found.search(["cell"])) == [(2, "after a red cell"), (9, "A Blue cell")]
    assert list(found.search(["cell", "red"])) == [(2, "after a red cell"), (9, "the reddest CELL")]
    assert list(found.search(["blue", "red"])) == []
