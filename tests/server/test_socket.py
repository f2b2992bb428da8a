"""A real server in a process of its own, over a real socket: what cannot be seen in process."""

import asyncio
import http.client
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from tests.attribution.plain import distance, watch
from tests.models import save_tiny
from tests.server.process import KEY, Process, start
from tests.server.support import HELLO, HELLO_TEXT, encode, plain, plain_greedy, wait_until


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for this file, stopped by its own process id."""
    folder = tmp_path_factory.mktemp("socket")
    started = start(folder, str(save_tiny("qwen3", folder / "model", max_position_embeddings=100_000)))
    yield started
    started.process.terminate()
    try:
        started.process.communicate(timeout=30)
    finally:
        started.process.kill()
        started.process.communicate()


def test_a_chat_with_savepoints_over_a_socket(real: Process):
    with real.client() as client:
        answer = client.chat.completions.create(
            model=real.model,
            messages=HELLO,
            temperature=0,
            max_tokens=6,
            logprobs=True,
            extra_body={"ignore_eos": True, "savepoints": [{"name": "a", "selector": "resid_post[*]"}]},
        )
    file = answer.choices[0].message.activation_files["a"]  # type: ignore[attr-defined]
    assert Path(file).parent.parent.parent == real.runs
    prompt = encode(HELLO_TEXT)
    fed = prompt + plain_greedy("qwen3", prompt, 6)[:-1]
    found = torch.load(file, weights_only=True, mmap=True)
    assert distance(found, watch(plain("qwen3"), fed)["resid_post"][:, 0]) < 3e-5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    run = json.loads(real.get(f"/runs/{answer.choices[0].message.run_id}"))  # type: ignore[attr-defined]
    assert run["choices"][0]["token_ids"][:-1] == fed


def test_a_wrong_key_is_refused_over_a_socket(real: Process):
    with OpenAI(base_url=f"{real.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_refused_request_leaves_the_connection_usable(real: Process):
    host = real.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    headers = {"X-Api-Key": KEY, "Content-Type": "application/json"}
    for body, status in (
        (b"{", 400),
        (b"{}", 400),
        (b'{"model": "x", "messages": [{"role": "user", "content": "x"}]}', 404),
    ):
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        assert (answer.status, set(json.loads(answer.read()))) == (status, {"error"})
    connection.request("GET", "/v1/models", headers=headers)
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == real.model
    connection.close()


def test_a_stream_comes_while_it_is_generated_and_ends_when_its_client_closes_it(real: Process):
    with real.client() as client:
        stream = client.chat.completions.create(
            model=real.model,
            messages=HELLO,
            max_tokens=90_000,
            stream=True,
            extra_body={"ignore_eos": True, "savepoints": [{"name": "a", "selector": "logits", "positions": "last"}]},
        )
        for count, _ in enumerate(stream):
            if count == 20:
                break
        assert not real.idle()  # 90,000 tokens are far from done
        stream.close()
    wait_until(real.idle, 20)
    assert not [path for path in real.runs.iterdir() if path.name.startswith(".")]


def test_a_request_whose_connection_closes_ends_its_generation(real: Process):
    before = real.steps()
    connection = http.client.HTTPConnection(real.url.removeprefix("http://"), timeout=30)
    body = {"model": real.model, "messages": HELLO, "max_tokens": 90_000, "ignore_eos": True}
    headers = {"X-Api-Key": KEY, "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    wait_until(lambda: real.steps() > before + 3)
    assert not real.idle()
    connection.close()
    wait_until(real.idle, 20)
    wait_until(lambda: 499 in [line["status"] for line in real.requests()], 10)


def test_eight_clients_at_once_over_sockets(real: Process):
    words = ["a", "the other one", "in an answer " * 4, "re", "x y z", "who? " * 9, "", "no"]

    def ask(index: int) -> Any:
        with real.client() as client:
            return client.chat.completions.create(
                model=real.model,
                messages=[{"role": "user", "content": words[index]}],
                temperature=0,
                max_tokens=10 + index,
                extra_body={
                    "ignore_eos": True,
                    "savepoints": [{"name": f"own{index}", "selector": f"resid_post[{index % 3}]"}],
                },
            )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for index, answer in enumerate(answers):
        prompt = encode(f"<|im_start|>user\n{words[index]}<|im_end|>\n<|im_start|>assistant\n")
        tokens = plain_greedy("qwen3", prompt, 10 + index)
        message = answer.choices[0].message
        run = json.loads(real.get(f"/runs/{message.run_id}"))
        assert run["choices"][0]["token_ids"] == prompt + tokens
        (name,) = message.activation_files
        assert name == f"own{index}"
        found = torch.load(message.activation_files[name], weights_only=True)
        assert distance(found, watch(plain("qwen3"), prompt + tokens[:-1])["resid_post"][index % 3, 0]) < 3e-5


def test_the_asynchronous_sdk_is_served_too(real: Process):
    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{real.url}/v1", api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model=real.model, messages=HELLO, seed=1, max_tokens=6)
                    for _ in range(3)
                )
            )
            return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


def test_each_request_is_one_line_of_the_log_file(real: Process):
    before = len(real.requests())
    real.get("/health")
    real.get("/nope")
    wait_until(lambda: len(real.requests()) == before + 2, 10)
    assert [(line["path"], line["status"]) for line in real.requests()[before:]] == [("/health", 200), ("/nope", 404)]
    assert KEY not in real.log.read_text()


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_ends_an_endless_stream_and_stops(tmp_path: Path):
    started = start(tmp_path, str(save_tiny("qwen3", tmp_path / "model", max_position_embeddings=100_000)))
    try:
        with started.client() as client:
            stream = client.chat.completions.create(
                model=started.model, messages=HELLO, max_tokens=90_000, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            started.process.send_signal(signal.SIGTERM)
            with pytest.raises((openai.APIError, httpx2.TransportError)):
                for _ in stream:
                    pass
        assert started.process.wait(20) in (0, -signal.SIGTERM)
    finally:
        started.process.kill()
        started.process.communicate()
