"""The choice of a token: by hand on a vocabulary of four, through the server against numpy and statistics."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from server.generation.sampling import Sampler, SamplingParams, token_logprob
from tests.server.support import HELLO_TEXT, LAST_LOGITS, Served, encode, plain_logits

# exp of these is 8, 4, 2, 2 over 16: the probabilities are 1/2, 1/4, 1/8, 1/8
FOUR = torch.log(torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64))


def _drawn(params: SamplingParams, logits: torch.Tensor = FOUR, count: int = 1000) -> np.ndarray:
    """The frequencies of the tokens that `count` samplers with different seeds draw first."""
    drawn = Counter(Sampler(params, [], seed, 0).choose(logits) for seed in range(count))
    return np.array([drawn[token] / count for token in range(len(logits))])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # squares of 8 4 2 2: 64 16 4 4 of 88
        ({"temperature": 0.5}, [64 / 88, 16 / 88, 4 / 88, 4 / 88]),
        # roots of 8 4 2 2: 2.828 2 1.414 1.414 of 7.657
        ({"temperature": 2.0}, [0.3694, 0.2612, 0.1847, 0.1847]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # one half does not reach 0.51; with one quarter it does
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        # an eighth is a quarter of the largest, a quarter is half of it
        ({"min_p": 0.26}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.24}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # top_k leaves 2/3 and 1/3: 0.6 is reached by the first of them, which is only 1/2 of all
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        # temperature comes first: with 64 16 4 4 of 88 the first two have 0.91
        ({"temperature": 0.5, "top_p": 0.9}, [0.8, 0.2, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.1}, [0.8, 0.2, 0, 0]),
        # + log 4 for the third: 8 4 8 2 of 22
        ({"logit_bias": {2: float(np.log(4))}}, [8 / 22, 4 / 22, 8 / 22, 2 / 22]),
        ({"logit_bias": {0: -100.0, 1: -100.0}}, [0, 0, 1 / 2, 1 / 2]),
    ],
    ids=str,
)
def test_the_frequencies_are_those_computed_by_hand(params: dict[str, Any], expected: list[float]):
    found = _drawn(SamplingParams(**params))
    # five standard deviations of a frequency in 1000 draws; what is ruled out is never drawn
    allowed = 5 * np.sqrt(np.array(expected) * (1 - np.array(expected)) / 1000)
    assert (np.abs(found - expected) <= allowed).all(), found


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_what_is_kept_does_not_depend_on_where_it_stands_in_the_vocabulary(order: list[int]):
    for params in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        found = _drawn(SamplingParams(**params), FOUR[order], 500)
        assert {order[token] for token in range(4) if found[token] > 0} == {0, 1}


def test_top_p_reaches_beyond_any_shortcut_in_a_flat_vocabulary_of_five_thousand():
    """With 5000 equal tokens, top_p 0.5 keeps half of them, and all of them are drawn alike."""
    sampler = Sampler(SamplingParams(top_p=0.5), [], 0, 0)
    drawn = {sampler.choose(torch.zeros(5000)) for _ in range(2500)}
    # 2500 draws from 2500 miss each with 1/e: about 1580 different ones; from 1024 it would be 935
    assert 1500 < len(drawn) < 1660


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = torch.tensor([0.5, 0.7, -300.0, 0.69])
    assert {Sampler(SamplingParams(temperature=temperature), [], s, 0).choose(logits) for s in range(20)} == {1}


def test_greedy_takes_the_largest_after_the_bias():
    assert Sampler(SamplingParams(temperature=0.0), [], 0, 0).choose(FOUR) == 0
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={3: 1.5}), [], 0, 0).choose(FOUR) == 3
    assert Sampler(SamplingParams(temperature=0.0, logit_bias={3: 1.3}), [], 0, 0).choose(FOUR) == 0


def test_presence_penalty_counts_a_token_once_and_not_the_prompt():
    """1.0 0.8 0.5: take 0, then 0 is at 0.7: take 1, then 1 is at 0.5 and 0 still at 0.7: take 0 for ever."""
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=0.3), [0, 0, 1, 2], 0, 0)
    logits = torch.tensor([1.0, 0.8, 0.45])
    assert [sampler.choose(logits) for _ in range(5)] == [0, 1, 0, 0, 0]


def test_frequency_penalty_counts_every_time():
    """1.0 0.8 0.45 at 0.3 a time: 0 (→0.7), 1 (→0.5), 0 (→0.4), 1 (→0.2), 2 (→0.15), 0 (→0.1), 1."""
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=0.3), [0, 0, 1, 2], 0, 0)
    logits = torch.tensor([1.0, 0.8, 0.45])
    assert [sampler.choose(logits) for _ in range(7)] == [0, 1, 0, 1, 2, 0, 1]


def test_negative_penalties_make_repetition_likely():
    sampler = Sampler(SamplingParams(temperature=0.0, frequency_penalty=-0.5, logit_bias={}), [], 0, 0)
    assert sampler.choose(torch.tensor([0.0, 0.1])) == 1
    assert sampler.choose(torch.tensor([0.5, 0.1])) == 1  # 0.5 against 0.6


def test_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    """At 2: tokens 0 and 1 stand in the prompt. 3 → 1.5, −1 → −2."""
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert Sampler(params, [0, 1], 0, 0).choose(torch.tensor([3.0, -1.0, 1.4])) == 0
    assert Sampler(params, [0, 1], 0, 0).choose(torch.tensor([3.0, -1.0, 1.6])) == 2
    assert Sampler(params, [0, 1], 0, 0).choose(torch.tensor([-9.0, -1.0, -1.9])) == 2
    assert Sampler(params, [0, 1], 0, 0).choose(torch.tensor([-9.0, -1.0, -2.1])) == 1


def test_repetition_penalty_counts_what_was_generated_too():
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0), [], 0, 0)
    logits = torch.tensor([3.0, 1.6, 1.4])
    assert [sampler.choose(logits) for _ in range(4)] == [0, 1, 0, 0]  # 1.5 1.6 1.4, then 1.5 0.8 1.4


def test_the_logits_that_are_given_are_not_changed():
    logits = FOUR.float()
    before = logits.clone()
    params = SamplingParams(logit_bias={0: 5.0}, presence_penalty=1.0, repetition_penalty=1.5, top_k=2)
    sampler = Sampler(params, [1], 0, 0)
    for _ in range(3):
        sampler.choose(logits)
    assert torch.equal(logits, before)


def test_log_probabilities_are_in_float64_and_of_the_raw_logits():
    entry = token_logprob(FOUR.float(), 2, 3)
    assert entry.token_id == 2
    assert entry.logprob == pytest.approx(np.log(1 / 8), abs=1e-7)
    assert [token for token, _ in entry.top][:2] == [0, 1]
    assert [value for _, value in entry.top] == pytest.approx(np.log([1 / 2, 1 / 4, 1 / 8]), abs=1e-7)


# Through the server: the first token of 256 completions, against the distribution computed in numpy.

PROMPT = encode(HELLO_TEXT)


def _distribution(
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: dict[str, float] | None = None,
) -> np.ndarray:
    """The probabilities of the token after PROMPT, in numpy, from a plain forward."""
    logits = plain_logits("qwen3", PROMPT)[-1].double().numpy().copy()
    for token, bias in (logit_bias or {}).items():
        logits[int(token)] += bias
    for token in set(PROMPT):
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weights)
    if top_k:
        weights[order[top_k:]] = 0
    weights /= weights.sum()
    before = np.concatenate([[0], np.cumsum(weights[order])[:-1]])
    weights[order[before >= top_p]] = 0
    weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


def _first_tokens(house: Served, params: dict[str, Any]) -> Counter[int]:
    """The first tokens of 2 × 128 completions."""
    drawn: Counter[int] = Counter()
    for seed in range(2):
        answer = house.chat(house.names["qwen3"], n=128, max_tokens=1, seed=seed, savepoints=LAST_LOGITS, **params)
        drawn.update(choice["token_ids"][-1] for choice in house.run(answer)["choices"])
    return drawn


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 1.7, "top_p": 0.6, "top_k": 40, "min_p": 0.05},
        {"temperature": 0.8, "repetition_penalty": 1.6, "logit_bias": {"60": 3.0, "100": -7.0}},
    ],
    ids=str,
)
def test_the_tokens_that_the_server_draws_have_the_distribution_of_its_parameters(house: Served, params):
    expected = _distribution(**params)
    drawn = _first_tokens(house, params)
    total = sum(drawn.values())
    assert total == 256
    assert all(expected[token] > 0 for token in drawn)
    # Pearson's statistic over the tokens expected five times or more, and the rest as one
    often = [token for token in range(len(expected)) if expected[token] * total >= 5]
    counts = np.array([drawn[token] for token in often])
    means = expected[often] * total
    counts, means = np.append(counts, total - counts.sum()), np.append(means, total - means.sum())
    kept = means > 1e-9
    statistic = (((counts - means) ** 2)[kept] / means[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom >= 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_greedy_with_penalties_is_the_loop_in_numpy_over_plain_forwards(house: Served, qwen: str):
    bias = {"34": 2.5, "120": -3.0}
    generated: list[int] = []
    for _ in range(20):
        logits = plain_logits("qwen3", PROMPT + generated)[-1].double().numpy().copy()
        for token, value in bias.items():
            logits[int(token)] += value
        for token in set(PROMPT + generated):
            logits[token] *= 1 / 1.3 if logits[token] > 0 else 1.3
        for token, count in Counter(generated).items():
            logits[token] -= 0.7 + 0.4 * count
        generated.append(int(logits.argmax()))
    answer = house.chat(
        qwen,
        temperature=0.0,
        max_tokens=20,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias=bias,
        ignore_eos=True,
        savepoints=LAST_LOGITS,
    )
    assert house.generated(answer) == generated
    plain = house.chat(qwen, temperature=0.0, max_tokens=20, ignore_eos=True, savepoints=LAST_LOGITS)
    assert house.generated(plain) != generated
