"""Work on the thread of a model, over real sockets: it ends with its client, and chats go on beside it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from fastapi import FastAPI

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, pack
from attribution.errors import QueueFull, ShuttingDown
from attribution.operation import Progress
from attribution.operations import OPERATIONS
from clients import ModelClient
from tests.clients.serving import over_socket
from tests.server.support import HELLO, error_of, wait_until

BODY = {"dataset_id": "x", "prompts": ["a"]}


class Slow:
    """A long operation of many short pieces, which notes where it runs and how it ended."""

    def __init__(self, pieces: int = 100_000) -> None:
        self.pieces, self.done, self.ended_by = pieces, 0, "nothing"
        self.threads: set[str] = set()

    def __call__(self, *_: Any, **__: Any) -> Iterator[Progress]:
        try:
            while self.done < self.pieces:
                self.done += 1
                self.threads.add(threading.current_thread().name)
                time.sleep(0.005)
                yield Progress(self.done, self.pieces)
            self.ended_by = "itself"
        except GeneratorExit:
            self.ended_by = "its client"
            self.threads.add(threading.current_thread().name)
            raise
        return {"count": self.pieces}  # type: ignore[return-value]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    work = Slow()
    monkeypatch.setattr(OPERATIONS["batch_forward"], "function", work)
    return work


@pytest.fixture(scope="module")
def real(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FastAPI, str]]:
    """A server on a socket: its URL, its app, and its model."""
    name = str(folders["qwen3"])
    with over_socket(tmp_path_factory.mktemp("work"), max_tensor_bytes="2MiB", max_queue=4) as (url, app):
        with ModelClient(url) as client:
            client.load_model(name)
        yield url, app, name


def ask(url: str, accept: str = "application/json") -> http.client.HTTPConnection:
    """Send a `batch_forward` and do not wait for its answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    headers = {"Content-Type": "application/json", "Accept": accept}
    connection.request("POST", "/attribution/batch_forward", json.dumps(BODY), headers)
    return connection


@pytest.mark.parametrize("accept", ["application/json", PROGRESS_TYPE])
def test_work_ends_on_the_models_thread_when_its_client_goes_away(
    real: tuple[str, FastAPI, str], slow: Slow, accept: str
):
    connection = ask(real[0], accept)
    wait_until(lambda: slow.done > 3)
    connection.close()
    wait_until(lambda: slow.ended_by == "its client", 10)
    assert slow.threads == {f"model-{real[2]}"}
    assert real[1].state.sightline.registry.get(real[2]).worker.jobs_waiting == 0


def test_progress_comes_while_the_work_goes_on(real: tuple[str, FastAPI, str], slow: Slow):
    connection = ask(real[0], PROGRESS_TYPE)
    answer = connection.getresponse()
    first = json.loads(answer.readline())
    assert first == {"progress": {"done": 1, "total": slow.pieces}}
    assert slow.ended_by == "nothing"
    connection.close()
    wait_until(lambda: slow.ended_by == "its client", 10)


def test_a_chat_beside_long_work_finishes_before_it(real: tuple[str, FastAPI, str], slow: Slow):
    slow.pieces = 300  # 1.5 seconds at least
    url, _, name = real
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=60) as web:
        work = pool.submit(web.post, f"{url}/attribution/batch_forward", json=BODY)
        wait_until(lambda: slow.done > 3)
        chat = {"model": name, "messages": HELLO, "max_tokens": 8, "ignore_eos": True}
        answer = web.post(f"{url}/v1/chat/completions", json=chat)
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert slow.ended_by == "nothing", "the chat waited for all of the work"
        assert work.result(60).json() == {"count": 300}


def test_two_long_works_take_turns(real: tuple[str, FastAPI, str], slow: Slow, monkeypatch: pytest.MonkeyPatch):
    other = Slow(50)
    monkeypatch.setattr(OPERATIONS["ablate"], "function", other)
    connection = ask(real[0])
    wait_until(lambda: slow.done > 3)
    body = {"dataset_id": "x", "sample_id": 0}
    assert httpx.post(f"{real[0]}/attribution/ablate", json=body, timeout=60).json() == {"count": 50}
    assert slow.ended_by == "nothing"
    connection.close()
    wait_until(lambda: slow.ended_by == "its client", 10)


def test_more_work_than_may_wait_is_429_and_says_when_to_come_back(real: tuple[str, FastAPI, str]):
    url, app, name = real
    worker, release = app.state.sightline.registry.get(name).worker, threading.Event()
    jobs = [worker.submit(lambda: release.wait(60)) for _ in range(6)]
    try:
        wait_until(lambda: worker.jobs_waiting >= 4)
        answer = httpx.post(f"{url}/attribution/estimate_memory", json={"prompts": ["a"]}, timeout=30)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, str(QueueFull.retry_after))
        assert error_of(answer)["code"] == "queue_full"
    finally:
        release.set()
    assert all(job.result(30) for job in jobs)


def test_unloading_a_model_ends_its_work_with_an_error(
    real: tuple[str, FastAPI, str], slow: Slow, folders: dict[str, Path]
):
    url, name = real[0], str(folders["llama"])
    with ModelClient(url) as client:
        client.load_model(name)
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(client.batch_forward, "x", ["a"])
            wait_until(lambda: slow.done > 3)
            with ModelClient(url, model=name) as other:
                other.unload_model()
            with pytest.raises(ShuttingDown, match="unloaded"):
                work.result(30)


def test_a_body_that_is_refused_is_not_read_to_its_end(real: tuple[str, FastAPI, str]):
    """10 GB are announced, and the connection closes long before they could be sent."""
    value = json.dumps({"x": {"$tensor": "x"}})
    entry = {"dtype": "U8", "shape": [10 * 2**30], "data_offsets": [0, 10 * 2**30]}
    header = json.dumps({"__metadata__": {"sightline": value}, "x": entry}).encode()
    start = len(header).to_bytes(8, "little") + header
    for length in (f"Content-Length: {len(start) + 10 * 2**30}", "Transfer-Encoding: chunked"):
        with socket.create_connection((urlsplit(real[0]).hostname or "", urlsplit(real[0]).port or 0), 30) as wire:
            head = f"POST /attribution/get_hidden_states HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n{length}"
            body = start if length.startswith("Content") else b"%x\r\n%s\r\n" % (len(start), start)
            wire.sendall(head.encode() + b"\r\n\r\n" + body)
            answer = wire.makefile("rb").read()  # to the end of the connection
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer.lower()
        assert b"envelope_too_large" in answer


def test_a_client_that_goes_away_while_it_sends_leaves_nothing(real: tuple[str, FastAPI, str]):
    packed = b"".join(pack({"x": torch.zeros(200_000)}))
    connection = http.client.HTTPConnection(urlsplit(real[0]).netloc, timeout=30)
    connection.putrequest("POST", "/attribution/get_hidden_states")
    connection.putheader("Content-Type", MEDIA_TYPE)
    connection.putheader("Content-Length", str(len(packed)))
    connection.endheaders(packed[: len(packed) // 2])
    room = real[1].state.sightline.room
    wait_until(lambda: room.used > 0)
    connection.close()
    wait_until(lambda: room.used == 0)
