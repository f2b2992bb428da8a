"""Interventions in chats: steered greedy text and logits, against hooks on a plain transformers model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attribution.by_hand import Removed, run_by_hand
from tests.attribution.plain import distance
from tests.models import FAMILIES, N_HEADS
from tests.server.steering_cases import Case, cases
from tests.server.steering_oracle import Edit, steered_logits
from tests.server.support import HELLO_TEXT, Served, encode, plain, serve

PROMPT = encode(HELLO_TEXT)
TOLERANCE = 3e-5
TOKENS = 7


def ask(served: Served, model: str, interventions: list[dict[str, Any]], **body: Any) -> Any:
    """A greedy chat whose logits are on disk."""
    extra = {"interventions": interventions} if interventions else {}
    savepoints = [{"name": "logits", "selector": "logits"}]
    options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "savepoints": savepoints}
    return served.chat(model, **(options | extra | body))


def logits_of(answer: Any, choice: int = 0) -> Tensor:
    return torch.load(answer.choices[choice].message.activation_files["logits"], weights_only=True)


def check(served: Served, answer: Any, family: str, case: Case) -> None:
    """Every token is the largest logit of the plain model with hooks, and the logits are its logits."""
    tokens = served.generated(answer)
    assert len(tokens) == TOKENS
    expected = steered_logits(plain(family), PROMPT + tokens[:-1], case.edits)[len(PROMPT) - 1 :]
    assert tokens == expected.argmax(-1).tolist()
    assert distance(logits_of(answer), expected) < TOLERANCE


@pytest.fixture(scope="module")
def pieces(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that feeds a prompt five tokens at a time, with two of the models."""
    with serve(tmp_path_factory.mktemp("pieces"), no_model=True, prefill_chunk=5, max_batch=4) as served:
        yield _loaded(served, folders)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on the reference path."""
    with serve(tmp_path_factory.mktemp("alone"), no_model=True, max_batch=1) as served:
        yield _loaded(served, folders)


def _loaded(served: Served, folders: dict[str, Path]) -> Served:
    for family in ("qwen3", "gemma2"):
        assert served.post({"model_id": str(folders[family])}, "/models/load").status_code == 200
        served.names[family] = str(folders[family])
    return served


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_mixed_interventions_gives_each_row_what_hooks_on_a_plain_model_give(house: Served, family: str):
    asked, model = cases(family), house.names[family]
    calls = [lambda one=one: ask(house, model, one.interventions) for one in asked.values()]
    texts = set()
    for (name, case), answer in zip(asked.items(), house.together(model, calls), strict=True):
        assert house.run(answer)["choices"][0]["largest_batch"] > 3, name
        check(house, answer, family, case)
        texts.add(tuple(house.generated(answer)))
        assert hasattr(answer.choices[0].message, "interventions") == bool(case.interventions)
    assert len(texts) > len(asked) / 2, "interventions that change nothing show nothing"


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("way", ["pieces", "alone"])
def test_a_prompt_in_pieces_and_the_reference_path_give_the_same(request: pytest.FixtureRequest, way: str, family: str):
    served: Served = request.getfixturevalue(way)
    for case in cases(family).values():
        check(served, ask(served, served.names[family], case.interventions), family, case)


EDGES: list[Any] = [[-1, 0], ["-1:", 2], ["7:9", "3:5"], [12, "0:12"]]


def removed_by_hand(tokens: int) -> list[Removed]:
    """`EDGES` in heads 0 and 3 of layer 1, in all of layers 0 and 2 the edges of all queries from 4 on to key 1."""
    pairs = [
        (21, 0),
        *((q, 2) for q in range(21, tokens)),
        (7, 3),
        (7, 4),
        (8, 3),
        (8, 4),
        *((12, k) for k in range(12)),
    ]
    some = [(1, head, query, key) for head in (0, 3) for query, key in pairs]
    return some + [(layer, head, q, 1) for layer in (0, 2) for head in range(N_HEADS) for q in range(4, tokens)]


KNOCKOUT = [
    {"type": "knockout", "layers": 1, "heads": [0, 3], "edges": EDGES},
    {"type": "knockout", "layers": [0, 2], "edges": [["4:", 1]]},
]


def check_knockout(served: Served, answer: Any, family: str) -> None:
    tokens = served.generated(answer)
    fed = PROMPT + tokens[:-1]
    by_hand = run_by_hand(plain(family), fed, removed_by_hand(len(fed)))
    expected = by_hand.logits[len(PROMPT) - 1 :]
    assert tokens == expected.argmax(-1).tolist()
    assert distance(logits_of(answer), expected) < TOLERANCE
    patterns = torch.load(answer.choices[0].message.activation_files["pattern"], weights_only=True)
    assert distance(patterns, torch.stack(by_hand.patterns)) < TOLERANCE
    assert patterns[1, [0, 3], 21:, 2].abs().max() == 0
    assert (patterns.sum(-1) - 1).abs().max() < 1e-5


PATTERN = [{"name": "logits", "selector": "logits"}, {"name": "pattern", "selector": "pattern[*]"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_removed_at_every_step_and_a_saved_pattern_shows_it(house: Served, family: str):
    model = house.names[family]
    steered = [{"type": "scale", "selector": "resid_mid[0]", "factor": 1.5}]
    calls = [
        lambda: ask(house, model, KNOCKOUT, savepoints=PATTERN),
        lambda: ask(house, model, steered),
        lambda: ask(house, model, []),
    ]
    answer, scaled, without = house.together(model, calls)
    check_knockout(house, answer, family)
    check(house, without, family, Case([], []))
    check(house, scaled, family, Case(steered, [Edit("resid_mid", (0,), lambda x: x * 1.5)]))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("way", ["pieces", "alone"])
def test_edges_are_removed_from_a_prompt_in_pieces_and_on_the_reference_path(
    request: pytest.FixtureRequest, way: str, family: str
):
    served: Served = request.getfixturevalue(way)
    check_knockout(served, ask(served, served.names[family], KNOCKOUT, savepoints=PATTERN), family)


@pytest.mark.parametrize("way", ["house", "pieces"])
def test_rows_of_different_lengths_are_changed_each_at_its_own_positions(request: pytest.FixtureRequest, way: str):
    served: Served = request.getfixturevalue(way)
    model = served.names["qwen3"]
    texts = ["in the re", "What a day this is, in the end", "or x", "an other one"]
    lengths = [len(encode(text)) for text in texts]
    assert len(set(lengths)) == 4
    window = {"start": 1, "step": 2}
    steered = [
        {"type": "scale", "selector": "z[1]", "heads": [2, 3], "factor": 2, "positions": window},
        {"type": "add", "selector": "resid_mid[0]", "vector": [0.5] * 48, "positions": "last"},
        {"type": "knockout", "layers": "all", "heads": [1, 4], "edges": [[-1, 0]]},
    ]

    def made(text: str) -> Any:
        fields = {"temperature": 0, "max_tokens": 5, "interventions": steered, "ignore_eos": True, "logprobs": 0}
        body = {"model": model, "prompt": text, "savepoints": [{"name": "l", "selector": "logits"}]}
        return served.post(body | fields, "/v1/completions").json()["choices"][0]

    choices = served.together(model, [lambda one=text: made(one) for text in texts])
    for length, choice in zip(lengths, choices, strict=True):
        tokens = json.loads((served.runs / choice["run_id"] / "run.json").read_text())["choices"][0]["token_ids"]
        assert len(tokens) == length + 5
        expected = knocked_out_and_steered(tokens[:-1], length)[length - 1 :]
        assert tokens[length:] == expected.argmax(-1).tolist()
        assert distance(torch.load(choice["activation_files"]["l"]), expected) < TOLERANCE
        ranges = [one["ranges"] for one in choice["interventions"]]
        odd = [1, length + 4 if (length + 4) % 2 == 0 else length + 3, 2]
        assert ranges == [[odd], [[length - 1, length, 1]], [[length - 1, length, 1]]]


def knocked_out_and_steered(ids: list[int], prompt: int) -> Tensor:
    """The same by hooks; an edge is removed by a mask of four axes that a hook gives to the attention."""
    edits = [
        Edit("z", (1,), lambda x: x * 2, range(1, 10**6, 2), heads=(2, 3)),
        Edit("resid_mid", (0,), lambda x: x + 0.5, range(prompt - 1, prompt)),
    ]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1).repeat(1, N_HEADS, 1, 1)
    mask[0, [1, 4], prompt - 1, 0] = float("-inf")

    def masked(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask}

    model = plain("qwen3")
    handles = [
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True) for layer in model.get_decoder().layers
    ]
    try:
        return steered_logits(model, ids, edits)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_neighbours_keep_every_bit_beside_edits_and_all_but_rounding_beside_a_knockout(house: Served, family: str):
    model = house.names[family]
    everything = [case for case in cases(family).values() if case.interventions][:8]

    def beside(others: list[list[dict[str, Any]]]) -> Tensor:
        calls = [lambda one=one: ask(house, model, one) for one in [[], *others]]
        return logits_of(house.together(model, calls)[0])

    without = beside([[] for _ in everything])
    assert torch.equal(beside([case.interventions for case in everything]), without)
    assert distance(beside([KNOCKOUT for _ in everything]), without) < 1e-6


def test_what_attention_reads_is_changed_beside_a_knockout_of_its_edges(house: Served, qwen: str):
    scale = {"type": "scale", "factor": 1.5, "positions": {"start": 2}}
    places = ["model.layers[1].self_attn.input", "model.layers[1].input_layernorm.output"]  # one after the other
    calls = [lambda one=one: ask(house, qwen, [scale | {"selector": one}, *KNOCKOUT]) for one in places]
    first, second = house.together(qwen, calls)
    assert distance(logits_of(first), logits_of(second)) < 1e-6
    alone = ask(house, qwen, [scale | {"selector": places[0]}])
    assert distance(logits_of(first)[0], logits_of(alone)[0]) > 1e-3
    assert [one["steps"] for one in first.choices[0].message.interventions] == [7, 7, 7]
