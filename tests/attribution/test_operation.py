"""Operations: what their declaration gives, which arguments they take, and how they refuse."""

import inspect
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch

from attribution.arguments import DatasetId, Index, Positions, SampleId, TensorArg, TensorList
from attribution.errors import InvalidArgument
from attribution.operation import Operation, Progress, Steps, operation
from attribution.operations import OPERATIONS
from attribution.progress import drive, shown


@operation()
def short(
    session: Any,
    dataset_id: DatasetId,
    sample_id: SampleId = 0,
    layer: Index = 1,
    pos_ids: Positions | None = None,
    grad: TensorArg | None = None,
    grads: TensorList | None = None,
    rule: Literal["a", "b"] = "a",
    heads: list[tuple[Index, Index]] | None = None,
) -> dict[str, Any]:
    """Say what came."""
    return {name: value for name, value in locals().items() if name != "session"}


@operation(safe=False)
def long(session: Any, count: int = 3, show_progress: bool = True) -> Steps[int]:
    """Count."""
    for done in range(count):
        yield Progress(done + 1, count)
    return count * 10


class Here:
    """What has operations."""

    def run(self, one: Operation[..., Any], arguments: dict[str, Any]) -> Any:
        return drive(one.start(self, one.validate(arguments)), one.name, show=False)  # type: ignore[arg-type]

    short = short
    long = long


def given(**arguments: Any) -> Any:
    return short.validate({"dataset_id": "x"} | arguments)


def test_a_declaration_gives_name_text_safety_and_length():
    assert (short.name, short.__doc__, short.safe, short.long) == ("short", "Say what came.", True, False)
    assert (long.name, long.safe, long.long) == ("long", False, True)
    assert Here.short is short


def test_a_method_looks_like_the_function_without_the_session():
    method = Here().short
    assert list(inspect.signature(method).parameters)[:2] == ["dataset_id", "sample_id"]
    assert (method.__name__, method.__doc__) == ("short", "Say what came.")


def test_a_method_runs_with_positions_names_and_defaults():
    assert Here().short("set", 4, pos_ids=range(3))["pos_ids"] == [0, 1, 2]
    assert Here().long(2) == 20


def test_a_call_that_does_not_fit_the_signature_is_pythons_own_error():
    with pytest.raises(TypeError, match="nonsense"):
        Here().short("x", nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="dataset_id"):
        Here().short()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("layer", np.int64(3), 3),
        ("layer", torch.tensor(3), 3),
        ("sample_id", "7", 7),
        ("sample_id", "07", "07"),
        ("sample_id", "a.b-c_1", "a.b-c_1"),
        ("sample_id", np.int32(2), 2),
        ("pos_ids", np.arange(3), [0, 1, 2]),
        ("pos_ids", torch.tensor([2, 1]), [2, 1]),
        ("pos_ids", (5,), [5]),
        ("pos_ids", [np.int64(1), 2], [1, 2]),
        ("heads", [(1, 2), [3, 4]], [(1, 2), (3, 4)]),
    ],
)
def test_what_notebooks_pass_is_taken(name: str, value: Any, taken: Any):
    found = given(**{name: value})[name]
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layer", True, "layer: an integer is expected; found True"),
        ("layer", 2.0, "layer: an integer is expected; found 2.0"),
        ("layer", "2", "layer: an integer is expected; found '2'"),
        ("layer", torch.tensor([1]), r"layer: an integer is expected; found a tensor of shape \[1\]"),
        ("layer", torch.tensor(1.0), "layer: an integer is expected"),
        ("sample_id", -1, "sample_id: an integer of at least 0 or a name is expected; found -1"),
        ("sample_id", "a/b", "sample_id: a name has 1 to 128 letters"),
        ("sample_id", "", "sample_id: a name has"),
        ("dataset_id", "..", "dataset_id: a name has"),
        ("dataset_id", "a" * 129, "dataset_id: a name has"),
        ("dataset_id", 5, "dataset_id: a name has"),
        ("pos_ids", [0, 1.5], "pos_ids.1: an integer is expected; found 1.5"),
        ("pos_ids", torch.tensor([True]), "pos_ids.0: an integer is expected"),
        ("pos_ids", 3, "pos_ids: .*; found 3"),
        ("grad", [1.0], "grad: a tensor is expected"),
        ("grads", [torch.zeros(1), 2], "grads: a tensor is expected"),
        ("grads", 2, "grads: a list of tensors, or one stacked"),
        ("rule", "c", "rule: Input should be 'a' or 'b'; found 'c'"),
        ("heads", [(1, 2), (3, "x")], "heads.1.1: an integer is expected; found 'x'"),
    ],
)
def test_what_would_be_guessed_at_is_refused_by_name(name: str, value: Any, words: str):
    with pytest.raises(InvalidArgument, match=f"^{words}") as refusal:
        given(**{name: value})
    assert refusal.value.param is not None
    assert refusal.value.param.split(".")[0] == name


def test_an_unknown_and_a_missing_argument_are_named():
    with pytest.raises(InvalidArgument, match="short has no argument 'layers'") as refusal:
        given(layers=1)
    assert refusal.value.param == "layers"
    with pytest.raises(InvalidArgument, match="short needs the argument 'dataset_id'") as refusal:
        short.validate({})
    assert refusal.value.param == "dataset_id"


def test_tensors_lose_their_graph_and_arrays_become_tensors():
    assert not given(grad=torch.zeros(2, requires_grad=True))["grad"].requires_grad
    assert torch.equal(given(grad=np.ones(2))["grad"], torch.ones(2, dtype=torch.float64))
    assert [tensor.shape for tensor in given(grads=torch.zeros(2, 3, 4))["grads"]] == [(3, 4), (3, 4)]


def test_a_long_operation_tells_how_far_it_is_and_can_be_left():
    steps = long.start(None, {"count": 5, "show_progress": True})  # type: ignore[arg-type]
    assert next(steps) == Progress(1, 5)
    steps.close()
    assert inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED


def test_a_bar_is_closed_when_the_work_fails(monkeypatch: pytest.MonkeyPatch):
    closed = []
    monkeypatch.setattr("tqdm.auto.tqdm.close", lambda bar: closed.append(bar.n))

    def fails() -> Iterator[Progress]:
        yield Progress(2, 4)
        raise InvalidArgument("no")

    with pytest.raises(InvalidArgument):
        drive(fails(), "x", show=True)  # type: ignore[arg-type]
    assert closed


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]):
    with shown("x", show=True) as tell:
        tell(Progress(1, 2))
    assert capsys.readouterr().err == ""


def test_every_operation_has_a_text_a_schema_and_a_name_of_its_own():
    for name, one in OPERATIONS.items():
        assert one.name == name
        assert one.__doc__
        assert one.params.model_json_schema()["additionalProperties"] is False
        assert "$defs" not in one.params.model_json_schema(), "the OpenAPI page would not find them"
