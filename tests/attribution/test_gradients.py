"""Node gradients against plain autograd through the transformers modules, for every node type and family."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from attribution.operations.gradients import compute_node_gradient, compute_node_gradient_batch, node_gradient_report
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import reference_gradient
from tests.attribution.plain import distance
from tests.attribution.plain_layers import record
from tests.attribution.scoring import DATASET, LIMITS, PROMPTS, ask, plain_model, random_grad, stored_session
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

NODES = ("lm_head", "attn_q", "attn_k", "attn_v", "attn_a", "mlp_i", "mlp_g")
NODES_OF = [(family, node) for family in FAMILIES for node in NODES if (family, node) != ("gpt2", "mlp_g")]
POSITIONS, SOURCES = [9, 4, 7], [2, 10, 7, 0]  # in no order; source 10 is after the last query
SCORED = {"labels": [17, 200, 17], "candidate_ids": [200, 3, 17, 90]}
HEAD = {"qwen2": 1, "qwen3": 4, "llama": 2, "gemma2": 5, "gpt2": 3}
RULES = [
    {},
    {"steps": None, "rule": "uniform"},
    {"steps": 0},
    {"steps": 1},
    {"steps": 7, "rule": "gauss_legendre"},
    {"steps": 3, "rule": "uniform"},
]


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return cache(lambda family, dtype="float32": stored_session(family, tmp_path_factory.mktemp("store"), dtype))


def question(family: str, node: str, layer: int = 2) -> dict[str, Any]:
    """The arguments that the operation and the oracle share."""
    if node == "lm_head":
        return {"node_type": node, "layer": N_LAYERS, "head": 0, "pos_ids": POSITIONS, **SCORED}
    head = HEAD[family] if node.startswith("attn") else N_HEADS
    given: dict[str, Any] = {"node_type": node, "layer": layer, "head": head, "pos_ids": POSITIONS}
    return given | {"output_grad": random_grad(1, len(POSITIONS))}


def expected(family: str, arguments: dict[str, Any], dtype: str = "float32", sample: int = 0) -> dict[str, Any]:
    return reference_gradient(plain_model(family, dtype), PROMPTS[sample], **arguments)


@pytest.mark.parametrize(("family", "node"), NODES_OF)
def test_gradients_are_those_of_autograd_by_every_rule(session_of: Sessions, family: str, node: str) -> None:
    for layer, rule in enumerate(RULES):
        given: dict[str, Any] = question(family, node, layer % N_LAYERS) | rule
        found = ask(session_of(family), compute_node_gradient, **given)
        assert found.dtype == torch.float32
        assert distance(found, expected(family, given)["gradient"]) < LIMITS["float32"], rule


@pytest.mark.parametrize(("family", "node"), NODES_OF)
def test_a_float64_model_gives_float64_gradients(session_of: Sessions, family: str, node: str) -> None:
    for rule in ({}, {"steps": 5, "rule": "uniform"}):
        given = question(family, node) | rule
        found = ask(session_of(family, "float64"), compute_node_gradient, **given)
        assert found.dtype == torch.float64
        assert distance(found, expected(family, given, "float64")["gradient"]) < LIMITS["float64"], rule


@pytest.mark.parametrize("node", ["attn_k", "attn_v", "attn_a"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sources_are_the_positions_of_the_result(session_of: Sessions, family: str, node: str) -> None:
    given: dict[str, Any] = question(family, node) | {"src_pos_ids": SOURCES}
    found = ask(session_of(family), compute_node_gradient, **given)
    assert distance(found, expected(family, given)["gradient"]) < LIMITS["float32"]
    assert bool((found[0, 1] == 0).all())  # no query sees it
    assert bool((found[0, 2] != 0).any())


@pytest.mark.parametrize("node", ["attn_q", "attn_k", "attn_v", "attn_a"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_all_heads_come_at_once(session_of: Sessions, family: str, node: str) -> None:
    given: dict[str, Any] = question(family, node)
    found = ask(session_of(family), compute_node_gradient, **given | {"head": None})
    assert found.shape == (N_HEADS, len(POSITIONS), D_MODEL)
    for head in range(N_HEADS):
        one = expected(family, given | {"head": head})["gradient"]
        assert distance(found[head], one[0]) < LIMITS["float32"], head


@pytest.mark.parametrize("family", FAMILIES)
def test_without_positions_the_node_writes_everywhere(session_of: Sessions, family: str) -> None:
    everywhere = list(range(len(PROMPTS[0])))
    given: dict[str, Any] = {
        "node_type": "attn_k",
        "layer": 0,
        "head": 1,
        "output_grad": random_grad(1, len(everywhere)),
    }
    found = ask(session_of(family), compute_node_gradient, **given)
    assert distance(found, expected(family, given | {"pos_ids": everywhere})["gradient"]) < LIMITS["float32"]


@pytest.mark.parametrize("layer", [N_LAYERS - 1, N_LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_scored_among_the_vocabulary_too(session_of: Sessions, family: str, layer: int) -> None:
    given: dict[str, Any] = {"node_type": "lm_head", "layer": layer, "pos_ids": POSITIONS, "labels": [17, 200, 17]}
    found = ask(session_of(family), node_gradient_report, **given)
    oracle = expected(family, given | {"head": 0})
    assert distance(found["gradient"], oracle["gradient"]) < LIMITS["float32"]
    assert found["objective"] == pytest.approx(oracle["objective"], rel=1e-5)


@pytest.mark.parametrize(("family", "node"), NODES_OF)
def test_the_report_says_how_complete_the_gradient_is(session_of: Sessions, family: str, node: str) -> None:
    given: dict[str, Any] = question(family, node, layer=1) | {"steps": 3}
    if node in ("attn_k", "attn_v", "attn_a"):
        given["src_pos_ids"] = SOURCES  # which do not enter the error
    for dtype in ("float32", "float64"):
        report = ask(session_of(family, dtype), node_gradient_report, **given)
        oracle = expected(family, given, dtype)
        assert set(report) == {"gradient", "objective", "objective_at_zero", "completeness_error", "steps"}
        assert distance(report["gradient"], oracle["gradient"]) < LIMITS[dtype]
        assert report["steps"] == (0 if node == "attn_a" else 3)
        scale = max(abs(oracle["objective"]), abs(oracle["objective_at_zero"]))
        for name in ("objective", "objective_at_zero"):
            assert report[name] == pytest.approx(oracle[name], rel=10 * LIMITS[dtype], abs=10 * LIMITS[dtype] * scale)
        noise = 20 * LIMITS[dtype] * (1 + scale / abs(oracle["objective"] - oracle["objective_at_zero"]))
        assert report["completeness_error"] == pytest.approx(oracle["completeness_error"], rel=1e-2, abs=noise)


@pytest.mark.parametrize(("family", "node"), [pair for pair in NODES_OF if pair[1] != "attn_a"])
def test_auto_takes_as_many_steps_as_the_error_needs(session_of: Sessions, family: str, node: str) -> None:
    given: dict[str, Any] = question(family, node)
    report = ask(session_of(family), node_gradient_report, **given | {"steps": "auto"})
    steps = report["steps"]
    assert steps in (4, 8, 16, 32, 64)
    assert report["completeness_error"] < 1e-3 or steps == 64
    assert steps == 4 or expected(family, given | {"steps": steps // 2})["completeness_error"] > 0.99e-3
    assert distance(report["gradient"], expected(family, given | {"steps": steps})["gradient"]) < LIMITS["float32"]
    alone = ask(session_of(family), compute_node_gradient, **given | {"steps": "auto"})
    assert torch.equal(alone, report["gradient"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_times_activations_are_differences_of_the_objective(session_of: Sessions, family: str) -> None:
    session, everywhere = session_of(family, "float64"), list(range(len(PROMPTS[0])))
    sample = session.sample(DATASET, 0)
    grad = random_grad(1, len(everywhere))
    given: dict[str, Any] = {"layer": 1, "pos_ids": everywhere, "output_grad": grad, "steps": 32}
    for node in ("attn_v", "attn_q", "attn_k"):
        _is_complete(session, [node], sample.read("resid", 1), {"head": HEAD[family], **given})
    branches = ["mlp_i"] if family == "gpt2" else ["mlp_i", "mlp_g"]
    _is_complete(session, branches, record(plain_model(family, "float64"), PROMPTS[0])["mid"][1], given)
    scored = {"layer": N_LAYERS, "pos_ids": everywhere, "labels": [3] * len(everywhere), "steps": 32}
    _is_complete(session, ["lm_head"], sample.read("resid", N_LAYERS), scored)


def _is_complete(session: LocalSession, nodes: list[str], x: torch.Tensor, given: dict[str, Any]) -> None:
    reports = [ask(session, node_gradient_report, node_type=node, **given) for node in nodes]
    product = sum(float((report["gradient"] * x).sum()) for report in reports)
    difference = reports[0]["objective"] - reports[0]["objective_at_zero"]
    limit = 1e-6 if nodes == ["attn_v"] else 1e-4
    assert product == pytest.approx(difference, rel=limit), nodes
    assert reports[0]["completeness_error"] < limit, nodes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dataset_gives_the_mean_over_its_samples(session_of: Sessions, family: str) -> None:
    grad, samples = random_grad(1, 2), range(len(PROMPTS))
    questions: list[dict[str, Any]] = [
        {"node_type": "attn_q", "layer": 0, "head": 1, "pos_ids": [7, 3], "output_grad": grad},
        {"node_type": "lm_head", "layer": N_LAYERS, "head": 0, "pos_ids": [7, 3], "labels": [1, 2]},
    ]
    for given in questions:
        oracles = [expected(family, given, sample=sample) for sample in samples]
        report = ask(session_of(family), node_gradient_report, sample_id=None, **given)
        mean = torch.stack([one["gradient"] for one in oracles]).mean(0)
        assert distance(report["gradient"], mean) < LIMITS["float32"]
        found = ask(session_of(family), compute_node_gradient, sample_id=None, **given)
        assert distance(found, mean) < LIMITS["float32"]
        assert report["objective"] == pytest.approx(sum(one["objective"] for one in oracles) / 3, rel=1e-4)
        worst = max(one["completeness_error"] for one in oracles)
        assert report["completeness_error"] == pytest.approx(worst, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_has_a_gradient_or_labels_for_each_sample(session_of: Sessions, family: str) -> None:
    grads = random_grad(2, 1, 2)
    given: dict[str, Any] = {"node_type": "mlp_i", "layer": 1, "pos_ids": [7, 3]}
    found = ask(session_of(family), compute_node_gradient_batch, sample_ids=[2, 1], output_grads=list(grads), **given)
    assert found.shape == (2, 1, 2, D_MODEL)
    for row, sample in enumerate([2, 1]):
        oracle = expected(family, given | {"head": N_HEADS, "output_grad": grads[row]}, sample=sample)
        assert distance(found[row], oracle["gradient"]) < LIMITS["float32"]
    given: dict[str, Any] = {"node_type": "lm_head", "layer": N_LAYERS, "pos_ids": [7, 3], "candidate_ids": [5, 6, 8]}
    found = ask(session_of(family), compute_node_gradient_batch, sample_ids=[1, 0], labels=[[5, 8], [6, 6]], **given)
    oracle = expected(family, given | {"head": 0, "labels": [6, 6]})
    assert distance(found[1], oracle["gradient"]) < LIMITS["float32"]
    given = {"node_type": "attn_v", "layer": 2, "pos_ids": [7, 3], "output_grads": list(grads)}
    found = ask(session_of(family), compute_node_gradient_batch, sample_ids=[2, 1], **given)
    assert found.shape == (2, N_HEADS, 2, D_MODEL)
