"""Knockout: the operation against scores masked by hand, and a sweep against single calls."""

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.errors import InvalidArgument, NoKeyLeft, NotFinite, OutOfRange, SightlineError, UnsupportedModel
from attribution.interventions import knockout as core
from attribution.model.load import trace_model
from attribution.operations import interventions
from attribution.session import LocalSession
from tests.attribution.by_hand import run_by_hand
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_LAYERS, VOCAB, tiny_model, tiny_tokenizer, traced

IDS = [5, 100, 7, 42, 200, 9, 13]
T = len(IDS)
KINDS = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")]
ALL_HEADS = range(N_HEADS)


@pytest.fixture
def session(tmp_path: Path) -> LocalSession:
    return LocalSession(traced("qwen3"), store=tmp_path)


@cache
def wide(family: str, kind: str) -> Any:
    """A model in float64."""
    module = tiny_model(family).double()
    module.set_attn_implementation(kind)
    return trace_model(f"wide-{family}", module, tiny_tokenizer())


def by_hand(model: Any, removed: list[tuple[int, int, int, int]], position: int = -1) -> tuple[Tensor, Tensor]:
    """Baseline and ablated logits at a position."""
    module = model.module
    return run_by_hand(module, IDS).logits[position], run_by_hand(module, IDS, removed).logits[position]


def divergence(baseline: Tensor, other: Tensor) -> float:
    p, q = baseline.softmax(-1), other.softmax(-1)
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if min(a, b) > 1e-10)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_number_is_that_of_scores_masked_by_hand(family: str, kind: str, tmp_path: Path):
    model = traced(family, attn_implementation=kind)
    found = LocalSession(model, store=tmp_path).knockout(
        token_ids=IDS, layers=[1, 2], heads=[4, 1], edges=[[-1, 0], ["4:6", "2:4"]], tokens=[3, 77], top_k=5
    )
    pairs = [(6, 0), (4, 2), (4, 3), (5, 2), (5, 3)]
    baseline, ablated = by_hand(model, [(layer, head, q, k) for layer in (1, 2) for head in (1, 4) for q, k in pairs])
    assert found["kl_divergence"] == pytest.approx(divergence(baseline, ablated), rel=1e-4)
    differences = (baseline - ablated)[[3, 77]].tolist()
    assert [one["value"] for one in found["logit_diff"]] == pytest.approx(differences, abs=1e-4)
    change = (baseline.softmax(-1) - ablated.softmax(-1)).abs()
    order = change.argsort(descending=True)[:5].tolist()
    assert [one["token_id"] for one in found["top_changed"]] == order
    for rank, one in enumerate(found["top_changed"], start=1):
        token = one["token_id"]
        assert one["rank"] == rank
        assert one["token"] == model.tokenizer.decode([token])
        probabilities = [float(logits.softmax(-1)[token]) for logits in (baseline, ablated)]
        assert [one["baseline_prob"], one["ablated_prob"]] == pytest.approx(probabilities, abs=1e-5)
        assert one["abs_diff"] == abs(one["baseline_prob"] - one["ablated_prob"])


def test_without_arguments_it_is_the_middle_layer_all_heads_and_the_last_edge_to_the_first(session: LocalSession):
    found = session.knockout(token_ids=IDS)
    assert {name: found[name] for name in list(found)[:10]} == {
        "model_id": "tiny-qwen3",
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "hidden_size": D_MODEL,
        "position": 6,
        "token_ids": IDS,
        "tokens": [session.model.tokenizer.decode([token]) for token in IDS],
        "layers": [1],
        "heads": list(ALL_HEADS),
        "knockout_edges": [[6, 0]],
    }
    baseline, ablated = by_hand(session.model, [(1, head, 6, 0) for head in ALL_HEADS])
    assert found["kl_divergence"] == pytest.approx(divergence(baseline, ablated), rel=1e-4)
    (one,) = found["logit_diff"]
    assert one["token_id"] == int(baseline.argmax())
    assert one["value"] == pytest.approx(float((baseline - ablated)[one["token_id"]]), abs=1e-4)
    assert len(found["top_changed"]) == 10
    assert found["patterns"] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", [0, 1, 2]),
        (-1, [2]),
        ("1:", [1, 2]),
        ({"start": 0, "stop": 2}, [0, 1]),
        ([2, 0, 2], [0, 2]),
        ([0, "2:"], [0, 2]),
    ],
)
def test_layers_are_named_in_several_ways(session: LocalSession, given: Any, expected: list[int]):
    assert session.knockout(token_ids=IDS, layers=given)["layers"] == expected


def test_texts_and_messages_are_prompts_too(session: LocalSession):
    text = session.knockout("the cat", tokens=[" the"])
    assert text["token_ids"] == session.model.tokenizer.encode("the cat")
    assert text["logit_diff"][0]["token"] == " the"
    conversation = session.knockout(messages=[{"role": "user", "content": "the cat"}])
    assert "".join(conversation["tokens"]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("position", [0, 3, -3])
def test_another_position_is_compared_at_that_position(session: LocalSession, position: int):
    found = session.knockout(token_ids=IDS, layers="all", edges=[["3:5", 1]], position=position, tokens=[3])
    baseline, ablated = by_hand(
        session.model, [(layer, head, q, 1) for layer in range(3) for head in ALL_HEADS for q in (3, 4)], position
    )
    assert found["position"] == position % T
    assert found["logit_diff"][0]["value"] == pytest.approx(float((baseline - ablated)[3]), abs=1e-4)
    assert (found["kl_divergence"] == 0) == (position == 0), "nothing before the query changes, to the last bit"


def test_in_float64_a_small_divergence_has_its_digits(tmp_path: Path):
    model = wide("gpt2", "sdpa")
    session = LocalSession(model, store=tmp_path)
    found = [
        session.knockout(token_ids=IDS, layers=2, heads=[head], edges=[[-1, key]])
        for head in range(6)
        for key in range(6)
    ]
    smallest = min(found, key=lambda one: one["kl_divergence"])
    (_, key), (head,) = smallest["knockout_edges"][0], smallest["heads"]
    exact = divergence(*by_hand(model, [(2, head, 6, key)]))
    assert exact < 1e-4
    assert smallest["kl_divergence"] == pytest.approx(exact, rel=1e-6)


# --- patterns


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_patterns_are_those_by_hand_with_0_where_an_edge_was(family: str, kind: str, tmp_path: Path):
    model = traced(family, attn_implementation=kind)
    found = LocalSession(model, store=tmp_path).knockout(
        token_ids=IDS, layers=[0, 2], heads=[5, 2], edges=[[4, 1], [-1, "4:6"]], include_patterns=True
    )["patterns"]
    pairs = [(4, 1), (6, 4), (6, 5)]
    removed = [(layer, head, q, k) for layer in (0, 2) for head in (2, 5) for q, k in pairs]
    before, after = run_by_hand(model.module, IDS), run_by_hand(model.module, IDS, removed)
    assert [(one["layer"], one["heads"], one["queries"]) for one in found] == [(0, [5, 2], [4, 6]), (2, [5, 2], [4, 6])]
    for one in found:
        for name, run in (("before", before), ("after", after)):
            expected = run.patterns[one["layer"]][[5, 2]][:, [4, 6]]
            assert torch.allclose(one[name].double(), expected, atol=1e-5), name
        assert (one["after"][:, 0, 1] == 0).all()
        assert (one["after"][:, 1, 4:6] == 0).all()
        assert torch.allclose(one["after"].sum(-1), torch.ones(()), atol=1e-6)


# --- sweeps

SWEEP: list[Any] = [
    {"layers": 1, "heads": [head], "edges": [[query, key]]}
    for head in (0, 5)
    for query, key in ((-1, 0), (3, 2), (-1, 4), (2, 0))
] + [{"layers": "all"}, {"edges": [["*", "1:3"]], "layers": [0, 2]}, {}]


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("rows", [2, 4, 64])  # batches of other shapes round otherwise: the models are in float64
def test_a_sweep_gives_what_single_calls_give(
    family: str, kind: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session = LocalSession(wide(family, kind), store=tmp_path)
    singles = [session.knockout(token_ids=IDS, tokens=[3, 77], **one) for one in SWEEP]
    monkeypatch.setattr(core, "BATCH_ROWS", rows)
    found = session.knockout_sweep(SWEEP, token_ids=IDS, tokens=[3, 77])
    assert [one["token_id"] for one in found["logit_tokens"]] == [3, 77]
    for row, single in zip(found["rows"], singles, strict=True):
        assert [row[name] for name in ("layers", "heads", "knockout_edges")] == [
            single[name] for name in ("layers", "heads", "knockout_edges")
        ]
        assert row["kl_divergence"] == pytest.approx(single["kl_divergence"], rel=1e-3, abs=1e-9)
        assert row["logit_diff"] == pytest.approx([one["value"] for one in single["logit_diff"]], abs=1e-5)
        top = single["top_changed"][0]
        assert row["top_change"]["token_id"] == top["token_id"]
        for name in ("baseline_prob", "ablated_prob", "abs_diff"):
            assert row["top_change"][name] == pytest.approx(top[name], abs=1e-6)


def test_a_list_of_specifications_given_to_knockout_is_a_sweep(session: LocalSession):
    sweep = session.knockout_sweep(SWEEP, token_ids=IDS, tokens=[3])
    assert session.knockout(token_ids=IDS, specifications=SWEEP, tokens=[3]) == sweep


def test_a_sweep_tells_how_far_it_is_and_its_batches_are_bounded(
    session: LocalSession, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(core, "BATCH_ROWS", 5)
    arguments = interventions.knockout_sweep.validate({"specifications": SWEEP, "token_ids": IDS})
    progress = [(one.done, one.total) for one in interventions.knockout_sweep.start(session, arguments)]
    assert progress == [(4, 11), (8, 11), (11, 11)]


def test_the_rows_of_a_batch_are_bounded_by_tokens_and_by_bytes():
    model = traced("qwen3")
    assert core.rows_at_once(model, 1, 8) == core.BATCH_ROWS
    assert core.rows_at_once(model, 200, 256) == core.BATCH_TOKENS // 200
    assert core.rows_at_once(model, 4096, 4096) == 2, "the baseline and one knockout always"
    # keys and values: 3 · 3 layers · 2 heads · 10 · 4 bytes; mask: 2 · 6 heads · (1 + 4); logits: 32 · 281
    per_row = 100_000 * (3 * 3 * 2 * 10 * 4 + 2 * 6 * 5) + 32 * VOCAB
    assert core.rows_at_once(model, 1, 100_000) == core.BATCH_BYTES // per_row < core.BATCH_ROWS


def test_a_long_shared_part_is_fed_in_pieces(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    whole = session.knockout(token_ids=IDS * 5, layers="all")
    monkeypatch.setattr(core, "PIECE", 4)
    pieces = session.knockout(token_ids=IDS * 5, layers="all")
    assert pieces["kl_divergence"] == pytest.approx(whole["kl_divergence"], rel=1e-4)


# --- refusals


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"edges": [[7, 0]]}, OutOfRange, "the query of the edge [7, 0] is 7; allowed are 0 to 6, and -1 to -7"),
        ({"edges": [[2, 5]]}, InvalidArgument, "the edge [2, 5] lies in the future"),
        ({"edges": [[3, "*"]]}, NoKeyLeft, "query 3 would have no key left"),
        ({"edges": [["*", 0]]}, NoKeyLeft, "query 0 would have no key left: the edges to its only key, 0,"),
        ({"edges": []}, InvalidArgument, "edges is empty"),
        ({"edges": [[1]]}, InvalidArgument, "edges.0: an edge is [query, key]"),
        ({"edges": "4,0"}, InvalidArgument, "edges"),
        ({"layers": 3}, OutOfRange, "a layer is 3; allowed are 0 to 2"),
        ({"layers": "1:9"}, OutOfRange, "a layer is 1:9"),
        ({"layers": [0, 5]}, OutOfRange, "a layer is 5"),
        ({"layers": []}, InvalidArgument, "layers is empty"),
        ({"layers": "some"}, InvalidArgument, "layers: a number, a range as '3:7', a list of either, or 'all'"),
        ({"heads": [6]}, OutOfRange, "heads is 6; the heads of tiny-qwen3 are 0 to 5"),
        ({"heads": []}, InvalidArgument, "heads is empty"),
        ({"position": 7}, OutOfRange, "position is 7; the positions of this prompt are 0 to 6, and -1 to -7"),
        ({"position": -8}, OutOfRange, "position is -8"),
        ({"top_k": 0}, OutOfRange, "top_k is 0"),
        ({"tokens": []}, InvalidArgument, "tokens is empty"),
        ({"tokens": [VOCAB]}, OutOfRange, f"the token ids of tiny-qwen3 are 0 to {VOCAB - 1}"),
        ({"tokens": ["xyz"]}, InvalidArgument, "the text 'xyz' is 3 tokens of tiny-qwen3"),
        ({"tokens": [True]}, InvalidArgument, "tokens.0"),
        ({"prompt": "a"}, InvalidArgument, "exactly one of prompt, messages and token_ids"),
        ({"token_ids": None}, InvalidArgument, "found none"),
        ({"token_ids": [5]}, NoKeyLeft, "query 0"),
        ({"token_ids": [VOCAB]}, OutOfRange, "token_ids is"),
        ({"layers": 1, "specifications": [{}]}, InvalidArgument, "layers and specifications exclude each other"),
        ({"include_patterns": True, "specifications": [{}]}, InvalidArgument, "a sweep returns no patterns"),
        ({"specifications": []}, InvalidArgument, "specifications is empty"),
        ({"specifications": [{}, {"edges": [[9, 0]]}]}, OutOfRange, "specifications.1: the query of the edge [9, 0]"),
        ({"specifications": [{}, {"edge": [[1, 0]]}]}, InvalidArgument, "specifications.1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    session: LocalSession, wrong: dict[str, Any], error: type[SightlineError], words: str
):
    arguments: dict[str, Any] = {"token_ids": IDS}
    with pytest.raises(error) as refused:
        session.knockout(**(arguments | wrong))
    assert type(refused.value) is error
    assert words in str(refused.value)


def test_the_argument_at_fault_is_named_in_a_sweep(session: LocalSession):
    with pytest.raises(NoKeyLeft) as refused:
        session.knockout_sweep([{}, {"edges": [[3, "*"]]}], token_ids=IDS)
    assert refused.value.param == "specifications.1.edges"


def test_a_sliding_layer_may_lose_all_that_it_sees(tmp_path: Path):
    session = LocalSession(traced("gemma2"), store=tmp_path)
    edges = [[-1, "2:"]]  # layers 0 and 2 see five positions
    session.knockout(token_ids=IDS, layers=1, edges=edges)
    with pytest.raises(NoKeyLeft, match="query 6 of layer 2, which sees the last 5 positions, would have no key left"):
        session.knockout(token_ids=IDS, layers=[1, 2], edges=edges)


def test_a_model_that_computes_nan_gives_no_number(tmp_path: Path):
    module = tiny_model("llama")
    model = trace_model("broken", module, tiny_tokenizer())
    with torch.no_grad():
        module.lm_head.weight[3] = math.nan
    with pytest.raises(NotFinite, match="NaN"):
        LocalSession(model, store=tmp_path).knockout(token_ids=IDS)


def test_a_model_without_points_is_refused(session: LocalSession, tmp_path: Path):
    model = dataclasses.replace(session.model, family=None, note="its family is none of ours")
    with pytest.raises(UnsupportedModel, match="its family is none of ours"):
        LocalSession(model, store=tmp_path).knockout(token_ids=IDS)
