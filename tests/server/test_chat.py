"""Chat through the OpenAI SDK: what is generated, when it ends, and how it is counted."""

import json

import pytest

from tests.models import FAMILIES, save_tiny
from tests.server.support import (
    HELLO,
    HELLO_TEXT,
    LAST_LOGITS,
    Served,
    decode,
    encode,
    plain_greedy,
    readable,
    serve,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_chat_is_what_transformers_generates(house: Served, family: str):
    prompt = encode(HELLO_TEXT)
    expected = plain_greedy(family, prompt, 24)
    answer = house.chat(house.names[family], temperature=0, max_tokens=24, savepoints=LAST_LOGITS)
    assert house.generated(answer) == expected
    assert answer.choices[0].message.content == decode(expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == house.names[family]
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(prompt), 24, len(prompt) + 24)


def test_without_a_limit_a_chat_fills_the_rest_of_the_window(house: Served, qwen: str):
    long = [{"role": "user", "content": "xyz" * 75}]
    answer = house.chat(qwen, long, temperature=0, ignore_eos=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 1
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_max_tokens_and_max_completion_tokens_are_the_same_limit(house: Served, qwen: str):
    for limit in (
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ):
        answer = house.chat(qwen, temperature=0, ignore_eos=True, **limit)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory):
    """A server whose model ends where its greedy answer has its fifth token, by generation_config.json."""
    folder = tmp_path_factory.mktemp("ending")
    greedy = plain_greedy("qwen3", encode(HELLO_TEXT), 24)
    end = greedy[4]
    assert end not in greedy[:4]
    save_tiny("qwen3", folder / "model")
    config = {"eos_token_id": [end], "do_sample": True, "temperature": 0.01, "top_k": 1, "max_new_tokens": 3}
    (folder / "model" / "generation_config.json").write_text(json.dumps(config))
    with serve(folder, model=str(folder / "model")) as served:
        yield served, str(folder / "model"), greedy


def test_a_chat_ends_at_the_end_token_which_is_counted_and_not_shown(ending):
    served, model, greedy = ending
    answer = served.chat(model, temperature=0, savepoints=LAST_LOGITS)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == decode(greedy[:4])
    assert answer.usage.completion_tokens == 5
    assert served.generated(answer) == greedy[:5]


def test_ignore_eos_goes_on_after_the_end_token(ending):
    served, model, greedy = ending
    answer = served.chat(model, temperature=0, max_tokens=24, ignore_eos=True, savepoints=LAST_LOGITS)
    assert answer.choices[0].finish_reason == "length"
    assert served.generated(answer) == greedy


def test_the_end_token_of_the_tokenizer_ends_a_chat_too(house: Served, qwen: str):
    end = encode("<|im_end|>")
    answer = house.chat(qwen, logit_bias={str(end[0]): 100}, savepoints=LAST_LOGITS)
    assert house.generated(answer) == end
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_of_generation_config_only_the_end_tokens_are_used(ending):
    """Its temperature and top_k would make all choices greedy, its max_new_tokens three tokens long."""
    served, model, _ = ending
    answer = served.chat(model, n=8, seed=1, max_tokens=4, ignore_eos=True, savepoints=LAST_LOGITS)
    made = [served.generated(answer, choice) for choice in range(8)]
    assert {len(tokens) for tokens in made} == {4}
    assert len({tuple(tokens) for tokens in made}) > 4


def test_a_limit_and_an_end_token_at_once_is_a_stop(ending):
    served, model, _ = ending
    answer = served.chat(model, temperature=0, max_tokens=5)
    assert answer.choices[0].finish_reason == "stop"


# Stop strings. The answers are readable: every token that is not ASCII text is ruled out by logit_bias.


@pytest.fixture(scope="module")
def told(house: Served) -> tuple[str, list[int]]:
    """A readable answer without stop strings, and its tokens."""
    answer = _readable(house)
    tokens = house.generated(answer)
    assert answer.choices[0].message.content == decode(tokens)
    return decode(tokens), tokens


def _readable(house: Served, **body):
    return house.chat(
        house.names["qwen3"],
        logit_bias=readable(),
        seed=11,
        max_tokens=40,
        savepoints=LAST_LOGITS,
        **body,
    )


def _tokens_until(tokens: list[int], stop: str) -> int:
    """How many tokens have been generated when `stop` first stands in the text."""
    return next(count for count in range(1, len(tokens) + 1) if stop in decode(tokens[:count]))


@pytest.mark.parametrize("start", [3, 10, 20])
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_string_ends_the_answer_before_it(house: Served, told, start: int, length: int):
    text, tokens = told
    stop = text[start : start + length]
    answer = _readable(house, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == _tokens_until(tokens, stop)
    assert house.generated(answer) == tokens[: _tokens_until(tokens, stop)]


def test_of_several_stop_strings_the_first_to_come_counts(house: Served, told):
    text, _ = told
    late, early = text[25:30], text[8:14]
    answer = _readable(house, stop=[late, "never to be seen", early])
    assert answer.choices[0].message.content == text[: text.index(early)]


def test_a_stop_string_that_does_not_come_changes_nothing(house: Served, told):
    text, _ = told
    # the text's last characters, and one that does not follow: held back to the end, then sent
    answer = _readable(house, stop=[text[-6:] + "\x01"])
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"


def test_the_reply_is_the_sdks_own_shape(house: Served, qwen: str):
    raw = house.post({"model": qwen, "messages": HELLO, "max_tokens": 2, "temperature": 0}).json()
    assert set(raw) == {"id", "object", "created", "model", "choices", "usage", "activations_meta"}
    assert raw["object"] == "chat.completion"
    assert set(raw["choices"][0]) == {"index", "finish_reason", "message", "logprobs"}
    assert raw["choices"][0]["logprobs"] is None


def test_run_id_and_session_id_follow_from_the_id(house: Served, qwen: str):
    answer = house.chat(qwen, max_tokens=1)
    message = answer.choices[0].message
    assert answer.id == f"chatcmpl-{message.run_id}"
    assert message.session_id == message.run_id[:8]


def test_answers_to_different_requests_have_different_ids(house: Served, qwen: str):
    assert house.chat(qwen, max_tokens=1, seed=1).id != house.chat(qwen, max_tokens=1, seed=1).id


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_greedy_chats_of_different_lengths_at_once_are_what_transformers_generates(house: Served, family: str):
    model = house.names[family]
    words = ["a", "the other one", "in an answer " * 4, "re", "x y z", "who are the others? " * 6, "", "no"]
    texts = [f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n" for word in words]
    lengths = [3, 12, 7, 16, 5, 9, 14, 1]

    def ask(word: str, length: int):
        messages = [{"role": "user", "content": word}]
        return house.chat(model, messages, temperature=0, max_tokens=length, savepoints=LAST_LOGITS)

    answers = house.together(model, [lambda w=w, n=n: ask(w, n) for w, n in zip(words, lengths, strict=True)])
    for answer, text, length in zip(answers, texts, lengths, strict=True):
        assert house.generated(answer) == plain_greedy(family, encode(text), length)
    assert max(house.run(answer)["choices"][0]["largest_batch"] for answer in answers) >= 6


def test_a_model_loaded_from_a_folder_is_known_by_that_folder(ending):
    served, model, _ = ending
    assert served.openai.models.retrieve(model).id == model
