"""Recorded runs: their routes, their bounds, and a disk that fails."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import safetensors.torch
import torch

from attribution.errors import StorageFailed
from server.runs import RunStore, SavedTensor
from tests.server.support import HELLO, Served, error_of, serve, wait_until

SAVEPOINTS: list[dict[str, Any]] = [
    {"name": "stacked", "selector": "resid_post[*]"},
    {"name": "pattern", "selector": "pattern[*]", "positions": {"start": 2, "step": 2}},
    {"name": "half", "selector": "q[1]", "dtype": "bfloat16"},
    {"name": "logits", "selector": "logits"},
]


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    with serve(tmp_path_factory.mktemp("runs"), model=str(folders["qwen3"])) as served:
        served.names["qwen3"] = str(folders["qwen3"])
        yield served


def _record(served: Served, **body: Any) -> str:
    """The id of a new run."""
    body = {"max_tokens": 4, "ignore_eos": True, "savepoints": SAVEPOINTS} | body
    answer = served.chat(served.names["qwen3"], **body)
    return answer.choices[0].message.run_id  # type: ignore[attr-defined]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def run_id(served: Served) -> str:
    return _record(served, n=2)


def test_the_runs_are_listed_newest_first(served: Served, run_id: str):
    second = _record(served, savepoints=SAVEPOINTS[:1])
    rows = served.http.get("/runs").json()["runs"]
    ids = [row["run_id"] for row in rows]
    assert ids.index(second) < ids.index(run_id)
    row = rows[ids.index(run_id)]
    assert row["model"] == served.names["qwen3"]
    assert row["choices"] == 2
    assert row["savepoints"] == ["half", "logits", "pattern", "stacked"]
    assert row["bytes"] == _size(served.runs / run_id)
    assert abs(row["created"] - time.time()) < 120


def test_a_run_is_its_run_json(served: Served, run_id: str):
    answer = served.http.get(f"/runs/{run_id}")
    assert answer.json() == json.loads((served.runs / run_id / "run.json").read_text())


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("name", ["stacked", "pattern", "half", "logits"])
def test_a_tensor_comes_in_either_format(served: Served, run_id: str, choice: int, name: str):
    file = served.runs / run_id / str(choice) / f"{name}.pt"
    expected = torch.load(file, weights_only=True)
    pt = served.http.get(f"/runs/{run_id}/{choice}/{name}")
    assert pt.content == file.read_bytes()
    assert f'filename="{name}.pt"' in pt.headers["content-disposition"]
    packed = served.http.get(f"/runs/{run_id}/{choice}/{name}?format=safetensors")
    tensors = safetensors.torch.load(packed.content)
    assert list(tensors) == [name]
    assert tensors[name].dtype == expected.dtype
    assert torch.equal(tensors[name], expected)


@pytest.mark.parametrize(
    ("name", "axis", "rows"), [("stacked", 1, 25), ("pattern", 2, 12), ("half", 0, 25), ("logits", 0, 4)]
)
@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_start_and_stop_select_rows_of_the_position_axis(
    served: Served, run_id: str, name: str, axis: int, rows: int, file_format: str
):
    whole = torch.load(served.runs / run_id / "0" / f"{name}.pt", weights_only=True)
    assert whole.shape[axis] == rows
    for query, kept in (
        ("start=1&stop=3", range(1, 3)),
        ("start=2", range(2, rows)),
        ("stop=2", range(2)),
        (f"stop={rows}", range(rows)),
    ):
        answer = served.http.get(f"/runs/{run_id}/0/{name}?format={file_format}&{query}")
        assert answer.status_code == 200
        if file_format == "pt":
            found = torch.load(io.BytesIO(answer.content), weights_only=True)
        else:
            found = safetensors.torch.load(answer.content)[name]
        assert torch.equal(found, whole.index_select(axis, torch.tensor(list(kept))))
        assert len(answer.content) < whole.nbytes + 4000


@pytest.mark.parametrize(
    "query", ["start=3&stop=2", "stop=26", "start=26", "start=-1", "stop=0", "start=x", "format=npy", "format="]
)
def test_rows_and_formats_that_do_not_exist_are_refused(served: Served, run_id: str, query: str):
    answer = served.http.get(f"/runs/{run_id}/0/stacked?{query}")
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert error_of(answer)["param"] in ("start", "stop", "format")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/{run}/0/nothing", 404),
        ("/{run}/2/logits", 404),
        ("/{run}/-1/logits", 404),
        ("/{run}/0/run.json", 404),
        ("/{run}/0/logits.pt", 404),
        ("/{run}/x/logits", 400),
        ("/{run}/0/..%2f..%2frun.json", 404),
        ("/{run}/0/%2e%2e", 404),
        ("/{run}/0/..%5c1%5clogits", 404),
        ("/{run}/0/logits%00", 404),
        ("/" + "0" * 32, 404),
        ("/" + "0" * 32 + "/0/logits", 404),
        ("/{short}", 404),
        ("/{upper}", 404),
        ("/%2e%2e", 404),
        ("/..%2f" + "0" * 29, 404),
        ("/.{run}", 404),
    ],
)
def test_what_is_no_tensor_of_a_run_is_not_found(served: Served, run_id: str, path: str, status: int):
    url = "/runs" + path.format(run=run_id, short=run_id[:-1], upper=run_id.upper())
    answer = served.http.get(url)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["code"] in ("run_not_found", "not_found", "invalid_request")


def test_a_wrong_tensor_name_is_answered_with_those_there_are(served: Served, run_id: str):
    said = error_of(served.http.get(f"/runs/{run_id}/0/nothing"))["message"]
    assert all(name in said for name in ("half", "logits", "pattern", "stacked"))


def test_a_deleted_run_is_gone_and_the_others_are_not(served: Served, run_id: str):
    doomed = _record(served)
    size = _size(served.runs / doomed)
    answer = served.http.delete(f"/runs/{doomed}")
    assert answer.json() == {"deleted": True, "run_id": doomed, "bytes_freed": size}
    assert not (served.runs / doomed).exists()
    assert error_of(served.http.get(f"/runs/{doomed}"))["code"] == "run_not_found"
    again = served.http.delete(f"/runs/{doomed}")
    assert (again.status_code, error_of(again)["code"]) == (404, "run_not_found")
    assert served.http.get(f"/runs/{run_id}").status_code == 200


@pytest.mark.parametrize("name", ["..", "%2e%2e", "x", "..%2fruns", "." + "0" * 31])
def test_only_a_run_can_be_deleted(served: Served, run_id: str, name: str):
    assert served.http.delete(f"/runs/{name}").status_code in (404, 405)
    assert (served.runs / run_id / "run.json").is_file()


def test_before_the_first_run_there_are_none(tmp_path: Path):
    with serve(tmp_path, no_model=True) as served:
        assert served.http.get("/runs").json() == {"runs": []}
        assert not served.runs.exists()


# The bounds. The store alone: what it is given counts, not who gives it.


def _tensor(kilobytes: int) -> list[SavedTensor]:
    return [SavedTensor(0, "x", "logits", torch.zeros(kilobytes * 256), range(kilobytes * 256), 0)]


def _name(index: int) -> str:
    return f"{index:032x}"


def _write(store: RunStore, index: int, kilobytes: int = 10) -> None:
    meta = {"choices": [{"index": 0, "activations": {"x": {}}}], "run_id": _name(index), "created": 0, "model": "m"}
    store.write(_name(index), _tensor(kilobytes), meta)


def _there(root: Path) -> list[int]:
    return sorted(int(path.name, 16) for path in root.iterdir())


def test_what_is_no_run_is_not_listed_and_does_not_keep_the_runs_from_being_listed(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "README").write_text("mine")
    for index, text in ((10, None), (11, "{half"), (12, "{}"), (13, "[]")):
        (tmp_path / _name(index)).mkdir()
        if text is not None:
            (tmp_path / _name(index) / "run.json").write_text(text)
    store = RunStore(tmp_path, None, None)
    _write(store, 1)
    assert [row["run_id"] for row in store.summaries()] == [_name(1)]
    store = RunStore(tmp_path, 1, 1e-9)
    store.retain()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README", "notes"]


def test_the_oldest_runs_go_when_there_are_too_many_bytes(tmp_path: Path):
    store = RunStore(tmp_path, 40_000, None)
    for index in range(1, 8):
        _write(store, index)
        assert _size(tmp_path) <= 40_000
        assert index in _there(tmp_path)
    assert _there(tmp_path) == [5, 6, 7]  # a run of 10 KiB takes a little more on disk
    _write(store, 8, 25)
    assert _there(tmp_path) == [7, 8]


def test_the_run_just_written_stays_although_its_file_is_larger_than_its_tensor(tmp_path: Path):
    store = RunStore(tmp_path, 10_241, None)
    _write(store, 1)
    _write(store, 2)
    assert _size(tmp_path) > 10_241
    assert _there(tmp_path) == [2]


def test_a_new_store_knows_the_age_of_what_an_old_one_left(tmp_path: Path):
    first = RunStore(tmp_path, None, None)
    for index, age in ((1, 10), (2, 30), (3, 20)):
        _write(first, index)
        os.utime(tmp_path / _name(index), (time.time() - age,) * 2)
    store = RunStore(tmp_path, 40_000, None)
    _write(store, 4)
    assert _there(tmp_path) == [1, 3, 4]
    _write(store, 5)
    assert _there(tmp_path) == [1, 4, 5]


def test_runs_older_than_the_bound_go_at_the_next_write_and_at_a_sweep(tmp_path: Path):
    store = RunStore(tmp_path, None, 0.3)
    _write(store, 1)
    _write(store, 2)
    assert _there(tmp_path) == [1, 2]
    time.sleep(0.35)
    _write(store, 3)
    assert _there(tmp_path) == [3]
    store.retain()
    assert _there(tmp_path) == [3]
    time.sleep(0.35)
    store.retain()
    assert _there(tmp_path) == []


def test_a_deleted_run_counts_no_longer(tmp_path: Path):
    store = RunStore(tmp_path, 40_000, None)
    for index in (1, 2, 3):
        _write(store, index)
    store.delete(_name(2))
    _write(store, 4)
    assert _there(tmp_path) == [1, 3, 4]


def test_a_run_being_written_is_not_touched_by_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run 1 hangs half-written, while others are written, swept and deleted; then it is whole."""
    store = RunStore(tmp_path, 40_000, None)
    reached, release, save = threading.Event(), threading.Event(), torch.save

    def slow(value: Any, file: Any) -> None:
        save(value, file)
        if _name(1) in str(file):
            reached.set()
            release.wait(30)

    monkeypatch.setattr(torch, "save", slow)
    writer = threading.Thread(target=_write, args=(store, 1))
    writer.start()
    assert reached.wait(30)
    for index in range(2, 8):
        _write(store, index)
    assert RunStore(tmp_path, 40_000, None).summaries()  # a second server on the directory leaves it alone too
    assert _name(1) not in {path.name for path in tmp_path.iterdir()}  # what is half-written is not to be seen
    release.set()
    writer.join()
    assert _there(tmp_path) == [6, 7, 1] or _there(tmp_path) == [1, 6, 7]
    assert torch.load(tmp_path / _name(1) / "0" / "x.pt", weights_only=True).shape == (2560,)


def test_a_run_larger_than_the_directory_may_be_is_refused_and_no_other_goes_for_it(
    folders: dict[str, Path], tmp_path: Path
):
    model = str(folders["qwen3"])
    with serve(tmp_path, model=model, activations_max_bytes=60_000) as served:
        served.names["qwen3"] = model
        small = _record(served, savepoints=SAVEPOINTS[3:])
        large = [{"name": "x", "selector": "resid_post[*]"}, {"name": "y", "selector": "resid_pre[*]"}]
        body = {"model": model, "messages": HELLO, "max_tokens": 60, "ignore_eos": True, "savepoints": large}
        answer = served.post(body)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (400, "capture_too_large")
        assert "60,000" in error["message"]
        assert "--activations-max-bytes" in error["message"]
        assert [path.name for path in served.runs.iterdir()] == [small]


def test_the_server_keeps_to_its_bounds(folders: dict[str, Path], tmp_path: Path):
    with serve(tmp_path, model=str(folders["qwen3"]), activations_max_bytes=120_000) as served:
        served.names["qwen3"] = str(folders["qwen3"])
        ids = [_record(served, savepoints=SAVEPOINTS[:1]) for _ in range(8)]
        left = {path.name for path in served.runs.iterdir()}
        assert _size(served.runs) <= 120_000
        assert left == set(ids[-len(left) :])
        assert 2 <= len(left) < 8
        assert error_of(served.http.get(f"/runs/{ids[0]}"))["code"] == "run_not_found"


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_server_left_half_written_is_removed_at_the_next_start(tmp_path: Path):
    """Its process is gone; or, as in a container, the new server has the same process id."""
    dead, same, alive = (tmp_path / f".{_name(i)}.{pid}.tmp" for i, pid in enumerate((_dead_pid(), os.getpid(), 1)))
    for folder in (dead, same, alive):
        (folder / "0").mkdir(parents=True)
        (folder / "0" / "x.pt").write_bytes(b"half")
    os.utime(same, (0, 0))  # older than this process
    assert os.getpid() != 1
    RunStore(tmp_path, None, None).remove_unfinished()
    assert not dead.exists()
    assert not same.exists()
    assert alive.exists()


def test_names_that_only_look_like_leftovers_stay(tmp_path: Path):
    names = [".config.tmp", ".x.tmp", f".{_name(1)}.tmp", f"{_name(1)}.99999999.tmp", ".vim.99999999.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    RunStore(tmp_path, None, None).remove_unfinished()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# A disk that fails.


def _full(after: int, error: Exception):
    """A `torch.save` that leaves half a file and fails at its call number `after`."""
    save, calls = torch.save, [0]

    def failing(value: Any, file: Any) -> None:
        if "runs" not in str(file):
            return save(value, file)
        calls[0] += 1
        if calls[0] >= after:
            Path(file).write_bytes(b"half")
            raise error
        return save(value, file)

    return failing


FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 4608 vs 4502"),
    PermissionError(errno.EACCES, "Permission denied"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [1, 3])
def test_a_full_disk_is_a_507_that_leaves_nothing_and_the_next_request_works(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int
):
    before = {path.name for path in served.runs.iterdir()}
    body = {"model": served.names["qwen3"], "messages": HELLO, "max_tokens": 3, "savepoints": SAVEPOINTS}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _full(after, error))
        answer = served.post(body)
        assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
        assert str(error) in error_of(answer)["message"]
        assert {path.name for path in served.runs.iterdir()} == before
        plain = served.post(body | {"savepoints": []})
        assert plain.status_code == 200  # a chat that keeps nothing is served
    assert served.post(body).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_disk_that_is_full_after_tokens_went_out_is_an_error_event_in_place_of_the_last_chunk(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str
):
    before = {entry.name for entry in served.runs.iterdir()}
    monkeypatch.setattr(torch, "save", _full(1, FAILURES[0]))
    body = {"model": served.names["qwen3"], "max_tokens": 5, "ignore_eos": True, "savepoints": SAVEPOINTS}
    body |= {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    answer = served.post(body | {"stream": True, "stream_options": {"include_usage": True}}, path)
    assert answer.status_code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-1]]
    assert events[-1]["error"]["code"] == "storage_failed"
    assert len(events) > 2
    assert not any(choice["finish_reason"] for event in events[:-1] for choice in event["choices"])
    assert "[DONE]" not in answer.text
    assert {entry.name for entry in served.runs.iterdir()} == before


def test_the_sdk_raises_the_error_event(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "save", _full(1, FAILURES[0]))
    stream = served.chat(served.names["qwen3"], max_tokens=3, stream=True, savepoints=SAVEPOINTS)
    with pytest.raises(openai.APIError, match="No space left"):
        list(stream)


def test_a_run_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = RunStore(tmp_path, None, None)
    for method in ("rename", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, fail)
            with pytest.raises(StorageFailed, match="Input/output error"):
                _write(store, 1)
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_507(folders: dict[str, Path], tmp_path: Path):
    with serve(tmp_path, model=str(folders["qwen3"])) as served:
        (tmp_path / "runs").write_text("a file, where the directory should be")
        body = {"model": str(folders["qwen3"]), "messages": HELLO, "max_tokens": 1, "store_activations": True}
        answer = served.post(body)
        assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
        assert served.http.get("/health").status_code == 200


def test_an_old_run_that_cannot_be_deleted_does_not_fail_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = RunStore(tmp_path, 15_000, None)
    _write(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "bad block")))
        _write(store, 2)
    assert (tmp_path / _name(2) / "run.json").is_file()
    assert store.read(_name(2))["run_id"] == _name(2)


def test_runs_come_and_go_while_they_are_listed(tmp_path: Path):
    store = RunStore(tmp_path, 60_000, None)
    stop = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        while not stop.is_set():
            try:
                store.summaries()
            except BaseException as error:
                failures.append(error)
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    for index in range(150):
        _write(store, index)
    stop.set()
    watcher.join()
    assert failures == []


def test_a_damaged_file_is_a_507_that_names_it(served: Served):
    run_id = _record(served)
    file = served.runs / run_id / "0" / "logits.pt"
    file.write_bytes(b"PK\x03\x04 not a tensor")
    answer = served.http.get(f"/runs/{run_id}/0/logits?start=1")
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
    assert str(file) in error_of(answer)["message"]
    wait_until(lambda: served.http.get("/health").status_code == 200)
