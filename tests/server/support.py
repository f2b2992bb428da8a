"""What the tests of the server share: apps in process, the OpenAI SDK on them, plain transformers as oracle."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from openai import OpenAI
from openai.types.chat import ChatCompletion
from starlette.testclient import TestClient
from torch import Tensor

from server.app import create_app
from server.registry import LoadedModel
from server.settings import Settings
from tests.models import tiny_model, tiny_tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
HELLO_TEXT = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
LAST_LOGITS = [{"name": "last", "selector": "logits", "positions": "last"}]
"""The smallest savepoint: with it a run is recorded, and the run tells the token ids."""


@dataclass(frozen=True)
class Served:
    """A server in this process: its app, an HTTP client, and the OpenAI SDK on that client."""

    app: FastAPI
    http: TestClient
    openai: OpenAI
    runs: Path
    names: dict[str, str] = field(default_factory=dict)

    def loaded(self, model: str) -> LoadedModel:
        """The entry of a model in the registry."""
        return self.app.state.sightline.registry.get(model)

    def chat(self, model: str, messages: list[Any] = HELLO, **body: Any) -> ChatCompletion:
        """One chat through the SDK; what the SDK has no argument for goes through `extra_body`."""
        extra = {name: body.pop(name) for name in _EXTRA if name in body}
        return self.openai.chat.completions.create(model=model, messages=messages, extra_body=extra, **body)

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
        """The plain HTTP response to a JSON body."""
        return self.http.post(path, json=body)

    def run(self, answer: Any) -> dict[str, Any]:
        """The run.json of a chat's run."""
        run_id = answer.choices[0].message.run_id
        return json.loads((self.runs / run_id / "run.json").read_text())

    def generated(self, answer: Any, choice: int = 0) -> list[int]:
        """The token ids that a recorded chat has generated."""
        record = self.run(answer)["choices"][choice]
        return record["token_ids"][record["prompt_tokens"] :]

    def steps(self, model: str) -> float:
        """How many steps the model has taken."""
        metrics = self.app.state.sightline.metrics.registry
        return metrics.get_sample_value("sightline_step_seconds_count", {"model": model}) or 0.0

    def idle(self, model: str) -> bool:
        """Whether the model has stopped taking steps."""
        before = self.steps(model)
        time.sleep(0.15)
        return self.steps(model) == before

    @contextmanager
    def held(self, model: str) -> Iterator[None]:
        """While this is open, the thread of `model` does nothing: what is sent waits, and starts together."""
        entered, release = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            release.wait(60)

        job = self.loaded(model).worker.submit(hold)
        assert entered.wait(60)
        try:
            yield
        finally:
            release.set()
            job.result(60)

    def together(self, model: str, calls: list[Callable[[], Any]], sequences: int | None = None) -> list[Any]:
        """The results of `calls`, which all wait in the queue before the first of them starts."""
        with ThreadPoolExecutor(len(calls)) as pool:
            with self.held(model):
                futures = [pool.submit(call) for call in calls]
                worker, expected = self.loaded(model).worker, sequences or len(calls)
                wait_until(lambda: worker.queue_length == expected or any(f.done() for f in futures))
            return [future.result(120) for future in futures]


_EXTRA = (
    "top_k min_p repetition_penalty ignore_eos store_activations savepoints chat_template_kwargs interventions baseline"
).split()


@contextmanager
def serve(folder: Path, *, key: str = "x", **settings: Any) -> Iterator[Served]:
    """A server with these settings, its runs below `folder`."""
    app = create_app(Settings(**{"store_dir": folder / "store", "activations_dir": folder / "runs"} | settings))
    with TestClient(app, raise_server_exceptions=False) as http:
        client = OpenAI(base_url="http://testserver/v1", api_key=key, http_client=http, max_retries=0)
        yield Served(app, http, client, folder / "runs")


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition; fail when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not come"
        time.sleep(0.002)


@cache
def plain(family: str, seed: int = 0) -> Any:
    """The model as plain transformers has it, with attention that returns its pattern."""
    model = tiny_model(family, seed)
    model.set_attn_implementation("eager")
    return model


@cache
def tokenizer() -> Any:
    """The tokenizer of all tiny models."""
    return tiny_tokenizer()


def encode(text: str) -> list[int]:
    """Text to token ids; special tokens by their names."""
    return tokenizer().encode(text, add_special_tokens=False)


def decode(ids: list[int]) -> str:
    """Token ids to text as a reader sees it."""
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def plain_logits(family: str, ids: list[int]) -> Tensor:
    """Row p: the logits that follow token p, from one plain forward over all of `ids`."""
    with torch.no_grad():
        return plain(family)(input_ids=torch.tensor([ids])).logits[0]


def plain_logprobs(family: str, ids: list[int]) -> Tensor:
    """The log-softmax of `plain_logits`, in float64."""
    return plain_logits(family, ids).double().log_softmax(-1)


def plain_greedy(family: str, ids: list[int], count: int) -> list[int]:
    """What transformers' own greedy `generate` appends to `ids`."""
    prompt = torch.tensor([ids])
    made = plain(family).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


@cache
def readable() -> dict[str, int]:
    """A `logit_bias` that leaves only tokens of printable ASCII text."""
    texts = {token: decode([token]) for token in range(len(tokenizer()))}
    return {str(t): -100 for t, text in texts.items() if not (text and text.isascii() and text.isprintable())}


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected tensor; NaN when either holds one."""
    assert found.shape == expected.shape
    scale = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / scale)


def error_of(response: Any) -> dict[str, Any]:
    """The error of a refused request; its body has nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
