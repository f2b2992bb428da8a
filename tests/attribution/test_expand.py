"""Growing a graph: what enters it, in which order, and that nothing in it is left of an earlier state."""

from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.errors import InvalidArgument, OutOfRange
from attribution.expand import components
from attribution.graph import Graph
from attribution.nodes import Node
from attribution.reduce import mr
from attribution.unified import attribute_residual, attribute_step
from tests.attribution.graphing import results, session_of
from tests.attribution.plain import distance
from tests.models import D_MODEL, N_HEADS, N_LAYERS

FAST = {"steps": 1, "show_progress": False}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return session_of("qwen3", tmp_path_factory.mktemp("store"))


def edges(graph: Graph) -> dict[str, float | None]:
    return {f"{a} {b}": graph.score(a, b) for a, b in graph.edges}


def same(found: Graph, expected: Graph) -> bool:
    left, right = edges(found), edges(expected)
    return left.keys() == right.keys() and all(left[name] == pytest.approx(right[name], rel=1e-4) for name in left)


def test_the_greatest_components_feed_the_answer(session: Any) -> None:
    graph = Graph(3, D_MODEL)
    graph.expand(results(), session, k=2, threshold=1.0, budget=2, **FAST)
    other = Graph(3, D_MODEL)
    scores = mr(attribute_step)(results(), session, other.add_node(Node(N_LAYERS, 0, "lm_head")), steps=1)[..., 0]
    # arithmetic in the open: the two greatest absolute means, with all their paths
    flat = sorted(((abs(float(scores[i, j])), i, j) for i in range(3) for j in range(7)), reverse=True)[:2]
    assert set(components(graph)) == {(layer, head) for _, layer, head in flat}
    top = graph.node(N_LAYERS, 0, "lm_head")
    for _, layer, head in flat:
        for name in ("mlp_i", "mlp_g") if head == N_HEADS else ("attn_q", "attn_k", "attn_v"):
            node = graph.node(layer, head, name)
            assert graph.score(node, top) == pytest.approx(float(scores[layer, head]), rel=1e-4)


@pytest.mark.parametrize("order", ["score", "depth"])
def test_every_gradient_and_score_is_that_of_the_whole_graph(session: Any, tmp_path: Path, order: Any) -> None:
    graph = Graph(3, D_MODEL)
    path = tmp_path / "graph.json"
    done = graph.expand(results()[:2], session, k=3, budget=6, order=order, save=path, **FAST)
    assert len(done.components) == 6
    assert done.components == tuple(components(graph))
    fresh = Graph.load(path, session)
    assert same(fresh, graph)
    for r in results()[:2]:
        fresh.backward(r, session, steps=1)
    rows = mr(attribute_residual)(results()[:2], session, fresh.nodes).unbind(-1)
    for node, row in zip(fresh.nodes, rows, strict=True):
        twin = graph.node(node.layer, node.head, node.type)
        for index in range(2):
            assert distance(twin.gradient(index).grad, node.gradient(index).grad) < 1e-4, node
        for one in fresh.upstream(node):
            assert fresh.score(one, node) == pytest.approx(float(row[one.component]), rel=1e-3, abs=1e-5)
    # an edge that was found late led to a second look: some node feeds another one than lm_head too
    assert any(len(node.downstream) > 1 for node in graph.nodes)


def test_without_a_budget_everything_that_adds_is_in_the_graph(session: Any) -> None:
    graph = Graph(3, D_MODEL)
    first = graph.expand(results()[:1], session, k=100, threshold=1.0, budget=2, order="depth", **FAST)
    assert len(first.components) == 2
    assert graph.node(N_LAYERS, 0, "lm_head") in first.pending
    done = graph.expand(results()[:1], session, k=100, threshold=1.0, budget=100, order="depth", **FAST)
    assert len(done.components) == N_LAYERS * (N_HEADS + 1)
    assert done.pending == ()
    assert len(graph) == 1 + N_LAYERS * (3 * N_HEADS + 2)
    again = graph.expand(results()[:1], session, k=100, threshold=1.0, budget=100, order="depth", **FAST)
    assert again == done


class Failing:
    """A session that fails at a call of `run_calls`, by which the gradients of many samples are computed."""

    def __init__(self, session: Any, calls: int) -> None:
        self.session, self.calls = session, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_calls(self, calls: list[Any]) -> list[torch.Tensor]:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("the line is dead")
        return self.session.run_calls(calls)


def test_a_graph_that_was_cut_off_goes_on_from_its_file(session: Any, tmp_path: Path) -> None:
    given = {"k": 2, "budget": 4, "order": "depth", **FAST}
    whole = Graph(3, D_MODEL)
    whole.expand(results(), session, **given)
    path = tmp_path / "graph.json"
    with pytest.raises(ConnectionError, match="the line is dead"):
        Graph(3, D_MODEL).expand(results(), Failing(session, 9), save=path, **given)
    graph = Graph.load(path, session)
    assert graph.followed
    assert not same(graph, whole)
    graph.expand(results(), session, save=path, **given)
    assert same(graph, whole)
    assert same(Graph.load(path), whole)


def test_the_share_that_is_enough_bounds_what_enters(session: Any) -> None:
    few, many = Graph(3, D_MODEL), Graph(3, D_MODEL)
    few.expand(results()[:1], session, k=100, threshold=0.2, budget=100, **FAST)
    top = many.add_node(Node.of(many, N_LAYERS, 0, "lm_head"))
    row = attribute_step(results()[0], session, top, steps=1)[..., 0].abs()
    head = few.node(N_LAYERS, 0, "lm_head")
    taken = sorted(
        {(one.component, abs(few.score(one, head) or 0.0)) for one in few.upstream(head)}, key=lambda x: x[1]
    )
    share = sum(size for _, size in taken) / float(row.sum())
    assert share >= 0.2
    assert share - taken[0][1] / float(row.sum()) < 0.2  # one less were not enough


def test_models_without_a_gate_have_one_path_through_an_mlp(tmp_path: Path) -> None:
    session = session_of("gpt2", tmp_path)
    graph = Graph(3, D_MODEL)
    graph.expand(results()[:1], session, k=3, budget=5, **FAST)
    assert {node.type for node in graph.nodes} == {"lm_head", "attn_q", "attn_k", "attn_v", "mlp_i"}
    with pytest.raises(InvalidArgument, match="have no gate"):
        Node.of(graph, 0, N_HEADS, "mlp_g")
    graph, types = Graph(3, D_MODEL), ("attn_v", "mlp_i")
    graph.expand(results()[:1], session, k=3, budget=5, types=types, **FAST)
    assert {node.type for node in graph.nodes} <= {"lm_head", *types}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"types": ("attn_w",)}, "attn_w"),
        ({"types": ()}, "names some of"),
    ],
)
def test_limits_that_mean_nothing_are_refused(session: Any, arguments: dict[str, Any], message: str) -> None:
    graph = Graph(3, D_MODEL)
    with pytest.raises(InvalidArgument, match=message):
        graph.expand(results(), session, **arguments)
    assert len(graph) == 0


def test_a_graph_grows_from_results_of_its_own(session: Any) -> None:
    with pytest.raises(InvalidArgument, match="results is empty"):
        Graph(3, D_MODEL).expand([], session)
    with pytest.raises(OutOfRange, match="samples of this graph are 0 to 1"):
        Graph(2, D_MODEL).expand(results(), session)
