"""Streams: well-formed, and together the same as the answer in one piece."""

import json
from collections import defaultdict
from typing import Any

import pytest

from server import replies
from tests.server.support import HELLO, LAST_LOGITS, Served, decode, readable, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def _events(served: Served, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    """The JSON of all events of a stream; its framing is checked."""
    answer = served.post(body | {"stream": True}, path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.fixture
def chunks(house: Served, qwen: str) -> list[Any]:
    body = {"model": qwen, "messages": HELLO, "n": 2, "seed": 5, "max_tokens": 6, "ignore_eos": True}
    return _events(house, body | {"savepoints": LAST_LOGITS, "stream_options": {"include_usage": True}})


def test_all_chunks_have_one_head(chunks, qwen: str):
    heads = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    assert len(heads) == 1
    ((name, kind, _, model),) = heads
    assert name.startswith("chatcmpl-")
    assert (kind, model) == ("chat.completion.chunk", qwen)


def test_the_role_comes_first_and_once_for_each_choice(chunks):
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in deltas[1:])


def test_each_chunk_has_one_choice_and_only_the_last_of_each_a_finish_reason(chunks):
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert all(len(c["choices"]) == 1 for c in chunks[:-1])


def test_the_run_comes_in_the_last_chunk_of_each_choice_and_its_files_are_there(chunks, house: Served):
    for index in (0, 1):
        own = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert not any("run_id" in c["choices"][0]["delta"] for c in own[:-1])
        delta = own[-1]["choices"][0]["delta"]
        run_id = delta["run_id"]
        assert own[-1]["id"] == f"chatcmpl-{run_id}"
        assert delta["session_id"] == run_id[:8]
        file = house.runs / run_id / str(index) / "last.pt"
        assert delta["activation_files"] == {"last": str(file)}
        assert file.is_file()
        assert own[-1]["activations_meta"]["last"]["shape"] == [1, 281]


def test_the_usage_comes_last_in_a_chunk_without_choices(chunks):
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert not any(c.get("usage") for c in chunks[:-1])


def test_without_include_usage_there_is_none(house: Served, qwen: str):
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        events = _events(house, {"model": qwen, "messages": HELLO, "max_tokens": 2} | options)
        assert all(event["choices"] and not event.get("usage") for event in events)


BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "any bytes": {"seed": 4, "ignore_eos": True},
    "choices": {"seed": 4, "n": 3},
    "readable": {"seed": 11, "logit_bias": readable()},
    "ended": {"logit_bias": {"280": 100}},
    "stopped within": {"seed": 11, "logit_bias": readable(), "stop": []},  # filled in below
    "held back": {"logit_bias": {"34": 100}, "stop": ["CCCCCCCCD", "CD"]},
    "cut": {"logit_bias": {"34": 100}, "stop": "CCCC"},
    "penalties": {"seed": 2, "presence_penalty": 1, "frequency_penalty": 0.5, "top_p": 0.9, "top_k": 50},
}


@pytest.fixture(scope="module")
def stop(house: Served) -> str:
    """Four characters from the middle of the readable answer."""
    answer = house.chat(house.names["qwen3"], seed=11, logit_bias=readable(), max_tokens=30)
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content[9:13]


@pytest.mark.parametrize(
    ("name", "logprobs"), [("greedy", {}), *((name, {"logprobs": True, "top_logprobs": 3}) for name in BODIES)]
)
def test_a_streamed_chat_is_the_chat_in_one_piece(house: Served, qwen: str, stop: str, name: str, logprobs):
    body = BODIES[name] | ({"stop": ["no", stop]} if name == "stopped within" else {}) | logprobs
    whole = house.post({"model": qwen, "messages": HELLO, "max_tokens": 24} | body).json()
    told = {
        "model": qwen,
        "messages": HELLO,
        "max_tokens": 24,
        "stream_options": {"include_usage": True},
    } | body
    events = _events(house, told)
    texts: dict[int, str] = defaultdict(str)
    entries: dict[int, list[Any]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for event in events[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        entries[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert len(texts) == len(whole["choices"])
    for choice in whole["choices"]:
        index = choice["index"]
        assert texts[index] == choice["message"]["content"]
        assert reasons[index] == choice["finish_reason"]
        assert entries[index] == ([] if not logprobs else choice["logprobs"]["content"])
    if name == "stopped within":
        assert reasons == {0: "stop"}
        assert stop not in texts[0]
        assert len(texts[0]) > 3


def test_the_text_comes_in_many_pieces_none_of_them_half_a_character(house: Served, qwen: str):
    bias = {str(token): 100.0 for token in range(256) if decode([token]) == "\ufffd"}
    body = {"model": qwen, "messages": HELLO, "max_tokens": 40, "seed": 1, "logit_bias": readable()}
    events = _events(house, body)
    assert len(events) > 25
    body |= {"logit_bias": bias}
    texts = [event["choices"][0]["delta"].get("content", "") for event in _events(house, body)]
    whole = house.post(body).json()["choices"][0]["message"]["content"]
    assert "".join(texts) == whole


def test_the_sdk_reads_the_stream(house: Served, qwen: str):
    stream = house.chat(qwen, temperature=0, max_tokens=8, ignore_eos=True, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)  # type: ignore[union-attr]
    assert text == house.chat(qwen, temperature=0, max_tokens=8, ignore_eos=True).choices[0].message.content


def test_a_bug_in_the_middle_of_a_stream_breaks_it_off_and_ends_its_generation(
    house: Served, qwen: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing that looks like an end is sent; and the next stream is served."""
    made, make, before = [], replies.chat_chunk, house.steps(qwen)

    def failing(*args: Any) -> Any:
        made.append(args)
        if len(made) == 4:
            raise ZeroDivisionError("nobody thought of this")
        return make(*args)

    body = {"model": qwen, "messages": HELLO, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    with monkeypatch.context() as patch:
        patch.setattr(replies, "chat_chunk", failing)
        answer = house.post(body | {"stream": True})
        assert "[DONE]" not in answer.text
        assert '"finish_reason":"' not in answer.text
    wait_until(lambda: house.idle(qwen))
    assert house.steps(qwen) - before < 150
    assert len(_events(house, body | {"max_tokens": 3})) >= 3


# The same for completions.


@pytest.mark.parametrize(
    ("name", "echo", "logprobs"),
    [("any bytes", False, None), ("greedy", False, 2), *((name, True, 2) for name in BODIES)],
)
def test_a_streamed_completion_is_the_completion_in_one_piece(
    house: Served, qwen: str, stop: str, name: str, echo: bool, logprobs
):
    body = {
        "model": qwen,
        "prompt": ["Hello there", "re"],
        "max_tokens": 20,
        "echo": echo,
        "logprobs": logprobs,
    }
    body |= BODIES[name] | ({"stop": ["no", stop]} if name == "stopped within" else {})
    whole = house.post(body, COMPLETIONS).json()
    events = _events(house, body | {"stream_options": {"include_usage": True}}, COMPLETIONS)
    assert {(event["object"], event["model"]) for event in events} == {("text_completion", qwen)}
    texts: dict[int, str] = defaultdict(str)
    columns: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    reasons: dict[int, str] = {}
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        for column, values in (choice["logprobs"] or {}).items():
            columns[choice["index"]][column] += values
        reasons[choice["index"]] = choice["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert sorted(texts) == list(range(2 * BODIES[name].get("n", 1)))
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert reasons[choice["index"]] == choice["finish_reason"]
        assert dict(columns[choice["index"]]) == (choice["logprobs"] or {})


def test_the_run_of_a_streamed_completion_comes_with_its_finish_reason(house: Served, qwen: str):
    body = {"model": qwen, "prompt": "Hello", "max_tokens": 3, "ignore_eos": True, "savepoints": LAST_LOGITS}
    events = _events(house, body, COMPLETIONS)
    last = events[-1]["choices"][0]
    assert last["finish_reason"] == "length"
    assert events[-1]["id"] == f"cmpl-{last['run_id']}"
    assert last["activation_files"] == {"last": str(house.runs / last["run_id"] / "0" / "last.pt")}
    assert not any("run_id" in event["choices"][0] for event in events[:-1])
