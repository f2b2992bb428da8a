"""How requests share a model: the queue, those who leave, those who fail, and long prompts among short ones."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution.errors import CaptureTooLarge, SightlineError
from attribution.model.decode import DecodeBatch, Prefill
from server.generation.engine import make_engine
from server.generation.sampling import Sampler, SamplingParams
from server.generation.sequence import Delta, Finished, Sequence
from server.generation.text import TextStream
from server.metrics import Metrics
from tests.models import save_tiny, traced
from tests.server.support import (
    HELLO,
    HELLO_TEXT,
    LAST_LOGITS,
    Served,
    encode,
    error_of,
    plain_greedy,
    relative,
    serve,
    tokenizer,
    wait_until,
)

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory):
    """A server whose model has a window so long that a generation does not end while a test looks on."""
    folder = tmp_path_factory.mktemp("long")
    model = str(save_tiny("qwen3", folder / "model", max_position_embeddings=100_000))
    with serve(folder, model=model, max_queue=4, max_batch=3) as served:
        yield served, model


def _endless(model: str, **body: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": 90_000, "ignore_eos": True} | body


class _Client:
    """A client that can leave: it drives the app itself, on the app's own loop."""

    def __init__(self, served: Served, body: dict[str, Any], path: str = CHAT) -> None:
        self.sent: list[dict[str, Any]] = []
        self.leave = threading.Event()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "server": ("testserver", 80),
            "client": ("testclient", 50000),
            "root_path": "",
        }
        self._body = json.dumps(body).encode()
        self._read = False
        assert served.http.portal is not None
        self.done = served.http.portal.start_task_soon(self._run, served.app)

    async def _run(self, app: Any) -> None:
        await app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        while not self.leave.is_set():
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


# The queue.


def test_a_full_queue_is_a_429_that_says_when_to_come_back(long):
    served, model = long
    body = {"model": model, "messages": HELLO, "max_tokens": 2, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        with served.held(model):
            waiting = [pool.submit(served.post, body) for _ in range(4)]
            wait_until(lambda: served.http.get("/health").json()["queue_length"] == 4)
            refused = served.post(body)
            error = error_of(refused)
            assert (refused.status_code, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
            assert int(refused.headers["retry-after"]) >= 1
            assert "4" in error["message"]
            with pytest.raises(openai.RateLimitError):
                served.chat(model, max_tokens=2)
        assert [answer.result(60).status_code for answer in waiting] == [200] * 4
    assert served.post(body).status_code == 200


def test_the_choices_of_a_request_are_queued_all_or_none(long):
    served, model = long
    body = {"model": model, "messages": HELLO, "max_tokens": 2, "n": 3}
    with ThreadPoolExecutor(1) as pool:
        with served.held(model):
            first = pool.submit(served.post, body)
            wait_until(lambda: served.loaded(model).worker.queue_length == 3)
            assert served.post(body | {"n": 2}).status_code == 429
            assert served.loaded(model).worker.queue_length == 3
        assert len(first.result(60).json()["choices"]) == 3


def test_a_request_larger_than_the_queue_is_refused_for_good(long):
    served, model = long
    answer = served.post({"model": model, "messages": HELLO, "max_tokens": 2, "n": 5})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert "5" in error["message"]
    assert "--max-queue" in error["message"]


def test_no_more_than_max_batch_share_a_step(long):
    served, model = long
    answer = served.chat(model, n=4, temperature=0, max_tokens=6, ignore_eos=True, savepoints=LAST_LOGITS)
    largest = [choice["largest_batch"] for choice in served.run(answer)["choices"]]
    assert max(largest) == 3
    expected = plain_greedy("qwen3", encode(HELLO_TEXT), 6)
    assert [served.generated(answer, index) for index in range(4)] == [expected] * 4


# Those who leave.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(long, stream: bool):
    served, model = long
    before = served.steps(model)
    client = _Client(served, _endless(model, stream=stream, savepoints=LAST_LOGITS))
    wait_until(lambda: served.steps(model) > before + 3)
    assert not client.done.done()
    client.leave.set()
    client.done.result(10)
    status = client.sent[0]["status"]
    assert status == (200 if stream else 499)  # the second for the log: nobody is there to read it
    wait_until(lambda: served.idle(model), 10)
    assert not served.runs.exists() or not [path for path in served.runs.iterdir() if path.name.startswith(".")]
    assert served.chat(model, max_tokens=2, ignore_eos=True).usage.completion_tokens == 2  # type: ignore[union-attr]


def test_one_who_leaves_does_not_disturb_the_others(long):
    served, model = long
    expected = plain_greedy("qwen3", encode(HELLO_TEXT), 60)
    before = served.steps(model)
    client = _Client(served, _endless(model, stream=True))
    wait_until(lambda: served.steps(model) > before + 3)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(served.chat, model, temperature=0, max_tokens=60, ignore_eos=True, savepoints=LAST_LOGITS)
        wait_until(lambda: served.steps(model) > before + 12)
        client.leave.set()
        answer = stays.result(60)
    assert served.generated(answer) == expected
    assert served.run(answer)["choices"][0]["largest_batch"] == 2
    client.done.result(10)
    wait_until(lambda: served.idle(model), 10)


def test_one_who_leaves_the_queue_makes_room_at_once(long):
    served, model = long
    steps = served.steps(model)
    running = [_Client(served, _endless(model)) for _ in range(3)]
    wait_until(lambda: served.steps(model) > steps + 3 and not served.loaded(model).worker.queue_length)
    waiting = [_Client(served, _endless(model)) for _ in range(4)]
    wait_until(lambda: served.loaded(model).worker.queue_length == 4)
    assert served.post(_endless(model)).status_code == 429
    waiting[1].leave.set()
    waiting[1].done.result(10)
    wait_until(lambda: served.loaded(model).worker.queue_length == 3, 10)
    for client in (*waiting, *running):
        client.leave.set()
        client.done.result(20)
    wait_until(lambda: served.loaded(model).worker.queue_length == 0 and served.idle(model), 20)


def test_a_client_that_goes_away_before_anything_was_sent_leaves_nothing_behind(long):
    served, model = long
    with served.held(model):
        clients = [_Client(served, _endless(model, stream=stream)) for stream in (False, True)]
        wait_until(lambda: served.loaded(model).worker.queue_length == 2)
        for client in clients:
            client.leave.set()
            client.done.result(10)
    wait_until(lambda: served.loaded(model).worker.queue_length == 0 and served.idle(model), 10)


# Those who fail.


def _failing_once(method: Any, error: BaseException, after: int = 3) -> Any:
    """`method`, whose call number `after` raises."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            raise error
        return method(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ZeroDivisionError("nobody thought of this"), 500, "internal_error"),
        (torch.OutOfMemoryError("no memory"), 503, "out_of_memory"),
    ],
    ids=["bug", "memory"],
)
@pytest.mark.parametrize(
    "where",
    [
        "a step",
        "the prompt",
        "the first token",
        "a later token",
        "joining",
    ],
)
def test_an_exception_ends_what_is_under_way_and_the_server_serves(
    long, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, status: int, code: str
):
    served, model = long
    holder, name, after = {
        "a step": (DecodeBatch, "step", 3),
        "the prompt": (Prefill, "advance", 1),
        "the first token": (Sampler, "choose", 1),
        "a later token": (Sampler, "choose", 4),
        "joining": (DecodeBatch, "join", 1),
    }[where]
    body = {"model": model, "messages": HELLO, "max_tokens": 8, "ignore_eos": True, "savepoints": LAST_LOGITS}
    before = set(served.runs.iterdir()) if served.runs.exists() else set()
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, _failing_once(getattr(holder, name), error, after))
        # three fit the batch and fail together; the fourth waits, and is served
        answers = served.together(model, [lambda: served.post(body) for _ in range(4)])
    failed = [answer for answer in answers if answer.status_code != 200]
    assert len(failed) == 3
    for answer in failed:
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert len(list(served.runs.iterdir())) == len(before) + 1
    assert served.post(body).status_code == 200


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory):
    """A server whose model computes NaN wherever it has read token 200."""
    folder = tmp_path_factory.mktemp("damaged")
    save_tiny("qwen3", folder / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][200] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    with serve(folder, model=str(folder / "model")) as served:
        assert served.loaded(str(folder / "model")).model.family is not None
        yield served, str(folder / "model")


def test_nan_logits_fail_their_own_request_and_no_other(damaged):
    served, model = damaged
    body = {"model": model, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    prompts = [[5, 6, 7], [5, 200, 7], [9, 8]]
    answers = served.together(
        model, [lambda p=p: served.post(body | {"prompt": p}, "/v1/completions") for p in prompts]
    )
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert error_of(answers[1])["code"] == "not_finite"
    for answer, prompt in zip((answers[0], answers[2]), (prompts[0], prompts[2]), strict=True):
        alone = served.post(body | {"prompt": prompt}, "/v1/completions").json()
        assert answer.json()["choices"][0]["text"] == alone["choices"][0]["text"]


# The engine, turn by turn.


class _Row:
    """A sequence, and what it has told."""

    def __init__(self, prompt: list[int], limit: int, **fields: Any) -> None:
        self.events: list[Delta | Finished] = []
        self.sequence = Sequence(
            prompt=prompt,
            limit=limit,
            sampler=Sampler(SamplingParams(temperature=0.0), prompt, 0, 0),
            text=TextStream(tokenizer()),
            end_ids=frozenset(),
            emit=self.events.append,
            **fields,
        )

    @property
    def count(self) -> int:
        return len(self.sequence.tokens)


def _ids(length: int, first: int = 5) -> list[int]:
    """A prompt of this length; its tokens differ."""
    return [(first + 37 * i + i * i) % 256 for i in range(length)]


def _run(engine: Any) -> None:
    while engine.busy:
        engine.turn()


def test_a_long_prompt_is_fed_in_pieces_and_the_others_take_a_step_between_any_two():
    engine = make_engine(traced("qwen3"), 4, 16, Metrics())
    talking, long_prompt, late = _Row(_ids(6), 60), _Row(_ids(200, 9), 5), _Row(_ids(7, 77), 5)
    engine.waiting.append(talking.sequence)
    engine.turn()
    assert talking.count >= 1
    engine.waiting.append(long_prompt.sequence)
    turns = 0
    while not long_prompt.count:
        before = talking.count
        engine.turn()
        turns += 1
        assert talking.count == before + 1
    assert turns == 13  # 200 tokens, 16 at a time
    engine.waiting.append(late.sequence)
    _run(engine)
    for row in (talking, long_prompt, late):
        assert row.sequence.tokens == plain_greedy("qwen3", row.sequence.prompt, row.sequence.limit)
        assert row.events == [Finished()]


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_before():
    engine = make_engine(traced("qwen3"), 4, 16, Metrics())
    long_prompt, short = _Row(_ids(200), 3), _Row(_ids(7, 77), 3)
    engine.waiting.append(long_prompt.sequence)
    engine.turn()
    engine.waiting.append(short.sequence)
    engine.turn()
    engine.turn()
    assert short.count >= 1
    assert long_prompt.count == 0
    _run(engine)
    for row in (long_prompt, short):
        assert row.sequence.tokens == plain_greedy("qwen3", row.sequence.prompt, 3)


def test_a_long_prompt_gets_its_turn_although_short_ones_keep_coming():
    engine = make_engine(traced("qwen3"), 4, 16, Metrics())
    long_prompt = _Row(_ids(100), 2)
    engine.waiting.append(long_prompt.sequence)
    engine.turn()
    for turn in range(60):
        engine.waiting.append(_Row(_ids(8, turn), 1).sequence)
        engine.turn()
    assert long_prompt.count > 0


def test_requests_join_and_leave_between_steps():
    engine = make_engine(traced("gemma2"), 4, 512, Metrics())
    rows = [_Row(_ids(4 + 3 * i, 11 * i), 3 + 4 * (i % 3)) for i in range(9)]
    for row in rows:
        engine.waiting.append(row.sequence)
        engine.turn()
    _run(engine)
    for row in rows:
        assert row.sequence.tokens == plain_greedy("gemma2", row.sequence.prompt, row.sequence.limit)
        assert 2 <= row.sequence.largest_batch <= 4


def test_a_cancelled_sequence_takes_no_further_step():
    engine = make_engine(traced("qwen3"), 4, 512, Metrics())
    rows = [_Row(_ids(5 + i), 50) for i in range(3)]
    engine.waiting.extend(row.sequence for row in rows)
    for _ in range(4):
        engine.turn()
    rows[1].sequence.cancelled = True
    count = rows[1].count
    _run(engine)
    assert rows[1].count == count
    assert [row.count for row in (rows[0], rows[2])] == [50, 50]
    (event,) = rows[1].events
    assert isinstance(event, Finished)
    assert event.error is not None
    assert event.error.code == "cancelled"
    assert rows[2].sequence.tokens == plain_greedy("qwen3", rows[2].sequence.prompt, 50)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_an_engine_that_has_failed_takes_new_work(max_batch: int):
    engine = make_engine(traced("qwen3"), max_batch, 8, Metrics())
    rows = [_Row(_ids(30), 50), _Row(_ids(5), 50)]
    engine.waiting.extend(row.sequence for row in rows)
    if max_batch > 1:
        engine.turn()
        engine.turn()
        engine.fail(SightlineError("all of it"))
        assert [len(row.events) for row in rows] == [1, 1] or engine.waiting
    _run(engine)
    fresh = _Row(_ids(9), 4)
    engine.waiting.append(fresh.sequence)
    _run(engine)
    assert fresh.sequence.tokens == plain_greedy("qwen3", fresh.sequence.prompt, 4)


def test_an_error_of_one_sequence_is_its_own():
    class Greedy:
        """A recorder that has had enough after eight positions."""

        tail, savepoints = 1, ()

        def wanted(self, start: int, stop: int) -> set[Any]:
            return set()

        def take(self, fed: Any, row: int) -> None:
            if fed.ends[row] > 8:
                raise CaptureTooLarge("enough")

    engine = make_engine(traced("qwen3"), 4, 512, Metrics())
    rows = [_Row(_ids(5), 10), _Row(_ids(5), 10)]
    rows[1].sequence.recorder = Greedy()  # type: ignore[assignment]
    engine.waiting.extend(row.sequence for row in rows)
    _run(engine)
    assert rows[0].count == 10
    (event,) = rows[1].events
    assert isinstance(event, Finished)
    assert isinstance(event.error, CaptureTooLarge)
    assert rows[1].count == 4


# In pieces over HTTP: the same answers, tensors and scores as with the prompt in one piece.


def test_prompts_fed_in_pieces_give_the_same_tensors_scores_and_answers(
    house: Served, folders: dict[str, Path], tmp_path: Path
):
    model = str(folders["gemma2"])
    words = ["one two three four five six " * 3, "a", "the other " * 6]
    sets = [
        [{"name": "a", "selector": "resid_post[*]"}, {"name": "b", "selector": "pattern[0]"}],
        [{"name": "a", "selector": "lm_head.output", "positions": "prompt"}],
        [{"name": "a", "selector": "logits", "positions": {"start": 3, "step": 5}}, {"name": "b", "selector": "k[1]"}],
    ]

    def ask(served: Served, index: int) -> Any:
        messages = [{"role": "user", "content": words[index]}]
        return served.chat(model, messages, temperature=0, max_tokens=6, ignore_eos=True, savepoints=sets[index])

    scoring = {"model": model, "prompt": [_ids(70), _ids(9)], "max_tokens": 2, "echo": True, "logprobs": 2}
    with serve(tmp_path, model=model, prefill_chunk=7) as pieces:
        answers = pieces.together(model, [lambda i=i: ask(pieces, i) for i in range(3)])
        for index, found in enumerate(answers):
            expected = ask(house, index)
            assert found.choices[0].message.content == expected.choices[0].message.content
            for name, meta in expected.activations_meta.items():
                other = found.activations_meta[name]
                assert {k: v for k, v in other.items() if k != "file"} == {k: v for k, v in meta.items() if k != "file"}
                one, two = (torch.load(m["file"], weights_only=True) for m in (other, meta))
                assert relative(one, two) < 3e-6
        options = scoring | {"temperature": 0}
        whole, split = (s.post(options, "/v1/completions").json()["choices"] for s in (house, pieces))
        for one, two in zip(whole, split, strict=True):
            assert one["logprobs"]["tokens"] == two["logprobs"]["tokens"]
            assert one["logprobs"]["token_logprobs"][0] is two["logprobs"]["token_logprobs"][0] is None
            assert one["logprobs"]["token_logprobs"][1:] == pytest.approx(
                two["logprobs"]["token_logprobs"][1:], abs=1e-4
            )


# Jobs of others on the model's thread.


def test_jobs_run_on_the_models_thread_between_the_steps_of_a_generation(long):
    served, model = long
    before = served.steps(model)
    client = _Client(served, _endless(model))
    wait_until(lambda: served.steps(model) > before + 3)
    worker = served.loaded(model).worker
    seen = []
    for _ in range(5):
        name, step = worker.submit(lambda: (threading.current_thread().name, served.steps(model))).result(10)
        assert name == f"model-{model}"
        seen.append(step)
        wait_until(lambda last=step: served.steps(model) > last + 1)
    assert seen == sorted(set(seen))
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result(10)
    last = served.steps(model)
    wait_until(lambda: served.steps(model) > last + 1)
    client.leave.set()
    client.done.result(10)


def test_many_jobs_do_not_keep_a_generation_from_going_on(long):
    """Between any two jobs the generation takes a turn."""
    served, model = long
    before = served.steps(model)
    client = _Client(served, _endless(model))
    wait_until(lambda: served.steps(model) > before + 3)
    worker = served.loaded(model).worker
    with served.held(model):
        jobs = [worker.submit(lambda: served.steps(model)) for _ in range(10)]
    counts = [job.result(30) for job in jobs]
    assert all(later >= earlier + 1 for earlier, later in pairwise(counts))
    client.leave.set()
    client.done.result(10)
    wait_until(lambda: served.idle(model), 10)
