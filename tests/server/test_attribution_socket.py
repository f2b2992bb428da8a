"""Attribution on a real server: killed in the middle of its work, and shared by many clients at once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from attribution.errors import SightlineError
from clients import ModelClient
from tests.attribution.plain import distance, prompts_of
from tests.models import D_MODEL, N_LAYERS, save_tiny
from tests.server.process import KEY, Process, start
from tests.server.support import wait_until

PROMPTS = prompts_of([40 + number % 20 for number in range(400)])
ENOUGH = 5  # samples on disk, before the server is killed


def stop(server: Process) -> None:
    server.process.terminate()
    try:
        server.process.communicate(timeout=30)
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_batch_forward_whose_server_is_killed_leaves_whole_samples_and_resumes(tmp_path: Path) -> None:
    model = str(save_tiny("qwen3", tmp_path / "model"))
    server, dataset, failures = start(tmp_path, model), tmp_path / "store" / "d", []

    def run() -> None:
        try:
            with ModelClient(server.url, api_key=KEY, retries=0) as client:
                client.batch_forward("d", PROMPTS, show_progress=False)
        except SightlineError as error:
            failures.append(error)

    caller = threading.Thread(target=run)
    caller.start()
    try:
        wait_until(lambda: len(list(dataset.glob("*.safetensors"))) >= ENOUGH)
    finally:
        server.process.kill()
        server.process.communicate()
    caller.join(30)
    assert len(failures) == 1, "the caller is told"
    there = sorted(int(file.stem) for file in dataset.glob("*.safetensors"))
    assert ENOUGH <= len(there) < len(PROMPTS), "killed in the middle"
    for number in there:
        with safe_open(dataset / f"{number}.safetensors", "pt") as file:
            assert file.get_slice("resid").get_shape() == [N_LAYERS + 1, len(PROMPTS[number]), D_MODEL]

    again = start(tmp_path, model)
    try:
        with ModelClient(again.url, api_key=KEY) as client:
            assert client.list_cached_samples("d")["sample_ids"] == there
            before = client.get_hidden_states("d", there[0], N_LAYERS)
            reply = client.batch_forward("d", PROMPTS, show_progress=False)
            assert (reply["skipped"], reply["stored"]) == (len(there), len(PROMPTS) - len(there))
            assert client.list_cached_samples("d")["count"] == len(PROMPTS)
            assert torch.equal(client.get_hidden_states("d", there[0], N_LAYERS), before)
            last = next(number for number in range(len(PROMPTS)) if number not in there)
            resumed = client.get_hidden_states("d", last, N_LAYERS)
            client.forward("alone", 0, token_ids=PROMPTS[last])
            assert distance(resumed, client.get_hidden_states("alone", 0, N_LAYERS)) < 1e-5
    finally:
        stop(again)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for the tests that leave it running."""
    folder = tmp_path_factory.mktemp("attribution")
    server = start(folder, str(save_tiny("qwen3", folder / "model")))
    yield server
    stop(server)


def test_eight_clients_that_attribute_and_eight_that_chat_all_get_their_own_answers(real: Process) -> None:
    calls: list[Callable[[], Any]] = [lambda n=n: _attribute(real, n) for n in range(8)]
    calls += [lambda n=n: _chat(real, n) for n in range(8)]
    alone = [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(lambda call: call(), calls))
    assert len({str(answer) for answer in alone}) == len(calls), "answers that could be told apart"
    for single, shared in zip(alone, together, strict=True):
        if isinstance(single, Tensor):
            torch.testing.assert_close(shared, single, rtol=1e-4, atol=1e-5)
        else:
            assert shared == single


def _attribute(server: Process, number: int) -> Tensor:
    """A sample of its own, the gradient of its last token, and what it is attributed to."""
    tokens = PROMPTS[number]
    last = len(tokens) - 1
    with ModelClient(server.url, api_key=KEY) as client:
        client.forward("shared", number, token_ids=tokens)
        gradient = client.compute_node_gradient("shared", number, "lm_head", N_LAYERS, pos_ids=[last], labels=[7])
        keys = client.compute_node_gradient("shared", number, "attn_k", 1, pos_ids=[last], output_grad=gradient)
        scores = client.attribute_residual("shared", number, [last], [gradient, keys[:1]], [N_LAYERS, 1])
        ablated = client.ablate("shared", number, heads=[(1, 2)], labels=[7], pos_ids=[last])
        return torch.cat([scores.flatten(), torch.tensor([ablated["before"], ablated["after"]])])


def _chat(server: Process, number: int) -> str | None:
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": f"Count from {number}"}],
            max_tokens=24,
            seed=number,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].message.content


@pytest.mark.parametrize("body", [b"\x80\x04\x95pickled", (10 * 1024**3).to_bytes(8, "little") + b"{}"])
def test_a_body_of_tensors_that_is_none_is_refused_before_it_is_read(real: Process, body: bytes) -> None:
    headers = {"X-Api-Key": KEY, "Content-Type": "application/vnd.sightline+safetensors"}
    answer = httpx.post(f"{real.url}/attribution/get_hidden_states", content=body, headers=headers)
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["code"] in ("bad_envelope", "envelope_too_large")
