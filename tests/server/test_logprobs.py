"""Log-probabilities of chat, against the float64 log-softmax of plain transformers."""

from typing import Any

import pytest
import torch

from tests.models import FAMILIES
from tests.server.support import (
    HELLO_TEXT,
    LAST_LOGITS,
    Served,
    decode,
    encode,
    plain_logprobs,
    tokenizer,
)

PROMPT = encode(HELLO_TEXT)


def _name(token: int) -> str:
    return tokenizer().decode([token], clean_up_tokenization_spaces=False)


def _check(content: list[Any], tokens: list[int], family: str, top: int) -> None:
    """Every entry against a plain forward over the prompt and the tokens before it."""
    expected = plain_logprobs(family, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert len(content) == len(tokens)
    for entry, token, row in zip(content, tokens, expected, strict=True):
        assert entry.token == _name(token)
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(max(top, 1))
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(values.tolist()[:top], abs=1e-4)
        assert [one.token for one in entry.top_logprobs] == [_name(int(i)) for i in ids[:top]]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_a_plain_forward(house: Served, family: str):
    answer = house.chat(
        house.names[family],
        temperature=0,
        max_tokens=10,
        logprobs=True,
        top_logprobs=4,
        ignore_eos=True,
        savepoints=LAST_LOGITS,
    )
    assert answer.choices[0].logprobs is not None
    _check(answer.choices[0].logprobs.content or [], house.generated(answer), family, 4)


def test_log_probabilities_are_the_models_whatever_is_done_to_draw_from_them(house: Served, qwen: str):
    answer = house.chat(
        qwen,
        temperature=1.8,
        top_p=0.9,
        top_k=100,
        presence_penalty=1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        logit_bias={"60": 4, "61": -4},
        seed=3,
        max_tokens=10,
        logprobs=True,
        top_logprobs=20,
        ignore_eos=True,
        savepoints=LAST_LOGITS,
    )
    assert answer.choices[0].logprobs is not None
    _check(answer.choices[0].logprobs.content or [], house.generated(answer), "qwen3", 20)


@pytest.mark.parametrize("top", [{}, {"top_logprobs": 0}])
def test_without_alternatives_only_the_tokens_own_log_probability_is_given(house: Served, qwen: str, top):
    answer = house.chat(
        qwen, temperature=0, max_tokens=4, logprobs=True, ignore_eos=True, savepoints=LAST_LOGITS, **top
    )
    assert answer.choices[0].logprobs is not None
    _check(answer.choices[0].logprobs.content or [], house.generated(answer), "qwen3", 0)


@pytest.mark.parametrize("asked", [{}, {"logprobs": False}, {"logprobs": None}])
def test_none_are_given_when_none_are_asked_for(house: Served, qwen: str, asked):
    assert house.chat(qwen, max_tokens=2, **asked).choices[0].logprobs is None


def test_the_end_token_has_a_log_probability_too(house: Served, qwen: str):
    """As many entries as completion_tokens: a reader sees how sure the model was to end."""
    end = encode("<|im_end|>")[0]
    answer = house.chat(qwen, logit_bias={str(end): 100}, logprobs=True, top_logprobs=2, savepoints=LAST_LOGITS)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].logprobs is not None
    _check(answer.choices[0].logprobs.content or [], [end], "qwen3", 2)
    assert answer.choices[0].logprobs.content[0].token == "<|im_end|>"  # type: ignore[index]


def test_the_tokens_of_a_stop_string_have_log_probabilities(house: Served, qwen: str):
    answer = house.chat(qwen, logit_bias={"34": 100}, stop="CCC", logprobs=True, top_logprobs=1, savepoints=LAST_LOGITS)
    assert decode([34]) == "C"
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].logprobs is not None
    _check(answer.choices[0].logprobs.content or [], [34, 34, 34], "qwen3", 1)


def test_the_bytes_of_a_token_are_those_of_its_text(house: Served, qwen: str):
    answer = house.chat(qwen, logit_bias={"257": 100}, max_tokens=1, logprobs=True)
    assert answer.choices[0].logprobs is not None
    (entry,) = answer.choices[0].logprobs.content or []
    assert bytes(entry.bytes or []) == decode([257]).encode()


def test_probabilities_of_all_alternatives_sum_to_at_most_one(house: Served, qwen: str):
    answer = house.chat(qwen, temperature=0, max_tokens=5, logprobs=True, top_logprobs=20)
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or []:
        total = torch.tensor([one.logprob for one in entry.top_logprobs], dtype=torch.float64).exp().sum()
        assert 0 < float(total) <= 1 + 1e-9


def test_in_a_batch_log_probabilities_are_those_of_a_single_run(house: Served, qwen: str):
    def ask(word: str):
        messages = [{"role": "user", "content": word}]
        return house.chat(qwen, messages, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3, ignore_eos=True)

    words = ["a", "the other one", "in an answer " * 4, "re", "x y z", "who? " * 9, "", "no"]
    alone = [ask(word) for word in words]
    batch = house.together(qwen, [lambda w=word: ask(w) for word in words])
    for one, many in zip(alone, batch, strict=True):
        first, second = one.choices[0].logprobs.content, many.choices[0].logprobs.content
        assert [entry.token for entry in first] == [entry.token for entry in second]
        assert [e.logprob for e in first] == pytest.approx([e.logprob for e in second], abs=1e-4)
