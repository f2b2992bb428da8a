"""What a reply says of its interventions: receipts, the baseline beside it, streams, and what savepoints see."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from server.generation.comparison import Comparison
from tests.attribution.plain import distance
from tests.models import D_MODEL, N_LAYERS
from tests.server.steering_cases import vector
from tests.server.steering_oracle import Edit, steered_logits
from tests.server.support import HELLO, HELLO_TEXT, Served, decode, encode, error_of, plain, plain_greedy, plain_logits
from tests.server.test_interventions import alone, ask, pieces  # noqa: F401  fixtures

PROMPT, TOKENS = encode(HELLO_TEXT), 7
SCALE = {"type": "scale", "selector": "resid_post[1]", "factor": 1.5}
EDITS = [Edit("resid_post", (1,), lambda x: x * 1.5)]


def receipt_of(answer: Any, choice: int = 0) -> dict[str, Any]:
    (receipt,) = answer.choices[choice].message.interventions
    return receipt


# --- receipts. A prompt of 22 tokens and 7 generated ones are 28 positions: 22 in one forward pass, then 6 steps

ONE_PASS: list[tuple[Any, int, int, list[list[int]]]] = [
    ("all", 7, 28, [[0, 28, 1]]),
    (None, 7, 28, [[0, 28, 1]]),
    ("prompt", 1, 22, [[0, 22, 1]]),
    ("generated", 6, 6, [[22, 28, 1]]),
    ("last", 1, 1, [[21, 22, 1]]),
    ({"start": 3, "step": 2}, 4, 13, [[3, 28, 2]]),  # 3, 5, … 21 with the prompt; then 23, 25, 27
    ({"start": 20, "stop": 25}, 4, 5, [[20, 25, 1]]),  # 20, 21 with the prompt; then 22, 23, 24
    ({"start": 25, "step": 10}, 1, 1, [[25, 26, 10]]),
]


@pytest.mark.parametrize(("window", "steps", "positions", "ranges"), ONE_PASS, ids=str)
def test_a_receipt_counts_the_forward_passes_and_positions_at_which_it_fired(
    house: Served, qwen: str, window: Any, steps: int, positions: int, ranges: list[list[int]]
):
    answer = ask(house, qwen, [SCALE | {"selector": "resid_post[0:2]", "positions": window}])
    expected = {"type": "scale", "selector": "resid_post[0:2]", "steps": steps, "positions": positions}
    assert receipt_of(answer) == expected | {"ranges": ranges, "layers": [0, 1]}
    assert house.run(answer)["choices"][0]["interventions"] == [receipt_of(answer)]


def test_a_prompt_in_pieces_is_several_steps(pieces: Served):  # noqa: F811
    model = pieces.names["qwen3"]
    answer = ask(
        pieces, model, [SCALE, SCALE | {"positions": "prompt"}, SCALE | {"positions": {"start": 3, "step": 2}}]
    )
    # pieces of 5, 5, 5, 5 and 2 tokens, then 6 steps; every piece has an odd position from 3 on, so have 3 steps
    found = [(one["steps"], one["positions"]) for one in answer.choices[0].message.interventions]
    assert found == [(11, 28), (5, 22), (8, 13)]


def test_the_reference_path_counts_the_same(alone: Served):  # noqa: F811
    model = alone.names["qwen3"]
    windows = [window for window, *_ in ONE_PASS]
    answer = ask(alone, model, [SCALE | {"selector": "z[0]", "positions": window} for window in windows])
    found = [(one["steps"], one["positions"], one["ranges"]) for one in answer.choices[0].message.interventions]
    assert found == [one[1:] for one in ONE_PASS]


def test_the_receipt_of_a_knockout_counts_queries_and_edges(house: Served, qwen: str):
    knockout = {"type": "knockout", "layers": [2, 0]}
    edges = [[[-1, 0]], [["-1:", 2]], [["4:", "0:3"]], [["25:", 1]]]
    answer = ask(house, qwen, [knockout | {"edges": one, "heads": [5]} for one in edges])
    receipts = answer.choices[0].message.interventions
    assert receipts[0] == {
        "type": "knockout",
        "selector": None,
        "steps": 1,
        "positions": 1,
        "ranges": [[21, 22, 1]],
        "layers": [0, 2],
        "edges": 1,
    }
    found = [(one["steps"], one["positions"], one["ranges"], one["edges"]) for one in receipts[1:]]
    assert found == [(7, 7, [[21, 28, 1]], 7), (7, 24, [[4, 28, 1]], 72), (3, 3, [[25, 28, 1]], 3)]


def test_an_intervention_that_never_fired_says_so(house: Served, qwen: str):
    first = plain_greedy("qwen3", PROMPT, 1)
    late = SCALE | {"positions": {"start": 26}}
    answer = ask(house, qwen, [late], stop=[decode(first)], savepoints=None)
    assert answer.usage.completion_tokens == 1
    expected = {"type": "scale", "selector": "resid_post[1]", "steps": 0, "positions": 0, "ranges": [], "layers": []}
    assert receipt_of(answer) == expected


def test_at_the_output_head_only_what_is_computed_is_counted_whoever_else_is_in_the_batch(house: Served, qwen: str):
    change = SCALE | {"selector": "logits", "factor": 0.5}
    scores = {"model": qwen, "prompt": HELLO_TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}
    calls = [lambda: ask(house, qwen, [change]), lambda: house.post(scores, "/v1/completions")]
    answer, _ = house.together(qwen, calls)
    assert (receipt_of(answer)["steps"], receipt_of(answer)["ranges"]) == (7, [[21, 28, 1]])
    scored = house.post(scores | {"interventions": [change]}, "/v1/completions").json()["choices"][0]
    assert scored["interventions"][0]["ranges"] == [[0, 22, 1]]
    halved = (plain_logits("qwen3", PROMPT) / 2).double().log_softmax(-1)
    expected = [float(halved[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


# --- savepoints


def test_savepoints_see_what_was_changed_at_the_very_site_and_after_it(house: Served, qwen: str):
    added = vector(D_MODEL, 5)
    change = {"type": "add", "selector": "resid_mid[1]", "vector": added.tolist(), "positions": "generated"}
    names = ["attn_out[1]", "resid_mid[1]", "mlp_out[1]", "resid_post[1]", "resid_pre[2]", "resid_pre[1]"]
    savepoints = [{"name": f"s{i}", "selector": name} for i, name in enumerate(names)]
    answer = ask(house, qwen, [change], savepoints=savepoints)
    files = answer.choices[0].message.activation_files
    attn, mid, mlp, post, following, pre = (torch.load(files[f"s{i}"]) for i in range(len(names)))
    expected = pre + attn
    assert distance(mid[:22], expected[:22]) < 1e-6
    assert distance(mid[22:], expected[22:] + added) < 1e-6
    assert distance(post, mid + mlp) < 1e-6
    assert torch.equal(post, following)


# --- baseline


def kl(baseline: Tensor, modified: Tensor) -> Tensor:
    p, q = baseline.double().softmax(-1), modified.double().softmax(-1)
    return torch.where((p > 1e-10) & (q > 1e-10), p * (p / q).log(), 0).sum(-1)


@pytest.mark.parametrize("way", ["house", "pieces", "alone"])
def test_the_baseline_is_the_answer_without_interventions_and_each_step_has_its_divergence(
    request: pytest.FixtureRequest, way: str
):
    served: Served = request.getfixturevalue(way)
    model = served.names["qwen3"]
    answer = ask(served, model, [SCALE], baseline=True)
    choice, tokens, expected = answer.choices[0], served.generated(answer), plain_greedy("qwen3", PROMPT, TOKENS)
    assert tokens != expected
    baseline = choice.baseline
    assert (baseline["token_ids"], baseline["text"]) == (expected, decode(expected))
    assert baseline["finish_reason"] == "length"
    changed = [a != b for a, b in zip(tokens, expected, strict=True)]
    assert baseline["first_changed"] == changed.index(True)
    assert [one["changed"] for one in baseline["per_token"]] == changed
    assert [one["token_id"] for one in baseline["per_token"]] == tokens
    assert [one["baseline_token_id"] for one in baseline["per_token"]] == expected
    modified = steered_logits(plain("qwen3"), PROMPT + tokens[:-1], EDITS)[len(PROMPT) - 1 :]
    divergences = kl(plain_logits("qwen3", PROMPT + expected[:-1])[len(PROMPT) - 1 :], modified)
    assert [one["kl"] for one in baseline["per_token"]] == pytest.approx(divergences.tolist(), rel=1e-4)
    assert answer.usage.completion_tokens == TOKENS, "the baseline's tokens are its own"
    assert served.run(answer)["choices"][0]["baseline"] == baseline


def test_every_choice_has_the_baseline_of_its_own_random_numbers(house: Served, qwen: str):
    options = {"temperature": 1, "seed": 11, "n": 3}
    answer = ask(house, qwen, [SCALE], baseline=True, **options)
    without = ask(house, qwen, [], **options)
    for index in range(3):
        baseline = answer.choices[index].baseline
        assert baseline["token_ids"] == house.generated(without, index)
        assert len(baseline["per_token"]) == TOKENS
        assert receipt_of(answer, index)["positions"] == 28
        drawn = house.generated(answer, index)
        assert [one["token_id"] for one in baseline["per_token"]] == drawn
    assert len({tuple(one.baseline["token_ids"]) for one in answer.choices}) == 3


def test_a_change_that_changes_nothing_diverges_by_nothing(house: Served, qwen: str):
    answer = ask(house, qwen, [SCALE | {"factor": 1}], baseline=True)
    baseline = answer.choices[0].baseline
    assert baseline["first_changed"] is None
    assert baseline["token_ids"] == house.generated(answer)
    assert max(abs(one["kl"]) for one in baseline["per_token"]) < 1e-9


def test_pairs_run_in_the_same_steps_however_full_the_batch_is(
    pieces: Served,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    waiting: list[int] = []
    take = Comparison.take

    def watched(self: Comparison, logits: Tensor, token: int, *, baseline: bool) -> None:
        take(self, logits, token, baseline=baseline)
        waiting.append(max(map(len, self._waiting)))

    monkeypatch.setattr(Comparison, "take", watched)
    model = pieces.names["qwen3"]
    pairs = [lambda: ask(pieces, model, [SCALE], baseline=True)] * 3
    alone_ones = [lambda: ask(pieces, model, [])] * 3
    answers = pieces.together(model, [*pairs, *alone_ones], sequences=9)
    expected = plain_greedy("qwen3", PROMPT, TOKENS)
    assert {tuple(answer.choices[0].baseline["token_ids"]) for answer in answers[:3]} == {tuple(expected)}
    assert max(waiting) == 1
    assert len(waiting) == 3 * 2 * TOKENS


def test_a_comparison_keeps_no_more_than_it_may_and_nothing_for_one_that_has_ended():
    logits = torch.zeros(10)  # 40 bytes
    comparison = Comparison(max_bytes=100)
    for token in (1, 2):
        comparison.take(logits, token, baseline=False)
    comparison.take(logits + 1, 1, baseline=True)  # frees the room of one
    comparison.take(logits, 3, baseline=False)
    with pytest.raises(Exception, match="lower max_tokens") as refused:
        comparison.take(logits, 4, baseline=False)
    assert refused.value.code == "capture_too_large"
    comparison.take(logits, 5, baseline=True)
    assert comparison.first_changed == 1
    assert [one.kl for one in comparison.steps] == [0, 0]
    comparison.end(baseline=True)
    for _ in range(9):
        comparison.take(logits, 6, baseline=False)
    assert len(comparison.steps) == 2


# --- streams, completions


def test_a_stream_ends_with_the_receipts_and_the_baseline(house: Served, qwen: str):
    whole = ask(house, qwen, [SCALE], baseline=True, n=2, savepoints=None)
    chunks = list(ask(house, qwen, [SCALE], baseline=True, n=2, savepoints=None, stream=True))
    last = {c.choices[0].index: c.choices[0] for c in chunks if c.choices and c.choices[0].finish_reason}
    assert sorted(last) == [0, 1]
    for index, choice in last.items():
        assert choice.delta.interventions == whole.choices[index].message.interventions
        assert choice.baseline == whole.choices[index].baseline
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index)
        assert text == whole.choices[index].message.content
    others = [c for c in chunks if not c.choices[0].finish_reason]
    assert len(others) > TOKENS
    assert not any(hasattr(c.choices[0], "baseline") or hasattr(c.choices[0].delta, "interventions") for c in others)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_has_them_on_each_choice(house: Served, qwen: str, stream: bool):
    made = house.openai.completions.create(
        model=qwen,
        prompt=["Hello there", "What a day"],
        temperature=0,
        max_tokens=3,
        stream=stream,
        extra_body={"interventions": [SCALE], "baseline": True, "ignore_eos": True},
    )
    choices = [c for part in made for c in part.choices if c.finish_reason] if stream else made.choices
    lengths = [len(encode("Hello there")), len(encode("What a day"))]
    for choice, length in zip(sorted(choices, key=lambda one: one.index), lengths, strict=True):
        assert choice.interventions[0]["ranges"] == [[0, length + 2, 1]]
        assert len(choice.baseline["per_token"]) == 3


def test_an_answer_can_be_sent_back_as_it_came_and_one_without_interventions_has_no_such_fields(
    house: Served, qwen: str
):
    answer = ask(house, qwen, [SCALE], baseline=True)
    message = answer.choices[0].message.model_dump()
    assert "interventions" in message
    again = house.chat(qwen, [*HELLO, message, *HELLO], max_tokens=1)
    raw = json.loads(again.model_dump_json())["choices"][0]
    assert "baseline" not in raw
    assert "interventions" not in raw["message"]


def test_layers_are_those_of_the_model(house: Served, qwen: str):
    answer = ask(house, qwen, [SCALE | {"selector": "model.layers[*].mlp.output"}], savepoints=None)
    assert receipt_of(answer)["layers"] == list(range(N_LAYERS))


def test_activations_out_of_range_are_an_error_that_names_the_interventions(house: Served, qwen: str):
    huge = {"type": "scale", "selector": "resid_post[0:2]", "factor": 1e30}
    calls = [
        lambda: house.post({"model": qwen, "messages": HELLO, "max_tokens": 2, "interventions": [huge]}),
        lambda: ask(house, qwen, []),
    ]
    failed, neighbour = house.together(qwen, calls)
    error = error_of(failed)
    assert (failed.status_code, error["code"], error["param"]) == (500, "not_finite", "interventions")
    assert "make them weaker" in error["message"]
    assert error["message"].count("logits are NaN") == 1
    assert house.generated(neighbour) == plain_greedy("qwen3", PROMPT, TOKENS)
