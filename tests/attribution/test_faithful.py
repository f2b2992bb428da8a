"""Faithfulness against single ablations put together by hand, and elimination against a plain search."""

from pathlib import Path
from typing import Any

import pytest

from attribution import Graph, Node, eliminate, faithfulness, faithfulness_curves
from attribution.errors import InvalidArgument, OutOfRange
from attribution.faithful import ranked_heads
from tests.attribution.graphing import results, session_of
from tests.models import D_MODEL, N_HEADS, N_LAYERS

HEADS = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return session_of("qwen3", tmp_path_factory.mktemp("store"))


def after(session: Any, heads: list[tuple[int, int]], mode: str = "mean") -> float:
    """The answer's mean log-probability without some heads, one call a sample."""
    values = [
        session.ablate(
            r.outputs.dataset_id,
            r.outputs.sample_id,
            heads=heads,
            mode=mode,
            labels=r.labels,
            candidate_ids=r.candidate_ids,
            pos_ids=r.query_positions,
        )["after"]
        for r in results()
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("mode", ["mean", "zero"])
def test_kept_and_lost_are_shares_of_what_all_heads_together_add(session: Any, mode: Any) -> None:
    chosen = [(2, 1), (0, 4), (1, 3)]
    rest = [head for head in HEADS if head not in chosen]
    whole, nothing = after(session, [], mode), after(session, HEADS, mode)
    found = faithfulness(chosen, results(), session, mode=mode, **QUIET)
    assert found.kept == pytest.approx((after(session, rest, mode) - nothing) / (whole - nothing), rel=1e-4)
    assert found.lost == pytest.approx((whole - after(session, chosen, mode)) / (whole - nothing), rel=1e-4)
    assert (found.heads, found.n_heads) == (tuple(chosen), len(HEADS))
    every = faithfulness(HEADS, results(), session, mode=mode, **QUIET)
    assert (every.kept, every.lost) == (pytest.approx(1), pytest.approx(1))
    none = faithfulness([], results(), session, mode=mode, **QUIET)
    assert (none.kept, none.lost) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


def test_a_graph_is_its_heads_by_the_size_of_their_scores(session: Any) -> None:
    graph = Graph(3, D_MODEL)
    top = graph.add_node(Node(N_LAYERS, 0, "lm_head"))
    mlp = graph.add_node(Node(2, N_HEADS, "mlp_i"), [top], [9.0])
    graph.add_node(Node(1, 3, "attn_v"), [top, mlp], [0.5, -0.1])
    graph.add_node(Node(1, 3, "attn_q"), [top], [0.3])
    graph.add_node(Node(0, 5, "attn_k"), [mlp], [-0.7])
    assert ranked_heads(graph) == [(0, 5), (1, 3)]
    found = faithfulness(graph, results(), session, **QUIET)
    assert found == faithfulness([(0, 5), (1, 3)], results(), session, **QUIET)


def test_curves_keep_what_their_first_heads_keep(session: Any) -> None:
    order = [(2, 1), (0, 4), (1, 3), (0, 0)]
    found = faithfulness_curves(order, results(), session, sizes=[1, 3, 4], draws=2, seed=5, **QUIET)
    assert found.sizes == (1, 3, 4)
    for at, size in enumerate(found.sizes):
        one = faithfulness(order[:size], results(), session, **QUIET)
        assert float(found.graph[at]) == pytest.approx(one.kept, abs=1e-5)
    assert found.random.shape == (2, 3)
    assert (
        found.random == faithfulness_curves(order, results(), session, sizes=[1, 3, 4], draws=2, seed=5).random
    ).all()
    assert not (found.random[0] == found.random[1]).all()
    total = sum(
        session.gradient_x_activation(
            r.outputs.dataset_id, r.index, labels=r.labels, candidate_ids=r.candidate_ids, pos_ids=r.query_positions
        )
        for r in results()
    )
    best = sorted(HEADS, key=lambda head: -float(total[head]))
    one = faithfulness(best[:3], results(), session, **QUIET)
    assert float(found.gradient[1]) == pytest.approx(one.kept, abs=1e-5)
    assert faithfulness_curves(order, results(), session, draws=1, **QUIET).sizes == (1, 2, 3, 4)


def test_elimination_lets_the_cheapest_head_go_each_time(session: Any) -> None:
    among = [(0, 1), (2, 3), (1, 0), (2, 5)]
    gone = [head for head in HEADS if head not in among]
    left, removed = list(among), []
    while len(left) > 1:
        cheapest = max(left, key=lambda head: after(session, [*gone, *removed, head]))
        left.remove(cheapest)
        removed.append(cheapest)
    found = eliminate(results(), session, 1, among=among, **QUIET)
    assert found.order == (*left, *reversed(removed))
    assert set(found.kept) == {1, 2, 3}
    for size, kept in found.kept.items():
        assert kept == pytest.approx(faithfulness(found.order[:size], results(), session, **QUIET).kept, abs=1e-5)
    at_once = eliminate(results(), session, 2, among=among, at_once=2, **QUIET)
    assert at_once.order[2] in among
    assert len(set(at_once.order)) == 4
    assert len(eliminate(results(), session, len(HEADS) - 1, **QUIET).order) == len(HEADS)


def test_a_graph_grows_among_chosen_heads_alone(session: Any) -> None:
    graph = Graph(3, D_MODEL)
    graph.expand(results(), session, k=50, threshold=1.0, budget=50, heads=[(0, 1), (1, 4)], steps=1, **QUIET)
    assert set(ranked_heads(graph)) == {(0, 1), (1, 4)}
    assert {node.component for node in graph.nodes if node.type == "mlp_i"} == {(layer, N_HEADS) for layer in range(3)}
    with pytest.raises(OutOfRange, match="head of a node attn_v is 6"):
        Graph(3, D_MODEL).expand(results(), session, heads=[(0, N_HEADS)], **QUIET)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: faithfulness([(0, 1)], [], s), InvalidArgument, "results is empty"),
        (lambda s: faithfulness_curves([(0, 1)], [], s), InvalidArgument, "results is empty"),
        (lambda s: faithfulness([(0, N_HEADS)], results(), s), OutOfRange, r"\(0, 6\) is no head"),
        (lambda s: faithfulness_curves([(0, 1)], results(), s, sizes=[2]), OutOfRange, "1 to 1 heads"),
        (lambda s: faithfulness_curves([(0, 1)], results(), s, draws=0), OutOfRange, "at least 1"),
        (lambda s: faithfulness_curves(Graph(3, D_MODEL), results(), s), InvalidArgument, "no head"),
        (lambda s: eliminate(results(), s, 0), OutOfRange, "1 to 18"),
        (lambda s: eliminate(results(), s, 3, among=[(0, 1)]), OutOfRange, "keep is 3"),
        (lambda s: eliminate(results(), s, 1, among=[(0, 1)], at_once=2), OutOfRange, "at_once is 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(session: Any, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(session)


def test_an_answer_that_hangs_on_no_head_has_nothing_to_share(session: Any, tmp_path: Path) -> None:
    certain = results()
    for r in certain:
        r.labels, r.candidate_ids = [17] * len(r.labels), [17]  # one candidate has probability 1 whatever happens
    with pytest.raises(InvalidArgument, match="nothing to be shared out"):
        faithfulness([(0, 1)], certain, session, **QUIET)
