"""Completions of raw prompts, and scoring: the log-probabilities of what is already written."""

from typing import Any

import pytest

from tests.models import FAMILIES
from tests.server.support import Served, decode, encode, plain_greedy, plain_logprobs, tokenizer

PATH = "/v1/completions"
TEXTS = ["the others", " in a", "x"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_completion_is_what_transformers_generates(house: Served, family: str):
    answer = house.openai.completions.create(
        model=house.names[family],
        prompt="the others are",
        temperature=0,
        max_tokens=16,
        extra_body={"ignore_eos": True},
    )
    expected = plain_greedy(family, encode("the others are"), 16)
    assert answer.choices[0].text == decode(expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode("the others are"))
    assert answer.usage.completion_tokens == 16


def test_the_default_is_sixteen_tokens_at_temperature_one(house: Served, qwen: str):
    answers = [
        house.openai.completions.create(model=qwen, prompt="Hello", seed=seed, extra_body={"ignore_eos": True})
        for seed in (1, 2)
    ]
    assert [answer.usage.completion_tokens for answer in answers] == [16, 16]  # type: ignore[union-attr]
    assert answers[0].choices[0].text != answers[1].choices[0].text


@pytest.mark.parametrize(
    "prompt",
    [TEXTS, [encode(text) for text in TEXTS]],
    ids=["texts", "token ids"],
)
def test_a_list_of_prompts_is_answered_in_order(house: Served, qwen: str, prompt):
    answer = house.openai.completions.create(
        model=qwen, prompt=prompt, temperature=0, max_tokens=6, n=2, extra_body={"ignore_eos": True}
    )
    expected = [decode(plain_greedy("qwen3", encode(text), 6)) for text in TEXTS]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(encode(text)) for text in TEXTS)
    assert answer.usage.completion_tokens == 36


def test_token_ids_and_their_text_are_the_same_prompt(house: Served, qwen: str):
    answers = [
        house.openai.completions.create(model=qwen, prompt=prompt, seed=1, max_tokens=6)
        for prompt in ("the others", encode("the others"), [encode("the others")], ["the others"])
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1


def test_special_tokens_in_raw_text_are_those_tokens(house: Served, qwen: str):
    text = "<|im_start|>user"
    answer = house.openai.completions.create(model=qwen, prompt=text, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode(text)) < len(text)


def test_echo_puts_the_prompt_before_the_text(house: Served, qwen: str):
    body: dict[str, Any] = {"model": qwen, "prompt": "the others", "temperature": 0, "max_tokens": 5}
    alone = house.openai.completions.create(**body)
    echoed = house.openai.completions.create(**body, echo=True)
    assert echoed.choices[0].text == "the others" + alone.choices[0].text
    assert echoed.usage == alone.usage


def _scores(family: str, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first, from a plain forward."""
    rows = plain_logprobs(family, ids)
    return [float(rows[position, token]) for position, token in enumerate(ids[1:])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["texts", "token ids", "one text", "one list of token ids"])
def test_scoring_a_prompt_gives_the_log_softmax_of_a_plain_forward(house: Served, family: str, kind: str):
    texts = TEXTS if kind in ("texts", "token ids") else TEXTS[:1]
    ids = [encode(text) for text in texts]
    prompt: Any = {
        "texts": texts,
        "token ids": ids,
        "one text": texts[0],
        "one list of token ids": ids[0],
    }[kind]
    answer = house.openai.completions.create(
        model=house.names[family], prompt=prompt, echo=True, logprobs=3, max_tokens=0
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, ids)), 0)
    for choice, text, tokens in zip(answer.choices, texts, ids, strict=True):
        assert choice.text == text
        assert choice.finish_reason == "length"
        found = choice.logprobs
        assert found is not None
        assert found.tokens == [decode([token]) for token in tokens]
        assert "".join(found.tokens) == text
        assert found.token_logprobs is not None
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(_scores(family, tokens), abs=1e-4)


def test_the_alternatives_and_offsets_of_scored_tokens(house: Served, qwen: str):
    text = "the others in a room"
    answer = house.openai.completions.create(model=qwen, prompt=text, echo=True, logprobs=2, max_tokens=0)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert text[offset : offset + len(token)] == token
    rows = plain_logprobs("qwen3", encode(text))
    assert found.top_logprobs[0] is None
    for position, top in enumerate(found.top_logprobs[1:]):
        values, ids = rows[position].topk(2)
        names = [tokenizer().decode([int(i)]) for i in ids]
        assert top[names[0]] == pytest.approx(float(values[0]), abs=1e-4)
        # two halves of characters have the same name: the likelier one has it
        assert set(top) == set(names)


def test_a_prompt_of_one_token_has_one_null_score(house: Served, qwen: str):
    answer = house.openai.completions.create(model=qwen, prompt=[5], echo=True, logprobs=0, max_tokens=0)
    found = answer.choices[0].logprobs
    assert found is not None
    assert (found.token_logprobs, found.top_logprobs, found.text_offset) == ([None], [None], [0])


def test_scores_go_on_into_the_generated_tokens(house: Served, qwen: str):
    ids = encode("the others")
    answer = house.openai.completions.create(
        model=qwen,
        prompt=ids,
        echo=True,
        logprobs=1,
        max_tokens=5,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    made = plain_greedy("qwen3", ids, 5)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[1:] == pytest.approx(_scores("qwen3", ids + made), abs=1e-4)


def test_log_probabilities_without_echo_are_those_of_the_generated_tokens(house: Served, qwen: str):
    ids = encode("the others")
    answer = house.openai.completions.create(
        model=qwen, prompt=ids, logprobs=0, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    found = answer.choices[0].logprobs
    assert found is not None
    expected = _scores("qwen3", ids + plain_greedy("qwen3", ids, 5))[len(ids) - 1 :]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_no_log_probabilities_unless_asked_for(house: Served, qwen: str):
    answer = house.openai.completions.create(model=qwen, prompt="x", echo=True, max_tokens=0)
    assert answer.choices[0].logprobs is None
    assert answer.choices[0].text == "x"


# What scoring clients send, and how they read the answer.


def _as_lm_eval_reads(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """lm-eval's local-completions asks for one token more and drops it with [context:-1]."""
    scores = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(scores), all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))


@pytest.mark.parametrize("ends", [False, True], ids=["", "the next token is the end token"])
def test_lm_eval_reads_the_score_of_a_continuation_and_whether_it_is_greedy(house: Served, qwen: str, ends: bool):
    context = encode("the others are")
    greedy = plain_greedy("qwen3", context, 4)
    other = [*greedy[:2], (greedy[2] + 1) % 200, greedy[3]]
    body = {
        "model": qwen,
        "prompt": [context + greedy, context + other],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    if ends:
        body["logit_bias"] = {"280": 100}
    choices = house.post(body, PATH).json()["choices"]
    for choice, continuation, is_greedy in zip(choices, (greedy, other), (True, False), strict=True):
        score, found_greedy = _as_lm_eval_reads(choice, len(context))
        expected = _scores("qwen3", context + continuation)[-4:]
        assert score == pytest.approx(sum(expected), abs=1e-4)
        assert found_greedy == is_greedy


def test_captum_reads_the_log_probabilities_of_a_target(house: Served, qwen: str):
    """Its remote provider asks for `prompt_logprobs: 0` and reads the first entry of each."""
    prompt, target = "the others", " are in"
    answer = house.openai.completions.create(
        model=qwen,
        prompt=prompt + target,
        temperature=0.0,
        max_tokens=1,
        extra_body={"prompt_logprobs": 0},
    )
    ids = encode(prompt + target)
    entries = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert entries[0] is None
    found = [next(iter(entry.values()))["logprob"] for entry in entries[1:]]
    assert found == pytest.approx(_scores("qwen3", ids), abs=1e-4)
    assert [list(entry) for entry in entries[1:]] == [[str(token)] for token in ids[1:]]
    assert answer.choices[0].logprobs is None


def test_prompt_logprobs_give_each_token_first_and_then_the_likeliest(house: Served, qwen: str):
    ids = encode("the others are in")
    body = {"model": qwen, "prompt": ids, "max_tokens": 1, "logprobs": 1, "prompt_logprobs": 3, "echo": True}
    choice = house.post(body, PATH).json()["choices"][0]
    rows = plain_logprobs("qwen3", ids)
    for position, entry in enumerate(choice["prompt_logprobs"][1:]):
        token = ids[position + 1]
        likeliest = [int(i) for i in rows[position].topk(3).indices]
        assert [int(key) for key in entry] == [token, *(one for one in likeliest if one != token)]
        for key, value in entry.items():
            assert value["logprob"] == pytest.approx(float(rows[position, int(key)]), abs=1e-4)
            assert value["decoded_token"] == tokenizer().decode([int(key)])
    # `logprobs: 1` still gives one alternative
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
