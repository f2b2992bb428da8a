"""Graphs: edges that lead deeper, the order of depth, and files."""

import json
from pathlib import Path
from typing import Any

import pytest

from attribution import graph_registry
from attribution.errors import InvalidArgument, OutOfRange, SampleMismatch, StorageFailed
from attribution.graph import Graph, deepest_first
from attribution.nodes import Node
from tests.attribution.graphing import results, session_of
from tests.models import D_MODEL, N_HEADS, N_LAYERS


@pytest.fixture
def graph() -> Graph:
    return Graph(3, D_MODEL)


def small() -> list[Node]:
    """attn_v and attn_q of one layer, the MLP of the next, and lm_head by the lower of its layers."""
    return [Node(1, 4, "attn_q"), Node(1, 4, "attn_v"), Node(2, N_HEADS, "mlp_i"), Node(2, 0, "lm_head")]


def joined(graph: Graph) -> list[Node]:
    """`small` with edges: mlp → head (no score), q → mlp (0.5), v → mlp (−2) and head (3)."""
    query, value, mlp, head = small()
    graph.add_node(head)
    graph.add_node(mlp, [head])
    graph.add_node(query, [mlp], [0.5])
    graph.add_node(value, [head, mlp], [3.0, -2.0])
    return [query, value, mlp, head]


def test_nodes_are_in_the_order_of_depth_and_know_their_edges(graph: Graph) -> None:
    query, value, mlp, head = joined(graph)
    assert graph.nodes == [query, value, mlp, head]
    assert deepest_first([query, head, mlp]) == [head, mlp, query]
    assert graph.edges == [(query, mlp), (value, mlp), (value, head), (mlp, head)]
    assert graph.downstream(value) == value.downstream == [mlp, head]
    assert graph.upstream(head) == [value, mlp]
    assert [graph.score(*edge) for edge in graph.edges] == [0.5, -2.0, 3.0, None]
    assert len(graph) == 4
    assert query in graph
    assert Node(0, 0, "attn_q") not in graph


def test_a_node_added_again_gets_more_edges_and_keeps_those_it_has(graph: Graph) -> None:
    query, _, mlp, head = joined(graph)
    graph.add_node(query, [head])
    graph.add_node(query, [mlp])
    assert [graph.score(*edge) for edge in graph.edges if edge[0] is query] == [0.5, None]
    graph.add_node(query, [mlp], [0.75])
    assert graph.score(query, mlp) == 0.75


def test_edges_that_do_not_lead_deeper_are_refused(graph: Graph) -> None:
    query, value, mlp, head = joined(graph)
    gate = Node(2, N_HEADS, "mlp_g")
    late = graph.add_node(Node(2, 0, "attn_k"), [mlp])
    for upstream, downstream in ((mlp, query), (head, mlp), (query, value), (gate, mlp), (mlp, mlp), (mlp, late)):
        with pytest.raises(InvalidArgument, match="it leads to a node that reads deeper"):
            graph.add_node(upstream, [downstream])
    assert gate not in graph
    with pytest.raises(InvalidArgument, match=r"Node\(2, 6, 'mlp_g'\) is not in the graph; add it first"):
        graph.add_node(query, [head, gate])
    assert head not in query.downstream  # nothing of a refused call remains
    with pytest.raises(InvalidArgument, match="1 scores for 2 edges"):
        graph.add_node(query, [head, mlp], [1.0])
    with pytest.raises(InvalidArgument, match="NaN or infinite"):
        graph.add_node(query, [head], [float("nan")])


def test_nodes_of_another_graph_are_refused(graph: Graph) -> None:
    joined(graph)
    Graph(3, D_MODEL)
    stranger = Node(1, 4, "attn_q")
    for call in (lambda: graph.add_node(stranger), lambda: graph.add_node(graph.nodes[0], [stranger])):
        with pytest.raises(InvalidArgument, match="is a node of another graph"):
            call()


def test_nodes_and_edges_that_are_not_there_are_named(graph: Graph) -> None:
    query, value, _, head = joined(graph)
    assert graph.node(1, 4, "attn_q") is query
    assert graph.node(3, 0, "lm_head") is head
    with pytest.raises(InvalidArgument, match=r"Node\(0, 1, 'attn_q'\) is not in the graph"):
        graph.node(0, 1, "attn_q")
    with pytest.raises(InvalidArgument, match="no edge from"):
        graph.score(query, value)


@pytest.mark.parametrize("sizes", [(0, 48), (3, 0)])
def test_an_empty_dataset_has_no_graph(sizes: tuple[int, int]) -> None:
    with pytest.raises(OutOfRange, match="at least 1"):
        Graph(*sizes)


def test_a_file_gives_the_graph_back_and_makes_it_current(graph: Graph, tmp_path: Path) -> None:
    session = session_of("qwen3", tmp_path / "store")
    joined(graph)
    graph.backward(results()[0], session, steps=1)
    path = graph.save(tmp_path / "new" / "graph.json")
    assert [one.name for one in path.parent.iterdir()] == ["graph.json"]
    loaded = Graph.load(path, session)
    assert graph_registry.current() is loaded
    assert loaded is not graph
    assert repr(loaded) == repr(graph) == "Graph(3, 48) of 4 nodes, 4 edges"
    assert [repr(node) for node in loaded.nodes] == [repr(node) for node in graph.nodes]
    assert [loaded.score(*edge) for edge in loaded.edges] == [graph.score(*edge) for edge in graph.edges]
    assert loaded.scope.model == graph.scope.model
    assert loaded.node(1, 4, "attn_q") is Node(1, 4, "attn_q")
    assert loaded.nodes[0].samples == []  # gradients are computed anew
    loaded.backward(results()[0], session, steps=1)
    assert loaded.nodes[0].grad.equal(graph.nodes[0].grad)


def test_a_file_of_another_model_is_refused_and_changes_nothing(graph: Graph, tmp_path: Path) -> None:
    qwen, llama = session_of("qwen3", tmp_path / "qwen3"), session_of("llama", tmp_path / "llama")
    joined(graph)
    Node(N_LAYERS, 0, "lm_head").backward(results()[0], qwen)
    path = graph.save(tmp_path / "graph.json")
    with pytest.raises(SampleMismatch, match=r"of the model 'tiny-qwen3' .*, and this is 'tiny-llama'"):
        Graph.load(path, llama)
    assert graph_registry.current() is graph
    later = Graph.load(path)
    with pytest.raises(SampleMismatch, match="tiny-qwen3"):
        later.backward(results()[0], llama)


def test_a_file_of_the_same_model_with_other_weights_is_refused(graph: Graph, tmp_path: Path) -> None:
    session = session_of("qwen3", tmp_path / "qwen3")
    Node(N_LAYERS, 0, "lm_head").backward(results()[0], session)
    record = json.loads(graph.save(tmp_path / "graph.json").read_text())
    record["model"]["fingerprint"] = "0" * 64
    (tmp_path / "graph.json").write_text(json.dumps(record))
    with pytest.raises(SampleMismatch, match="weights 000000000000"):
        Graph.load(tmp_path / "graph.json", session)


def _cyclic(record: dict[str, Any]) -> None:
    record["edges"].append([3, 0, None])


def _strange_node(record: dict[str, Any]) -> None:
    record["nodes"][0][2] = "attn_w"


def _edge_to_nowhere(record: dict[str, Any]) -> None:
    record["edges"].append([0, 9, None])


def _without_nodes(record: dict[str, Any]) -> None:
    del record["nodes"]


def _other_format(record: dict[str, Any]) -> None:
    record["format"] = 2


def _other_kind(record: dict[str, Any]) -> None:
    record["kind"] = "results"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cyclic, "reads deeper"),
        (_strange_node, "'attn_w'"),
        (_edge_to_nowhere, "damaged graph"),
        (_without_nodes, "damaged graph"),
        (_other_format, "format 2; expected 'graph', format 1"),
        (_other_kind, "of kind 'results'"),
    ],
)
def test_damaged_files_are_refused(graph: Graph, tmp_path: Path, damage: Any, message: str) -> None:
    joined(graph)
    path = graph.save(tmp_path / "graph.json")
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InvalidArgument, match=message):
        Graph.load(path)
    assert graph_registry.current() is graph


def test_files_that_cannot_be_read_or_written_are_refused(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="cannot be read"):
        Graph.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InvalidArgument, match="is no JSON file"):
        Graph.load(tmp_path / "text.json")
    with pytest.raises(StorageFailed, match="cannot be written"):
        graph.save(tmp_path / "text.json" / "graph.json")
