"""The routes of operations: bodies, models, answers, refusals. What needs a socket is in `test_attribution_work`."""

import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, pack, unpack
from attribution.errors import InvalidArgument, QueueFull
from attribution.operation import Progress
from attribution.operations import OPERATIONS
from server.bodies import TensorRoom
from tests.models import D_MODEL
from tests.server.support import Served, error_of, serve

TOKENS = [5, 6, 7, 8, 9]
AT = {"dataset_id": "set", "sample_id": 0, "layer": 1, "pos_ids": [1, 3]}
PATH = "/attribution/get_hidden_states"


@pytest.fixture(scope="module")
def one(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with one model and one stored sample."""
    with serve(tmp_path_factory.mktemp("one"), model=str(folders["qwen3"]), max_tensor_bytes=50_000) as served:
        body = {"dataset_id": "set", "sample_id": 0, "token_ids": TOKENS}
        assert served.post(body, "/attribution/forward").status_code == 200
        yield served


def post_tensors(served: Served, name: str, value: Any, **headers: str) -> Any:
    body = value if isinstance(value, bytes) else b"".join(pack(value))
    return served.http.post(f"/attribution/{name}", content=body, headers={"Content-Type": MEDIA_TYPE} | headers)


def lines(content: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """The lines of a progress stream, and what follows them."""
    found = []
    while True:
        line, _, content = content.partition(b"\n")
        found.append(json.loads(line))
        if "progress" not in found[-1]:
            return found, content


def test_json_is_answered_in_json(one: Served):
    answer = one.post(AT, PATH)
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert (found["dtype"], found["shape"]) == ("F32", [1, 2, D_MODEL])
    tensor = unpack(one.http.post(PATH, json=AT, headers={"Accept": MEDIA_TYPE}).content)
    assert torch.equal(torch.tensor(found["data"]), tensor)


def test_tensors_are_answered_with_tensors_unless_accept_says_otherwise(one: Served):
    given = AT | {"head": 2, "downstream_grads": [torch.ones(1, 2, D_MODEL)]}
    answer = post_tensors(one, "attribute_attn_weights", given)
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert int(answer.headers["content-length"]) == len(answer.content)
    aw, aa = unpack(answer.content)
    assert aw.shape == aa.shape == (2, 5)
    plain = post_tensors(one, "attribute_attn_weights", given, Accept="text/html, application/json;q=0.9")
    assert plain.json()[0]["data"] == aw.tolist()
    assert post_tensors(one, "attribute_attn_weights", given, Accept="*/*").content == answer.content


def test_an_operation_without_arguments_needs_no_body(one: Served):
    assert one.http.post("/attribution/empty_cuda_cache").json() == {"before": 0, "after": 0}


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"{", "application/json", "not JSON"),
        (b"[" * 100_000, "application/json", "not JSON"),
        (b"[1]", "application/json", "the body is a list; an object"),
        (b"\xff", "application/json", "not JSON"),
        (b"{}", "", "a body of type 'none' is not read"),
        (b"a=1", "application/x-www-form-urlencoded", "a body of type 'application/x-www-form-urlencoded'"),
        (pickle.dumps({}), "application/octet-stream", "a body of type 'application/octet-stream'"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(one: Served, content: bytes, kind: str, words: str):
    answer = one.http.post(PATH, content=content, headers={"Content-Type": kind})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert words in error_of(answer)["message"]


def torch_saved() -> bytes:
    file = io.BytesIO()
    torch.save({"dataset_id": "set"}, file)
    return file.getvalue()


def lying(size: int) -> bytes:
    """An envelope whose header announces a tensor of `size` bytes, of which a few come."""
    value = {"grad": {"$tensor": "x"}}
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"sightline": json.dumps(value)}, "x": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(10)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (pickle.dumps({"x": list(range(1000))}), 400, "is a pickle; pickles are never read"),
        (torch_saved(), 400, "such as torch.save writes"),
        (b"", 400, "ends after 0 bytes"),
        (b"".join(pack({"x": torch.zeros(4)}))[:-1], 400, "the header announces"),
        (b"".join(pack({"x": torch.zeros(4)})) + b"x", 400, "the header announces"),
        (b"".join(pack([torch.zeros(4)])), 400, "the body is a list"),
        (lying(1000), 400, "the header announces"),
        (lying(10 * 2**30), 413, "at most 50,000 are taken"),
        (b"".join(pack({"x": torch.zeros(20_000)})), 413, "at most 50,000 are taken"),
    ],
)
def test_a_bad_body_of_tensors_is_refused_and_the_server_goes_on(one: Served, content: bytes, status: int, words: str):
    answer = post_tensors(one, "get_hidden_states", content)
    assert answer.status_code == status
    assert words in error_of(answer)["message"]
    assert error_of(answer)["code"] in ("bad_envelope", "envelope_too_large", "invalid_request")
    assert one.app.state.sightline.room.used == 0
    assert one.post(AT, PATH).status_code == 200


def test_tensors_of_all_requests_together_have_a_bound():
    room = TensorRoom(100)
    with room.taken(60):
        with pytest.raises(QueueFull, match="hold 60 of 100 bytes"), room.taken(50):
            pass
        with room.taken(40):
            assert room.used == 100
    assert room.used == 0


def test_the_room_of_a_request_is_given_back_after_its_answer(one: Served):
    given = AT | {"head": 2, "downstream_grads": [torch.ones(1, 2, D_MODEL)]}
    for accept in (MEDIA_TYPE, PROGRESS_TYPE, "application/json"):
        assert post_tensors(one, "attribute_attn_weights", given, Accept=accept).status_code == 200
        assert one.app.state.sightline.room.used == 0


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": 5}, 422, "invalid_argument", "model"),
        ({"model": "absent"}, 404, "model_not_found", "model"),
        ({"device": "cpu"}, 422, "invalid_argument", "device"),
        ({"pos": [1]}, 422, "invalid_argument", "pos"),
        ({"layer": 9}, 422, "out_of_range", "layer"),
        ({"sample_id": 7}, 404, "sample_not_found", "sample_id"),
        ({"layer": {"$tensor": "0"}}, 422, "invalid_argument", "layer"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(one: Served, change: dict[str, Any], status: int, code: str, param: str):
    answer = one.post(AT | change, PATH)
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (status, code, param)


def test_among_several_models_one_must_be_named(house: Served, qwen: str):
    body = {"prompts": ["hello"]}
    answer = house.post(body, "/attribution/estimate_memory")
    assert (answer.status_code, error_of(answer)["code"]) == (422, "model_ambiguous")
    assert qwen in error_of(answer)["message"]
    assert house.post(body | {"model": qwen}, "/attribution/estimate_memory").json()["samples"] == 1
    assert house.http.get("/attribution/status").status_code == 422
    status = house.http.get("/attribution/status", params={"model": qwen}).json()
    assert (status["model_loaded"], status["model"]) == (True, qwen)


def test_without_a_model_there_is_a_status_and_nothing_else(tmp_path: Path):
    with serve(tmp_path, no_model=True) as served:
        status = served.http.get("/attribution/status").json()
        assert (status["model_loaded"], status["cached_datasets"]) == (False, {})
        answer = served.post(AT, PATH)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
        assert "POST /models/load" in error_of(answer)["message"]
        assert served.http.get("/attribution/status", params={"model": "x"}).status_code == 404


def test_the_operations_are_listed_with_their_schemas(one: Served):
    rows = {row["name"]: row for row in one.http.get("/attribution").json()["operations"]}
    assert set(rows) == set(OPERATIONS)
    schema = rows["get_hidden_states"]["parameters"]
    assert {"model", "dataset_id", "pos_ids"} < set(schema["properties"])
    assert "device" not in schema["properties"]
    assert all(row["summary"] for row in rows.values())
    paths = one.http.get("/openapi.json").json()["paths"]
    shown = paths[PATH]["post"]
    written = shown["requestBody"]["content"]["application/json"]["schema"]
    assert (set(written["properties"]), written["required"]) == (set(schema["properties"]), schema["required"])
    assert MEDIA_TYPE in shown["requestBody"]["content"]
    assert {f"/{operation.path}" for operation in OPERATIONS.values()} <= set(paths)


def test_the_openapi_page_names_nothing_that_is_not_in_it(one: Served):
    document = one.http.get("/openapi.json").json()
    text = json.dumps(document)
    assert "$defs" not in text
    for path in re.findall(r'"\$ref": "#/([^"]+)"', text):
        found = document
        for part in path.split("/"):
            assert part in found, path
            found = found[part]
    body = document["paths"]["/interventions/knockout_sweep"]["post"]["requestBody"]["content"]["application/json"]
    assert {"layers", "heads", "edges"} == set(body["schema"]["properties"]["specifications"]["items"]["properties"])


def test_the_key_is_asked_for(folders: dict[str, Path], tmp_path: Path):
    with serve(tmp_path, no_model=True, api_key="sesame") as served:
        for answer in (served.post(AT, PATH), served.http.get("/attribution/status"), served.http.get("/attribution")):
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer sesame"}
        assert served.http.get("/attribution/status", headers=headers).status_code == 200


def test_progress_is_lines_and_then_the_envelope(one: Served):
    body = {"dataset_id": "many", "prompts": ["a" * n for n in range(1, 7)], "show_progress": True}
    del body["show_progress"]
    answer = one.http.post("/attribution/batch_forward", json=body, headers={"Accept": PROGRESS_TYPE})
    assert answer.headers["content-type"] == PROGRESS_TYPE
    said, rest = lines(answer.content)
    assert said[-1] == {"result": True}
    assert said[-2] == {"progress": {"done": 6, "total": 6}}
    assert unpack(rest)["stored"] == 6


def test_a_failure_in_a_progress_stream_is_its_last_line(one: Served, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> Iterator[Progress]:
        yield Progress(1, 4)
        raise InvalidArgument("no more", param="prompts")

    monkeypatch.setattr(OPERATIONS["batch_forward"], "function", fails)
    body = {"dataset_id": "x", "prompts": ["a"]}
    answer = one.http.post("/attribution/batch_forward", json=body, headers={"Accept": PROGRESS_TYPE})
    said, rest = lines(answer.content)
    assert said == [{"progress": {"done": 1, "total": 4}}, InvalidArgument("no more", param="prompts").body()]
    assert rest == b""


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "out_of_memory"),
        (MemoryError(), 503, "out_of_memory"),
        (RuntimeError("a bug"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("accept", ["application/json", PROGRESS_TYPE])
def test_a_failure_nobody_foresaw_is_an_error_in_our_shape_and_the_server_lives(
    one: Served, monkeypatch: pytest.MonkeyPatch, raised: Exception, status: int, code: str, accept: str
):
    def fails(*_: Any, **__: Any) -> Iterator[Progress]:
        yield Progress(1, 2)
        raise raised

    monkeypatch.setattr(OPERATIONS["batch_forward"], "function", fails)
    body = {"dataset_id": "x", "prompts": ["a"]}
    answer = one.http.post("/attribution/batch_forward", json=body, headers={"Accept": accept})
    if accept == PROGRESS_TYPE:
        error = lines(answer.content)[0][-1]["error"]
    else:
        assert answer.status_code == status
        error = error_of(answer)
    assert error["code"] == code
    assert "a bug" not in error["message"]
    assert one.post(AT, PATH).status_code == 200


def test_numbers_that_json_cannot_say_are_refused_in_json_only(one: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OPERATIONS["get_hidden_states"], "function", lambda *_, **__: torch.tensor([float("nan")]))
    answer = one.post(AT, PATH)
    assert error_of(answer)["code"] == "not_finite"
    assert MEDIA_TYPE in error_of(answer)["message"]
    assert unpack(one.http.post(PATH, json=AT, headers={"Accept": MEDIA_TYPE}).content).isnan().all()
