"""The operations on samples, as a session runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from attribution import estimate as estimate_module
from attribution.errors import (
    CannotFit,
    ContextLengthExceeded,
    DatasetNotFound,
    InvalidArgument,
    OutOfRange,
    RunNotFound,
    SampleMismatch,
    SampleNotFound,
    SightlineError,
    StorageFailed,
)
from attribution.model.load import trace_model
from attribution.operation import Progress
from attribution.operations import samples
from attribution.session import LocalSession
from tests.attribution import long_batch
from tests.attribution.plain import distance, prompts_of
from tests.models import CHAT_TEMPLATE, N_HEADS, N_LAYERS, WINDOW, tiny_model, tiny_tokenizer, traced

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "the rest"}, {"role": "assistant", "content": "is in"}]


@pytest.fixture
def session(tmp_path: Path) -> LocalSession:
    return LocalSession(traced("llama"), store=tmp_path / "store", runs_dir=tmp_path / "runs")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each forward had."""
    seen, original = [], samples.collect

    def collect(model: Any, prompts: list[list[int]]) -> Any:
        seen.append(len(prompts))
        return original(model, prompts)

    monkeypatch.setattr(samples, "collect", collect)
    return seen


def forward(session: LocalSession, sample_id: int | str = 0, **arguments: Any) -> dict[str, Any]:
    return session.run(samples.forward, {"dataset_id": "set", "sample_id": sample_id, **arguments})


def batch_forward(session: LocalSession, prompts: Any, **arguments: Any) -> dict[str, Any]:
    return session.run(samples.batch_forward, {"dataset_id": "set", "prompts": prompts, **arguments})


def record(session: LocalSession, run_id: str = "abc", **changes: Any) -> None:
    """A recorded run of two choices, as the server writes it."""
    choices = [{"index": index, "token_ids": [1, 2, 3 + index]} for index in range(2)]
    folder = session.runs_dir / run_id
    folder.mkdir(parents=True)
    content = {"model": session.model.id, "revision": session.model.revision, "choices": choices} | changes
    (folder / "run.json").write_text(json.dumps(content))


def test_a_sample_is_run_once(session: LocalSession, forwards: list[int]):
    first = forward(session, prompt="the rest")
    ids = tiny_tokenizer().encode("the rest")
    assert first["token_ids"] == ids
    assert "".join(first["tokens"]) == "the rest"
    assert (first["seq_len"], first["stored"], first["finite"]) == (len(ids), True, True)
    again = forward(session, "0", token_ids=torch.tensor(ids))  # "0" is 0
    assert again == first | {"stored": False}
    assert forwards == [1]
    with pytest.raises(SampleMismatch, match="other tokens"):
        forward(session, prompt="the res")
    assert forwards == [1]


def test_messages_go_through_the_template_and_a_text_gets_the_tokenizers_own_tokens(tmp_path: Path):
    model = trace_model("bos", tiny_model("llama"), tiny_tokenizer(add_bos=True))
    session = LocalSession(model, store=tmp_path)
    bos = model.tokenizer.bos_token_id
    assert model.tokenizer.chat_template == CHAT_TEMPLATE

    def text_of(number: int, **arguments: Any) -> str:
        return "".join(forward(session, number, **arguments)["tokens"])

    assert forward(session, 0, prompt="the")["token_ids"][0] == bos
    assert text_of(1, prompt="the", add_special_tokens=False) == "the"
    asked = "<|im_start|>user\nthe rest<|im_end|>\n"
    assert text_of(2, messages=MESSAGES[:1]) == asked + "<|im_start|>assistant\n"
    assert text_of(3, messages=MESSAGES) == asked + "<|im_start|>assistant\nis in<|im_end|>\n"
    batch = batch_forward(session, ["the", MESSAGES, [bos, 5]], sample_ids=["a", "b", "c"])
    assert batch["tokens"] == sum(session.sample("set", one).seq_len for one in "abc")
    assert session.sample("set", "a").token_ids == session.sample("set", 0).token_ids
    assert session.sample("set", "b").token_ids == session.sample("set", 3).token_ids
    assert session.sample("set", "c").token_ids == [bos, 5]


def test_a_recorded_answer_becomes_a_sample(session: LocalSession):
    record(session)
    assert forward(session, 0, run_id="abc")["token_ids"] == [1, 2, 3]
    assert forward(session, 1, run_id="abc", choice=1)["token_ids"] == [1, 2, 4]


def test_a_run_that_cannot_be_taken_is_refused(session: LocalSession):
    record(session, "abc")
    record(session, "theirs", model="other")
    record(session, "older", revision="0f")
    record(session, "damaged", choices=3)
    (session.runs_dir.parent / "run.json").write_text((session.runs_dir / "abc" / "run.json").read_text())
    refusals: list[tuple[dict[str, Any], type[SightlineError], str]] = [
        ({"run_id": "xyz"}, RunNotFound, "no run 'xyz'"),
        ({"run_id": ".."}, RunNotFound, "no run"),
        ({"run_id": "../runs/abc"}, RunNotFound, "no run"),
        ({"run_id": ""}, RunNotFound, "no run"),
        ({"run_id": "abc", "choice": 2}, OutOfRange, "choice is 2; the choices of this run are 0 to 1"),
        ({"run_id": "theirs"}, SampleMismatch, "of the model 'other'"),
        ({"run_id": "older"}, SampleMismatch, "revision 0f"),
        ({"run_id": "damaged"}, StorageFailed, "damaged"),
    ]
    for arguments, error, message in refusals:
        with pytest.raises(error, match=message):
            forward(session, **arguments)
    assert session.status()["cached_datasets"] == {}


def test_what_cannot_be_run_is_refused_before_anything_runs(session: LocalSession, forwards: list[int]):
    long = [1] * (WINDOW + 1)
    for arguments, error, message in [
        ({}, InvalidArgument, "exactly one .* found none"),
        ({"prompt": "a", "token_ids": [1]}, InvalidArgument, "found prompt and token_ids"),
        ({"prompt": ""}, InvalidArgument, "prompt has no token"),
        ({"token_ids": []}, InvalidArgument, "token_ids has no token"),
        ({"token_ids": [999]}, OutOfRange, "token_ids is 999"),
        ({"token_ids": long}, ContextLengthExceeded, f"{WINDOW + 1} tokens"),
        ({"messages": [{"content": "a"}]}, InvalidArgument, "every message has a role"),
    ]:
        with pytest.raises(error, match=message):
            forward(session, **arguments)
    for prompts, more, error, message in [
        ([], {}, InvalidArgument, "prompts is empty"),
        (["a", long], {}, ContextLengthExceeded, r"prompts\.1"),
        (["a", ""], {}, InvalidArgument, r"prompts\.1 has no token"),
        (["a", 3], {}, InvalidArgument, r"prompts\.1: a text, a list of messages, or a list of token ids"),
        (["a", {"role": "user"}], {}, InvalidArgument, r"prompts\.1"),
        (["a", "b"], {"sample_ids": [1]}, InvalidArgument, "1 sample_ids for 2 prompts"),
        (["a", "b"], {"sample_ids": [1, "1"]}, InvalidArgument, "names 1 twice"),
    ]:
        with pytest.raises(error, match=message):
            batch_forward(session, prompts, **more)
    assert forwards == []
    assert list(session.store.root.iterdir()) == []


def test_a_batch_gives_each_sample_what_it_gets_alone_and_says_how_far_it_is(
    session: LocalSession, forwards: list[int], tmp_path: Path
):
    prompts = prompts_of([3, 30, 7, 12] * 5)
    operation = samples.batch_forward
    steps = operation.start(session, operation.validate({"dataset_id": "set", "prompts": prompts}))
    for progress in (Progress(16, 20), Progress(20, 20)):
        assert next(steps) == progress
        assert len(session.sample_ids("set")) == progress.done  # what is reported is on disk
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert forwards == [16, 4]
    reply = end.value.value
    assert {key: reply[key] for key in ("count", "stored", "skipped", "tokens", "finite")} == {
        "count": 20,
        "stored": 20,
        "skipped": 0,
        "tokens": 260,
        "finite": True,
    }
    assert reply["sample_ids"] == list(range(20))
    assert reply["estimate"]["disk_bytes"] == pytest.approx(session.store.disk_used(), rel=0.01)
    alone = LocalSession(session.model, store=tmp_path / "alone")
    for number, prompt in enumerate(prompts[:4]):
        forward(alone, number, token_ids=prompt)
        for name in ("resid", "z", "mlp_out"):
            one, other = (s.sample("set", number).read(name, range(N_LAYERS)) for s in (session, alone))
            assert distance(one, other) < 1e-5


def test_a_batch_is_resumed_by_repeating_it(session: LocalSession, forwards: list[int]):
    prompts = prompts_of([5, 9, 6, 20])
    batch_forward(session, prompts[:2])
    again = batch_forward(session, prompts)
    assert (again["stored"], again["skipped"], again["count"]) == (2, 2, 4)
    assert again["estimate"]["samples"] == 2
    assert batch_forward(session, prompts)["stored"] == 0
    assert forwards == [2, 2]
    with pytest.raises(SampleMismatch, match="sample 1 of 'set'"):
        batch_forward(session, [prompts[0], prompts[2]])
    other = LocalSession(traced("llama", seed=1), store=session.store)
    with pytest.raises(SampleMismatch, match="clear_cache"):
        batch_forward(other, prompts)
    assert forwards == [2, 2]


def test_what_cannot_fit_is_refused_before_anything_runs(
    session: LocalSession, forwards: list[int], monkeypatch: pytest.MonkeyPatch
):
    prompts = prompts_of([50] * 4)
    asked = session.run(samples.estimate_memory, {"prompts": prompts})
    assert asked["fits"]
    monkeypatch.setattr(session.store, "disk_free", lambda: asked["disk_bytes"] - 1)
    assert session.run(samples.estimate_memory, {"prompts": prompts})["fits"] is False
    with pytest.raises(CannotFit, match="of disk"):
        batch_forward(session, prompts)
    assert forwards == []
    assert batch_forward(session, prompts[:3])["stored"] == 3
    assert batch_forward(session, prompts)["stored"] == 1  # one more does fit
    assert estimate_module.estimate(session.model, [50] * 4).disk_bytes == asked["disk_bytes"]


def test_nan_is_stored_and_said(tmp_path: Path):
    model = trace_model("broken", tiny_model("llama"), tiny_tokenizer())
    model.module.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    session = LocalSession(model, store=tmp_path)
    assert forward(session, token_ids=[1, 2])["finite"] is False
    assert forward(session, token_ids=[1, 2])["finite"] is False
    assert batch_forward(session, [[1, 2], [3]])["finite"] is False
    assert not session.sample("set", 0).read("mlp_out", 1).isfinite().all()
    assert session.sample("set", 0).read("mlp_out", 0).isfinite().all()


def test_samples_are_listed_and_cleared(session: LocalSession):
    batch_forward(session, prompts_of([3, 4]), sample_ids=["b", 4])
    assert session.run(samples.list_cached_samples, {"dataset_id": "set"}) == {"sample_ids": [4, "b"], "count": 2}
    used = session.store.disk_used()
    status = session.status()
    assert status["cached_datasets"] == {"set": 2}
    assert (status["model_loaded"], status["n_layers"], status["n_heads"]) == (True, N_LAYERS, N_HEADS)
    assert status["store"]["disk_bytes"] == used
    other = LocalSession(traced("qwen2"), store=session.store)
    assert other.run(samples.clear_all_cache, {}) == {"samples": 0, "bytes": 0}
    assert session.run(samples.clear_all_cache, {}) == {"samples": 2, "bytes": used}
    for operation in (samples.list_cached_samples, samples.clear_cache):
        with pytest.raises(DatasetNotFound, match="no dataset 'set'; there is none"):
            session.run(operation, {"dataset_id": "set"})
    forward(session, token_ids=[1])
    assert session.run(samples.clear_cache, {"dataset_id": "set"})["samples"] == 1
    with pytest.raises(SampleNotFound if session.store.datasets(session.identity) else DatasetNotFound):
        session.sample("set", 0)


def test_the_gpus_cache_is_emptied_and_without_a_gpu_there_is_none(session: LocalSession):
    assert session.run(samples.empty_cuda_cache, {}) == {"before": 0, "after": 0}


def test_a_session_without_a_model_says_so(tmp_path: Path):
    status = LocalSession(store=tmp_path).status()
    assert (status["model_loaded"], status["model"], status["cached_datasets"]) == (False, None, {})


def test_a_batch_that_is_killed_leaves_whole_samples_and_is_resumed(tmp_path: Path):
    folder = tmp_path / "long"
    child = subprocess.Popen([sys.executable, "-m", "tests.attribution.long_batch", str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not folder.is_dir() or len(list(folder.glob("*.safetensors"))) < 20:
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = {int(path.stem): path for path in folder.glob("*.safetensors")}
    assert 20 <= len(there) < len(long_batch.PROMPTS)
    for number, path in there.items():
        length = len(long_batch.PROMPTS[number])
        found = safetensors.torch.load(path.read_bytes())
        assert {name: tensor.shape[:2] for name, tensor in found.items()} == {
            "resid": (N_LAYERS + 1, length),
            "z": (N_LAYERS, length),
            "mlp_out": (N_LAYERS, length),
        }
    # the fingerprint of the weights is the same in this process, or this would be refused
    again = long_batch.run(tmp_path)
    assert (again["skipped"], again["stored"]) == (len(there), len(long_batch.PROMPTS) - len(there))
    assert len(os.listdir(folder)) == len(long_batch.PROMPTS) + 1  # and the manifest; nothing half-written is left
