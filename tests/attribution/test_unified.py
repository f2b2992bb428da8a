"""Operations by result against plain loops over the operations that they are made of, locally and on a server."""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

import attribution
from attribution import (
    Graph,
    LocalSession,
    Node,
    attribute_attn_weights,
    attribute_residual,
    attribute_step,
    get_attn_weights,
    get_head_output,
    get_hidden_states,
    mr,
    topk_md,
    unified,
)
from attribution.errors import InvalidArgument
from puzzles import Result, gen_puzzle
from tests.attribution.graphing import QUERIES, dense, results, session_of
from tests.attribution.plain import distance
from tests.attribution.scoring import DATASET, PROMPTS
from tests.models import D_MODEL, N_HEADS, N_LAYERS


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return session_of("qwen3", tmp_path_factory.mktemp("store"))


def chain() -> list[Node]:
    """lm_head, an MLP path that feeds it, and attention paths that feed both; they end at different positions."""
    graph = Graph(3, D_MODEL)
    head = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    mlp = graph.add_node(Node(2, N_HEADS, "mlp_g"), [head])
    value = graph.add_node(Node(2, 5, "attn_v"), [head, mlp])
    query = graph.add_node(Node(1, 2, "attn_q"), [mlp, head])
    return [query, head, value, mlp]


def test_the_getters_ask_for_the_sample_of_the_result(session: Any) -> None:
    r = results()[1]
    assert torch.equal(get_hidden_states(session, r, layer=3), session.get_hidden_states(DATASET, 1, 3))
    found = get_hidden_states(session, r, layer=1, pos_ids=[4, 2])
    assert torch.equal(found, session.get_hidden_states(DATASET, 1, 1, [4, 2]))
    found = get_attn_weights(session, r, layer=2, head=4, pos_ids=r.query_positions)
    assert torch.equal(found, session.get_attn_weights(DATASET, 1, 2, 4, QUERIES[1]))
    assert get_attn_weights(session, r, layer=0).shape == (1, N_HEADS, 8, 8)
    found = get_head_output(session, r, layer=0, head=3, pos_ids=[1])
    assert torch.equal(found, session.get_head_output(DATASET, 1, 0, 3, [1]))


def test_results_that_were_not_run_are_refused_everywhere(session: Any) -> None:
    r, nodes = results()[0], chain()
    r.outputs = None
    calls = [
        lambda: get_hidden_states(session, r, layer=0),
        lambda: get_attn_weights(session, r, layer=0),
        lambda: get_head_output(session, r, layer=0, head=0),
        lambda: attribute_residual(r, session, nodes),
        lambda: attribute_step(r, session, nodes),
        lambda: attribute_attn_weights(r, session, 0, 0, nodes),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=r"forward_results\(dataset_id, results\) does"):
            call()
    with pytest.raises(InvalidArgument, match="a result is expected, not a LocalSession"):
        get_hidden_states(r, session, layer=0)


def test_a_step_is_the_gradients_and_their_residual_attribution(session: Any) -> None:
    for r in results():
        nodes = chain()
        found = attribute_step(r, session, nodes)
        assert found.shape == (N_LAYERS, N_HEADS + 1, 4)
        everywhere = list(range(len(PROMPTS[r.index])))
        for column, node in zip(found.unbind(-1), nodes, strict=True):
            expected = session.attribute_residual(DATASET, r.index, everywhere, [dense(node, r)], [node.depth])
            assert expected.abs().max() > 0
            assert distance(column, expected[..., 0]) < 1e-5, node
        # only what is strictly upstream counts: the MLP path takes from attention of its own layer, not from itself
        assert found[2, :-1, 3].abs().min() > 0
        assert found[2, -1, 3] == 0
        assert found[2:, :, 2].abs().max() == 0
        bounded = attribute_residual(r, session, nodes, from_layer=1, to_layer=1)
        assert torch.equal(bounded[1], found[1])
        assert bounded[[0, 2]].abs().max() == 0


def test_gradients_are_those_of_a_loop_by_hand(session: Any) -> None:
    nodes, r = chain(), results()[0]
    query, head, value, mlp = nodes
    scored = {"labels": r.labels, "candidate_ids": r.candidate_ids, "steps": 2, "rule": "uniform"}
    rule = {"steps": 2, "rule": "uniform"}
    at = r.query_positions
    found = attribute_step(r, session, nodes, **rule)
    at_head = session.compute_node_gradient(DATASET, 0, "lm_head", N_LAYERS, 0, at, **scored)
    at_mlp = session.compute_node_gradient(DATASET, 0, "mlp_g", 2, N_HEADS, at, output_grad=at_head, **rule)
    both = at_head + at_mlp
    at_query = session.compute_node_gradient(DATASET, 0, "attn_q", 1, 2, at, output_grad=both, **rule)
    for node, expected in ((head, at_head), (mlp, at_mlp), (query, at_query)):
        held = node.gradient(0)
        rows = [held.positions.index(position) for position in at]
        assert distance(held.grad[:, rows], expected) < 1e-5
    scores = session.attribute_residual(DATASET, 0, at, [at_query, at_head, at_mlp], [1.0, 3.0, 2.5])
    assert distance(found[..., [0, 1, 3]], scores) < 1e-5
    assert value.gradient(0).positions == tuple(range(10))


def test_attention_attribution_adds_up_the_nodes_at_all_their_positions(session: Any) -> None:
    nodes, r = chain(), results()[2]
    attribute_step(r, session, nodes)
    everywhere = list(range(len(PROMPTS[2])))
    for signed in (False, True):
        aw, aa = attribute_attn_weights(r, session, 0, 3, nodes, signed=signed)
        expected = session.attribute_attn_weights(
            DATASET, 2, 0, 3, [dense(node, r) for node in nodes], everywhere, signed=signed
        )
        seen = max(QUERIES[2]) + 1  # attn_v holds a gradient at each position up to the last query
        assert aw.shape == (seen, len(PROMPTS[2]))
        assert distance(aw, expected[0][:seen]) < 1e-5
        assert distance(aa, expected[1][:seen]) < 1e-5
    alone = attribute_attn_weights(r, session, 1, 0, nodes[1])[1]
    assert alone.shape == (3, len(PROMPTS[2]))
    with pytest.raises(InvalidArgument, match=r"Node\(1, 2, 'attn_q'\) does not read what layer 1 writes"):
        attribute_attn_weights(r, session, 1, 0, nodes)


def test_a_mean_over_results_is_the_mean_of_the_steps(session: Any) -> None:
    nodes = chain()
    found = mr(attribute_step)(results(), session, nodes, show_progress=False)
    steps = [attribute_step(r, session, chain()) for r in results()]
    assert distance(found, torch.stack(steps).mean(0)) < 1e-6
    mean = torch.stack([nodes[1].gradient(index).grad for index in range(3)]).mean(0)
    assert distance(nodes[1].grad, mean) < 1e-6
    broken = results()
    broken[1].outputs = None
    with pytest.raises(InvalidArgument, match=r"^sample 1: result 1 has no outputs"):
        mr(attribute_step)(broken, session, chain(), show_progress=False)


def test_what_cannot_be_attributed_is_refused(session: Any) -> None:
    nodes, r = chain(), results()[0]
    with pytest.raises(InvalidArgument, match="nodes is empty"):
        attribute_residual(r, session, [])
    nodes[1].backward(r, session)
    with pytest.raises(InvalidArgument, match=r"Node\(2, 6, 'mlp_g'\) holds no gradient for sample 0"):
        attribute_residual(r, session, nodes[3])
    with pytest.raises(InvalidArgument, match="nodes are of several graphs"):
        attribute_residual(r, session, [nodes[1], chain()[1]])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    return LocalSession("demo", store=tmp_path_factory.mktemp("demo"))


def test_in_the_demo_model_the_heads_with_the_most_attribution_are_those_that_are_missed(demo: LocalSession) -> None:
    tokenizer = demo.model.tokenizer
    given = [Result.from_puzzle(gen_puzzle(n=3, m=3, n_train=3, seed=seed), tokenizer, seed) for seed in range(3)]
    demo.forward_results("sanity", given)
    status = demo.status()
    Graph(3, status["hidden_size"])
    head = Node(status["n_layers"], 0, "lm_head")
    scores = mr(attribute_step)(given, demo, head)[:, :-1]
    order = [row[:2] for row in topk_md(scores, scores.numel(), transpose=True)]

    def lost(heads: list[tuple[int, ...]]) -> float:
        def of(r: Result, model: Any) -> float:
            scored = {"labels": r.labels, "candidate_ids": r.candidate_ids, "pos_ids": r.query_positions}
            found = model.ablate("sanity", r.index, heads=heads, **scored)
            return found["before"] - found["after"]

        return mr(of)(given, demo)

    assert lost(order[:3]) > 4 * abs(lost(order[10:13])) > 0


def test_the_package_brings_torch_only_when_a_name_is_used() -> None:
    code = (
        "import sys, attribution, attribution.errors\n"
        "assert not {'torch', 'nnsight', 'transformers'} & sys.modules.keys()\n"
        "assert set(attribution.__all__) <= set(dir(attribution))\n"
        "for name in attribution.__all__: getattr(attribution, name)\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Nodes'"):
        _ = attribution.Nodes


class Counted:
    """A session whose calls are counted."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.session, name)


def test_the_steps_of_many_samples_travel_together_and_are_those_of_single_calls(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unified, "TOGETHER", 2)
    graph = Graph(3, D_MODEL)
    top = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    nodes = [graph.add_node(Node(1, 4, name), [top]) for name in ("attn_q", "attn_k")]
    counted = Counted(session)
    found = mr(attribute_step)(results(), counted, [top, *nodes], steps=1, show_progress=False)
    assert counted.calls["run_calls"] >= 2 * 4  # two groups of samples, each with three nodes and their attribution
    assert counted.calls["compute_node_gradient"] == counted.calls["attribute_residual"] == 0
    singles = [attribute_step(r, session, [top, *nodes], steps=1) for r in results()]
    assert torch.allclose(found, torch.stack(singles).mean(0), rtol=1e-5, atol=1e-7)


def test_an_error_among_many_samples_is_told_of_its_own(session: Any) -> None:
    wrong = results()
    wrong[1].labels = [281] * len(wrong[1].labels)
    graph = Graph(3, D_MODEL)
    top = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    with pytest.raises(InvalidArgument, match=r"^sample 1: labels is 281|^sample 1: the label 281"):
        mr(attribute_step)(wrong, session, [top], show_progress=False)
