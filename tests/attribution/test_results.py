"""Results whose prompts become samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attribution.errors import InvalidArgument
from attribution.results import SampleRef, forward_results
from attribution.session import LocalSession
from tests.models import traced


@dataclass
class Row:
    """A result, as far as it is run."""

    index: Any
    prompt: str
    outputs: Any = None


class Recorder:
    """A session that notes what it is to run, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error = error

    def batch_forward(self, **arguments: Any) -> dict[str, Any]:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return {"count": len(arguments["prompts"])}


def test_the_prompts_are_run_under_their_indices_and_each_result_knows_its_sample(tmp_path: Path):
    rows = [Row(5, "hello"), Row("b", "there, you")]
    session = LocalSession(traced("qwen3"), store=tmp_path)
    assert session.forward_results("set", rows, show_progress=False)["stored"] == 2
    assert session.list_cached_samples("set")["sample_ids"] == [5, "b"]
    assert [row.outputs for row in rows] == [SampleRef("set", 5), SampleRef("set", "b")]


def test_templated_prompts_get_no_special_tokens():
    session = Recorder()
    forward_results(session, "set", [Row(1, "x")], prompt_attr="outputs", show_progress=False)
    assert session.calls == [
        {"dataset_id": "set", "prompts": [None], "sample_ids": [1], "add_special_tokens": False, "show_progress": False}
    ]


@pytest.mark.parametrize(
    ("rows", "prompt_attr", "words", "param"),
    [
        ([Row(1, "x"), Row(2, "y"), Row(1, "z")], "prompt", "2 results have the index 1", "results"),
        ([Row(1, "x")], "text", "a Row among the results has no attribute 'text'", "prompt_attr"),
        ([Row(1, "x"), 5], "prompt", "a int among the results has no attribute 'index'", "results"),
    ],
)
def test_results_that_cannot_be_told_apart_or_have_no_prompt_are_refused(
    rows: list[Any], prompt_attr: str, words: str, param: str
):
    session = Recorder()
    with pytest.raises(InvalidArgument, match=words) as error:
        forward_results(session, "set", rows, prompt_attr)
    assert error.value.param == param
    assert not session.calls


def test_a_run_that_fails_leaves_no_result_believing_that_it_was_run():
    rows = [Row(1, "x")]
    with pytest.raises(RuntimeError):
        forward_results(Recorder(RuntimeError()), "set", rows)
    assert rows[0].outputs is None
