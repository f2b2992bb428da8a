"""What the OpenAI routes refuse: each with a status, a code, the field at fault, and words that help."""

import inspect
import json
from typing import Any

import openai
import pytest
from openai.resources.chat.completions import Completions as ChatSDK
from openai.resources.completions import Completions as CompletionSDK

from tests.server.support import HELLO, HELLO_TEXT, Served, encode, error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def _refused(served: Served, path: str, body: dict[str, Any], param: str | None, code: str = "invalid_request") -> str:
    """The message of a request that is refused with 400, `code` and `param`."""
    answer = served.post(body, path)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error"), error
    assert error["param"] == param, error
    return error["message"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", "hot", "hot"),
        ("temperature", -0.1, "-0.1"),
        ("temperature", 2.1, "2.1"),
        ("temperature", [1], "[1]"),
        ("top_p", 0, "0"),
        ("top_p", 1.01, "1.01"),
        ("top_k", -2, "-2"),
        ("top_k", 1.5, "1.5"),
        ("min_p", -0.1, "-0.1"),
        ("min_p", 1.1, "1.1"),
        ("presence_penalty", 2.1, "2.1"),
        ("presence_penalty", -2.1, "-2.1"),
        ("frequency_penalty", 3, "3"),
        ("repetition_penalty", 0, "0"),
        ("n", 0, "0"),
        ("n", 129, "129"),
        ("n", "many", "many"),
        ("seed", 2**63, "9223372036854775808"),
        ("seed", -(2**63) - 1, "9223372036854775808"),
        ("seed", 1.5, "1.5"),
        ("stop", "", "empty"),
        ("stop", ["a", ""], "empty"),
        ("stop", 5, "5"),
        ("stream", "perhaps", "perhaps"),
        ("metadata", "x", "x"),
        ("user", 5, "5"),
        ("savepoints", "logits", "logits"),
        ("savepoints", {}, "{}"),
        ("store_activations", "perhaps", "perhaps"),
        ("ignore_eos", "perhaps", "perhaps"),
        ("model", 5, "5"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_wrong_value_is_refused_with_its_field(house: Served, qwen: str, path, field, value, said):
    body: dict[str, Any] = {"model": qwen, "max_tokens": 1}
    body |= {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    answer = house.post(body | {field: value}, path)
    error = error_of(answer)
    assert answer.status_code == 400, error
    assert error["code"] == "invalid_request"
    assert error["param"].split(".")[0] == field
    assert said in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"logprobs": "all"}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour"),
        ({"messages": [*HELLO, "x"]}, "messages.1"),
        ({"tools": "all"}, "tools"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
    ids=str,
)
def test_a_chat_that_does_not_fit_together_is_refused(house: Served, qwen: str, fields, param):
    _refused(house, CHAT, {"model": qwen, "messages": HELLO} | fields, param)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_a_part_that_is_no_text_is_refused_by_its_kind(house: Served, qwen: str, kind: str):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    body = {"model": qwen, "messages": [{"role": "user", "content": parts}]}
    said = _refused(house, CHAT, body, "messages", "unsupported_parameter")
    assert f"'{kind}'" in said
    assert "'text'" in said


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [281]}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"echo": "perhaps"}, "echo"),
        ({"messages": HELLO}, "messages"),
    ],
    ids=str,
)
def test_a_completion_that_does_not_fit_together_is_refused(house: Served, qwen: str, fields, param):
    answer = house.post({"model": qwen, "prompt": "Hello", "max_tokens": 1} | fields, COMPLETIONS)
    error = error_of(answer)
    assert answer.status_code == 400, error
    assert error["code"] == "invalid_request"
    assert error["param"].split(".")[0] == param, error


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        (COMPLETIONS, {"prompt": ["a", 1]}, "a string, token ids, or a list of either"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "a string, token ids, or a list of either"),
        (COMPLETIONS, {"prompt": "x", "stop": 5}, "a string or up to 16 of them"),
        (COMPLETIONS, {"prompt": "x", "stop": ["x"] * 17}, "a string or up to 16 of them"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "text or a list of text parts"),
        (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "text or a list of text parts"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "text or a list of text parts",
        ),
    ],
    ids=str,
)
def test_a_field_with_several_shapes_says_which_it_takes(house: Served, qwen: str, path, fields, said):
    assert said in _refused(house, path, {"model": qwen} | fields, [*fields][-1])


def test_a_missing_field_is_named(house: Served, qwen: str):
    assert "messages" in _refused(house, CHAT, {"model": qwen}, "messages")
    assert "model" in _refused(house, CHAT, {"messages": HELLO}, "model")
    assert "prompt" in _refused(house, COMPLETIONS, {"model": qwen}, "prompt")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_field_is_refused_by_name(house: Served, qwen: str, path: str):
    body = {"model": qwen, "messages": HELLO} if path == CHAT else {"model": qwen, "prompt": "x"}
    said = _refused(house, path, body | {"temprature": 0}, "temprature")
    assert said == "unknown field 'temprature'"


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ({"281": 1}, "0 to 280"),
        ({"-1": 1}, "0 to 280"),
        ({"5": 101}, "100"),
        ({"5": -101}, "-100"),
        ({"five": 1}, "integer"),
        ({"5": "much"}, "number"),
        ([5], "dictionary"),
    ],
    ids=str,
)
def test_a_wrong_logit_bias_is_refused(house: Served, qwen: str, bias, said: str):
    answer = house.post({"model": qwen, "messages": HELLO, "logit_bias": bias})
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"].split(".")[0] == "logit_bias"
    assert said in error["message"]


# Every argument of the SDK's own methods: served, harmless at one value, or refused by name.

SERVED_BY_CHAT = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "max_completion_tokens": 1,
    "max_tokens": 1,
    "metadata": {"a": "b"},
    "n": 1,
    "presence_penalty": 0.5,
    "seed": 5,
    "stop": "x",
    "stream": False,
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "Ann",
    # no change from what is done anyway
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "tool_choice": "auto",
}
REFUSED_BY_CHAT = {
    "audio": {"format": "wav", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"mode": "x"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "x",
    "prompt_cache_options": {"x": 1},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "safety_identifier": "x",
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "verbosity": "low",
    "web_search_options": {},
}
ELSEWHERE = {"stream_options", "top_logprobs", "tools"}  # need another field, or a template
NOT_IN_THE_BODY = {
    "self",
    "messages",
    "model",
    "prompt",
    "extra_headers",
    "extra_query",
    "extra_body",
    "timeout",
}


def _arguments(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters) - NOT_IN_THE_BODY


def test_every_argument_of_the_sdks_chat_is_served_or_refused_here():
    assert _arguments(ChatSDK.create) == set(SERVED_BY_CHAT) | set(REFUSED_BY_CHAT) | ELSEWHERE


@pytest.mark.parametrize("name", SERVED_BY_CHAT)
def test_a_served_argument_is_taken(house: Served, qwen: str, name: str):
    body = {"model": qwen, "messages": HELLO, "max_tokens": 1} | {name: SERVED_BY_CHAT[name]}
    assert house.post(body).status_code == 200


@pytest.mark.parametrize("name", REFUSED_BY_CHAT)
def test_an_unsupported_argument_is_refused_by_name(house: Served, qwen: str, name: str):
    body = {"model": qwen, "messages": HELLO, "max_tokens": 1} | {name: REFUSED_BY_CHAT[name]}
    assert name in _refused(house, CHAT, body, name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(_arguments(ChatSDK.create)))
def test_null_is_the_same_as_absent_in_a_chat(house: Served, qwen: str, name: str):
    assert house.post({"model": qwen, "messages": HELLO, "max_tokens": 1} | {name: None}).status_code == 200


SERVED_BY_COMPLETIONS = {
    "best_of": 1,
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": 1,
    "max_tokens": 1,
    "n": 1,
    "presence_penalty": 0.5,
    "seed": 5,
    "stop": "x",
    "stream": False,
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "Ann",
}
REFUSED_BY_COMPLETIONS = {"best_of": 2, "suffix": "x"}


def test_every_argument_of_the_sdks_completions_is_served_or_refused_here():
    here = set(SERVED_BY_COMPLETIONS) | set(REFUSED_BY_COMPLETIONS) | {"stream_options"}
    assert _arguments(CompletionSDK.create) == here


@pytest.mark.parametrize("name", SERVED_BY_COMPLETIONS)
def test_a_served_argument_of_completions_is_taken(house: Served, qwen: str, name: str):
    body = {"model": qwen, "prompt": "Hello", "max_tokens": 1} | {name: SERVED_BY_COMPLETIONS[name]}
    assert house.post(body, COMPLETIONS).status_code == 200


@pytest.mark.parametrize("name", REFUSED_BY_COMPLETIONS)
def test_an_unsupported_argument_of_completions_is_refused_by_name(house: Served, qwen: str, name: str):
    body = {"model": qwen, "prompt": "Hello", "max_tokens": 1} | {name: REFUSED_BY_COMPLETIONS[name]}
    assert name in _refused(house, COMPLETIONS, body, name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(_arguments(CompletionSDK.create)))
def test_null_is_the_same_as_absent_in_a_completion(house: Served, qwen: str, name: str):
    body = {"model": qwen, "prompt": "Hello"} | {name: None}
    assert house.post(body, COMPLETIONS).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"", "body"),
        (b"[1, 2]", "body"),
        (b'"text"', "body"),
        (b"null", "body"),
        (b'{"model": "\xff"}', "body"),
        (b"[" * 200_000, "body"),
    ],
    ids="cut empty list string null not-utf8 deep".split(),
)
def test_a_body_that_is_no_request_is_refused(house: Served, path: str, content: bytes, said: str):
    headers = {"Content-Type": "application/json"}
    answer = house.http.post(path, content=content, headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert said in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "repetition_penalty"])
def test_a_number_that_is_none_is_refused(house: Served, qwen: str, field: str, number: str):
    content = json.dumps({"model": qwen, "messages": HELLO})[:-1] + f', "{field}": {number}}}'
    answer = house.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)


@pytest.mark.parametrize("said_before", [True, False], ids=["with its length", "in pieces"])
def test_a_body_beyond_any_prompt_is_not_read(house: Served, qwen: str, said_before: bool):
    pieces = [b'{"model": "', *[b"x" * 2**20] * 33, b'"}']
    content = b"".join(pieces) if said_before else iter(pieces)
    answer = house.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "invalid_request")
    assert house.chat(qwen, max_tokens=1).usage is not None


def test_a_long_prompt_in_the_longest_way_of_writing_it_is_read(house: Served, qwen: str):
    """Six bytes a character: it is the window that refuses it."""
    content = json.dumps({"model": qwen, "prompt": "\u4f60" * 200_000, "max_tokens": 1})
    assert len(content) > 1_200_000
    answer = house.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


def test_a_body_that_is_not_sent_as_json_says_how_to_send_it(house: Served, qwen: str):
    headers = {"Content-Type": "text/plain"}
    answer = house.http.post(CHAT, content=b'{"model": "x"}', headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": HELLO, "stop": "\ud800"},
        {"messages": HELLO, "user": "\ud800"},
        {"messages": HELLO, "\ud800": 1},
        {"messages": HELLO, "metadata": {"\ud800": "\ud800"}, "savepoints": []},
        {"messages": HELLO, "chat_template_kwargs": {"x": "\ud800"}},
        {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]},
        {"messages": HELLO, "savepoints": [{"name": "\ud800", "selector": "logits"}]},
        {"messages": HELLO, "savepoints": [{"name": "x", "selector": "\ud800"}]},
        {"messages": HELLO, "model": "\ud800"},
    ],
    ids="content stop user field metadata kwargs name savepoint selector model".split(),
)
def test_half_a_surrogate_pair_is_no_failure_of_the_server(house: Served, qwen: str, body):
    """JSON can write it, UTF-8 cannot: wherever it stands, the answer is no 500."""
    content = json.dumps({"model": qwen, "max_tokens": 1} | body)
    answer = house.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text


def test_an_unknown_model_is_not_found_and_the_loaded_ones_are_listed(house: Served):
    with pytest.raises(openai.NotFoundError) as caught:
        house.openai.chat.completions.create(model="gpt-4", messages=HELLO)
    error = caught.value
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "not_found_error")
    assert "'gpt-4'" in error.message
    assert all(name in error.message for name in house.names.values())


def test_an_unknown_model_is_not_found_for_completions_either(house: Served):
    with pytest.raises(openai.NotFoundError) as caught:
        house.openai.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_longer_than_the_window_is_refused_with_the_numbers(house: Served, qwen: str, stream: bool):
    prompt = len(encode(HELLO_TEXT))
    house.chat(qwen, max_tokens=256 - prompt, logit_bias={"280": 100})  # just fits, and ends at once
    with pytest.raises(openai.BadRequestError) as caught:
        house.chat(qwen, max_tokens=257 - prompt, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    for number in (256, prompt, 257 - prompt):
        assert str(number) in caught.value.message


def test_a_prompt_that_leaves_no_place_for_a_token_is_refused_with_the_numbers(house: Served, qwen: str):
    with pytest.raises(openai.BadRequestError) as caught:
        house.chat(qwen, [{"role": "user", "content": "x" * 300}])
    assert caught.value.code == "context_length_exceeded"
    length = len(encode("<|im_start|>user\n" + "x" * 300 + "<|im_end|>\n<|im_start|>assistant\n"))
    assert "256" in caught.value.message
    assert str(length) in caught.value.message


def test_a_prompt_that_fills_the_window_but_for_one_token_is_the_longest(house: Served, qwen: str):
    empty = len(encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    longest = "x" * (255 - empty)
    answer = house.chat(qwen, [{"role": "user", "content": longest}])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (255, 1)
    refused = house.post({"model": qwen, "messages": [{"role": "user", "content": longest + "x"}]})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")


def test_a_prompt_of_token_ids_longer_than_the_window_is_refused(house: Served, qwen: str):
    answer = house.post({"model": qwen, "prompt": [[5], [5] * 257], "max_tokens": 0}, COMPLETIONS)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert "257" in error_of(answer)["message"]


def test_a_refusal_before_a_stream_is_a_plain_error(house: Served, qwen: str):
    answer = house.post({"model": qwen, "messages": HELLO, "stream": True, "temperature": 9})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert error_of(answer)["param"] == "temperature"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "invalid_request"),
        ("DELETE", "/v1/models", 405, "invalid_request"),
        ("POST", "/v1/embeddings", 404, "not_found"),
    ],
)
def test_what_there_is_no_route_for_is_an_error_of_the_same_shape(house: Served, method, path, status, code):
    answer = house.http.request(method, path)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert path in error_of(answer)["message"]


def test_after_all_this_the_server_serves(house: Served, qwen: str):
    assert house.chat(qwen, max_tokens=2, ignore_eos=True).usage.completion_tokens == 2  # type: ignore[union-attr]
