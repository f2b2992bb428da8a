"""Nodes: interned in the current graph, and gradients that flow from what is downstream."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution import graph_registry
from attribution.errors import InvalidArgument, OutOfRange, SampleMismatch, ShapeMismatch
from attribution.graph import Graph
from attribution.nodes import Node
from attribution.results import SampleRef
from tests.attribution.graphing import QUERIES, dense, everywhere, results, session_of
from tests.attribution.plain import distance
from tests.attribution.scoring import DATASET, PROMPTS, random_grad
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_LAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def session(folder: Path) -> Any:
    return session_of("qwen3", folder / "qwen3")


@pytest.fixture
def graph() -> Graph:
    return Graph(3, D_MODEL)


def grown(graph: Graph, family: str) -> list[Node]:
    """One node of every type, each fed by all that is deeper, in the order of depth, the deepest first."""
    mlp = ["mlp_i"] if family == "gpt2" else ["mlp_g", "mlp_i"]
    parts = [
        *((2, N_HEADS, name) for name in mlp),
        (2, 5, "attn_q"),
        (2, 1, "attn_k"),
        *((1, N_HEADS, name) for name in mlp),
        (1, 4, "attn_v"),
        (1, 0, "attn_a"),
        (0, N_HEADS, "mlp_i"),
        (0, 3, "attn_v"),
    ]
    nodes = [graph.add_node(Node(N_LAYERS, 0, "lm_head"))]
    for part in parts:
        node = Node(*part)
        nodes.append(graph.add_node(node, [one for one in nodes if one.depth > node.depth]))
    return nodes


def test_the_same_arguments_give_the_same_node_until_another_graph_is_current(graph: Graph) -> None:
    node = Node(1, 4, "attn_v")
    assert Node(1, 4, "attn_v") is node
    assert Node(np.int64(1), torch.tensor(4), "attn_v") is node
    assert len({node, Node(1, 4, "attn_q"), Node(1, 3, "attn_v"), Node(2, 4, "attn_v")}) == 4
    Graph(3, D_MODEL)
    assert Node(1, 4, "attn_v") is not node
    graph.make_current()
    assert Node(1, 4, "attn_v") is node
    assert repr(node) == "Node(1, 4, 'attn_v')"


def test_both_layers_of_the_final_stream_are_one_node(graph: Graph) -> None:
    head = Node(N_LAYERS - 1, 0, "lm_head")
    assert Node(N_LAYERS, 0, "lm_head") is head
    assert (head.layer, head.depth) == (N_LAYERS, float(N_LAYERS))
    with pytest.raises(OutOfRange, match="lm_head is at layer 3 in this graph; found 7"):
        Node(7, 0, "lm_head")


def test_depths_are_where_nodes_read(graph: Graph) -> None:
    types = ["attn_q", "attn_k", "attn_v", "attn_a", "mlp_i", "mlp_g"]
    assert [Node(2, N_HEADS, name).depth for name in types] == [2.0, 2.0, 2.0, 2.0, 2.5, 2.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, "attn_x"), "'attn_x'; it is one of lm_head, attn_q"),
        ((-1, 0, "attn_q"), "layer is -1"),
        ((True, 0, "attn_q"), "layer is True"),
        ((1, -2, "attn_q"), "head is -2"),
        ((3, 1, "lm_head"), "lm_head has the column 0"),
    ],
)
def test_what_no_node_can_be_is_refused(graph: Graph, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Node(*arguments)
    assert not graph.interned


def test_there_are_no_nodes_without_a_graph() -> None:
    graph_registry.make_current(None)
    with pytest.raises(InvalidArgument, match=r"Graph\(dataset_size, hidden_size\) makes one"):
        Node(0, 0, "attn_q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 0, "attn_q"), "has 0 to 2"), ((0, 6, "attn_q"), "has 0 to 5"), ((0, 5, "mlp_i"), "has 6 to 6")],
)
def test_what_the_model_does_not_have_is_refused_once_it_is_known(
    session: Any, graph: Graph, arguments: tuple[Any, ...], message: str
) -> None:
    early = graph.add_node(Node(*arguments), [graph.add_node(Node(N_LAYERS, 0, "lm_head"))][:0])
    Node(N_LAYERS, 0, "lm_head").backward(results()[0], session)
    for late in (lambda: Node(*arguments), lambda: early.backward(results()[0], session)):
        with pytest.raises(InvalidArgument, match=message):
            late()


def test_the_mean_gradient_is_the_plain_mean_over_samples(graph: Graph) -> None:
    node, grads = Node(1, 2, "attn_q"), random_grad(3, 1, 4).float()
    for index in (2, 0, 1):
        node.hold(index, [5, 1, 2, 7], grads[index])
        node.hold(index, [5, 1, 2, 7], grads[index])  # the same again counts once
    assert node.samples == [0, 1, 2]
    assert torch.equal(node.grad, (grads[0] + grads[1] + grads[2]) / 3) or distance(node.grad, grads.mean(0)) < 1e-7
    assert node.gradient(1).positions == (5, 1, 2, 7)


def test_another_gradient_for_a_sample_is_refused_unless_it_is_to_be_replaced(graph: Graph) -> None:
    node, grads = Node(1, 2, "attn_q"), random_grad(2, 1, 3).float()
    node.hold(0, [0, 1, 2], grads[0])
    for positions, grad in (([0, 1, 2], grads[1]), ([0, 2, 1], grads[0])):
        with pytest.raises(SampleMismatch, match="another gradient for sample 0"):
            node.hold(0, positions, grad)
        assert torch.equal(node.grad, grads[0])
    node.hold(0, [0, 1, 2], grads[1], replace=True)
    assert torch.equal(node.grad, grads[1])


def test_gradients_that_do_not_fit_are_refused(graph: Graph) -> None:
    node, grad = Node(1, 2, "attn_q"), random_grad(1, 3).float()
    with pytest.raises(OutOfRange, match="samples of this graph are 0 to 2"):
        node.hold(3, [0, 1, 2], grad)
    with pytest.raises(ShapeMismatch, match=r"expected \[1, 2, 48\]"):
        node.hold(0, [0, 1], grad)
    with pytest.raises(InvalidArgument, match="holds no gradient yet"):
        _ = node.grad
    node.hold(0, [0, 1, 2], grad)
    node.hold(1, [0, 1], grad[:, :2])
    with pytest.raises(ShapeMismatch, match="2 to 3 positions"):
        _ = node.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_takes_the_gradients_of_what_is_downstream_by_position(
    folder: Path, graph: Graph, family: str
) -> None:
    session = session_of(family, folder / family)
    nodes = grown(graph, family)
    for r in results():
        for node in nodes:
            node.backward(r, session)
            expected = everywhere(session, node, r)
            assert expected.abs().max() > 0, node
            assert distance(dense(node, r), expected) < 1e-5, node
    assert nodes[0].gradient(1).positions == tuple(QUERIES[1])
    # attn_k@2 looks back from the last query, and what it feeds from is wherever it looks
    assert Node(2, 1, "attn_k").gradient(1).positions == tuple(range(max(QUERIES[1]) + 1))
    assert Node(1, 4, "attn_v").gradient(0).positions == tuple(range(max(QUERIES[0]) + 1))


def test_the_whole_graph_runs_the_deepest_first(session: Any, graph: Graph) -> None:
    nodes, r = grown(graph, "qwen3"), results()[2]
    graph.backward(r, session, steps=2)
    for node in nodes:
        held = node.gradient(2).grad
        node.backward(r, session, steps=2)  # no other gradient, else it were refused
        assert torch.equal(node.gradient(2).grad, held)
    with pytest.raises(SampleMismatch, match="holds another gradient"):
        nodes[0].backward(r, session, steps=0)
    nodes[0].backward(r, session, steps=0, replace=True)
    graph.forget()
    assert not any(node.samples for node in nodes)


def test_positions_restrict_a_path(session: Any, graph: Graph) -> None:
    head = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    value = graph.add_node(Node(2, 3, "attn_v"), [head])
    r = results()[0]
    head.backward(r, session, pos_ids=[9, 4])
    expected = session.compute_node_gradient(
        DATASET, 0, "lm_head", N_LAYERS, 0, [9, 4], labels=[200, 17], candidate_ids=r.candidate_ids
    )
    assert torch.equal(head.gradient(0).grad, expected)
    value.backward(r, session, pos_ids=[4], src_pos_ids=[2, 0])
    given = {"pos_ids": [4], "src_pos_ids": [2, 0], "output_grad": expected[:, 1:]}
    assert torch.equal(value.gradient(0).grad, session.compute_node_gradient(DATASET, 0, "attn_v", 2, 3, **given))
    assert value.gradient(0).positions == (2, 0)
    with pytest.raises(OutOfRange, match="pos_ids has 7, where no downstream node"):
        value.backward(r, session, pos_ids=[4, 7])
    with pytest.raises(OutOfRange, match="pos_ids has 5; the query positions are"):
        head.backward(r, session, pos_ids=[5])


def test_a_downstream_node_without_its_gradient_is_named(session: Any, graph: Graph) -> None:
    head = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    mlp = graph.add_node(Node(2, N_HEADS, "mlp_i"), [head])
    query = graph.add_node(Node(1, 2, "attn_q"), [head, mlp])
    first, second = results()[:2]
    head.backward(first, session)
    head.backward(second, session)
    mlp.backward(first, session)
    query.backward(first, session)
    with pytest.raises(InvalidArgument, match=r"Node\(2, 6, 'mlp_i'\) holds no gradient for sample 1"):
        query.backward(second, session)
    with pytest.raises(InvalidArgument, match=r"Node\(0, 1, 'attn_v'\) has no downstream node"):
        Node(0, 1, "attn_v").backward(first, session)


def test_results_and_models_that_do_not_belong_to_the_graph_are_refused(
    session: Any, folder: Path, graph: Graph
) -> None:
    head, r = Node(N_LAYERS, 0, "lm_head"), results()[0]
    r.outputs = None
    with pytest.raises(InvalidArgument, match=r"forward_results\(dataset_id, results\) does"):
        head.backward(r, session)
    with pytest.raises(InvalidArgument, match="a result is expected, not a"):
        head.backward(session, r)
    with pytest.raises(OutOfRange, match="hidden_size is 32"):
        Graph(3, 32).scope.admit(results()[0], session)
    head.backward(results()[0], session)
    with pytest.raises(SampleMismatch, match="this graph is of the model 'tiny-qwen3'"):
        head.backward(results()[1], session_of("llama", folder / "llama"))
    other = results()[1]
    other.outputs = SampleRef("others", 1)
    with pytest.raises(SampleMismatch, match="of the dataset 'puzzles'"):
        head.backward(other, session)
    other = results()[1]
    other.index = len(PROMPTS)
    with pytest.raises(OutOfRange, match="index of the result is 3"):
        head.backward(other, session)
    assert head.samples == [0]


RELOADING = """
import importlib
import attribution.graph, attribution.nodes
graph = attribution.Graph(2, 8)
node = graph.add_node(attribution.Node(1, 0, "attn_q"))
for name in ("errors", "nodes", "graph_scope", "graph", "unified"):
    importlib.reload(importlib.import_module(f"attribution.{name}"))
assert attribution.Node(1, 0, "attn_q") is node
assert attribution.graph_registry.current() is graph
assert graph.node(1, 0, "attn_q") is node
importlib.reload(attribution.graph_registry)
try:
    attribution.Node(1, 0, "attn_q")
except Exception as error:
    print(error)
"""


def test_the_graph_outlives_a_reload_of_every_module_but_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", RELOADING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "there is no current graph" in done.stdout
