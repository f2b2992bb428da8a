"""A seed gives the same answer, alone and in any company."""

import pytest

from tests.server.support import LAST_LOGITS, Served

WORDS = "the others write what they want, at any length they like".split()


def _ask(house: Served, seed: int | None, word: str = "Hello", length: int = 12, **body):
    messages = [{"role": "user", "content": word}]
    return house.chat(
        house.names["qwen3"],
        messages,
        seed=seed,
        max_tokens=length,
        ignore_eos=True,
        savepoints=LAST_LOGITS,
        **body,
    )


def _tokens(house: Served, answer) -> list[list[int]]:
    return [house.generated(answer, choice) for choice in range(len(answer.choices))]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(house: Served):
    first = _tokens(house, _ask(house, 7))
    assert _tokens(house, _ask(house, 7)) == first
    assert _tokens(house, _ask(house, 8)) != first


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8, "top_k": 30, "min_p": 0.01, "frequency_penalty": 0.3}])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch_with_seven_others(house: Served, params):
    alone = _ask(house, 7, **params)
    others = [lambda i=i: _ask(house, 100 + i, WORDS[i] * (i + 1), 5 + 2 * i) for i in range(7)]
    answers = house.together(house.names["qwen3"], [*others[:3], lambda: _ask(house, 7, **params), *others[3:]])
    record = house.run(answers[3])["choices"][0]
    assert record["largest_batch"] == 8
    assert house.run(alone)["choices"][0]["largest_batch"] == 1
    assert _tokens(house, answers[3]) == _tokens(house, alone)


def test_the_choices_of_one_request_differ_and_come_again_with_the_seed(house: Served):
    first = _tokens(house, _ask(house, 7, n=5))
    assert len({tuple(tokens) for tokens in first}) == 5
    assert _tokens(house, _ask(house, 7, n=5)) == first
    assert _tokens(house, _ask(house, 7, n=2)) == first[:2]
    assert _tokens(house, _ask(house, 7)) == first[:1]


def test_choices_are_numbered_and_counted_together(house: Served):
    answer = _ask(house, 7, n=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4]
    assert answer.usage.completion_tokens == 60
    prompt = house.run(answer)["choices"][0]["prompt_tokens"]
    assert answer.usage.prompt_tokens == prompt  # one prompt, whatever n
    assert answer.usage.total_tokens == prompt + 60


def test_without_a_seed_answers_differ_and_the_recorded_seed_repeats_one(house: Served):
    first, second = _ask(house, None), _ask(house, None)
    assert _tokens(house, first) != _tokens(house, second)
    again = _ask(house, house.run(first)["seed"])
    assert _tokens(house, again) == _tokens(house, first)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seeds_up_to_the_bounds_of_64_bits_are_taken(house: Served, seed: int):
    assert _tokens(house, _ask(house, seed, length=6)) == _tokens(house, _ask(house, seed, length=6))
    assert house.run(_ask(house, seed, length=1))["seed"] == seed
