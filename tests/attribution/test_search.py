"""From results to a graph of few heads, on tiny models and on the embedded one."""

from pathlib import Path
from typing import Any

import pytest

from attribution import Graph, LocalSession, eliminate, faithfulness, find_graph
from attribution.errors import OutOfRange
from attribution.faithful import by_gradient, ranked_heads
from puzzles import Result, gen_puzzle
from tests.attribution.graphing import results, session_of
from tests.models import N_HEADS, N_LAYERS

QUIET: dict[str, Any] = {"show_progress": False}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return session_of("qwen3", tmp_path_factory.mktemp("store"))


def test_the_heads_are_those_that_elimination_leaves_of_the_candidates(session: Any, tmp_path: Path) -> None:
    found = find_graph(results(), session, 3, candidates=6, grown_on=2, steps=1, save=tmp_path / "g.json", **QUIET)
    ranked = by_gradient(results(), session, absolute=True, mode="mean", **QUIET)
    assert found.candidates == tuple(ranked[:6])
    assert found.elimination == eliminate(results(), session, 1, among=ranked[:6], **QUIET)
    assert found.heads == found.elimination.order[:3]
    assert set(ranked_heads(found.graph)) == set(found.heads)
    loaded = Graph.load(tmp_path / "g.json", session)
    assert [repr(one) for one in loaded.edges] == [repr(one) for one in found.graph.edges]
    assert loaded.edges
    node = found.graph.node(*found.heads[0], "attn_v")
    assert node.samples == [0, 1]
    mlps = {one.component for one in found.graph.nodes if one.type == "mlp_i"}
    assert {head for _, head in mlps} == {N_HEADS}


def test_what_cannot_be_searched_is_refused(session: Any) -> None:
    with pytest.raises(OutOfRange, match="results: there are 0"):
        find_graph([], session, 3)
    with pytest.raises(OutOfRange, match="n_heads: there are 0"):
        find_graph(results(), session, 0)
    with pytest.raises(OutOfRange, match="grown_on: there are 0"):
        find_graph(results(), session, 1, grown_on=0)
    with pytest.raises(OutOfRange, match=f"n_heads is {N_LAYERS * N_HEADS + 1}; the model has {N_LAYERS * N_HEADS}"):
        find_graph(results(), session, N_LAYERS * N_HEADS + 1)
    for few in (2, -1):
        with pytest.raises(OutOfRange, match=f"candidates is {few}; 3 heads are to be chosen"):
            find_graph(results(), session, 3, candidates=few)


@pytest.mark.slow
def test_few_heads_of_the_embedded_model_carry_a_rule(tmp_path: Path) -> None:
    session = LocalSession("demo", store=tmp_path)
    tokenizer = session.model.tokenizer

    def puzzles(name: str, seeds: range, rules: Any) -> list[Result]:
        made = [gen_puzzle(rules, 3, 3, 4, seed) for seed in seeds]
        found = [Result.from_puzzle(puzzle, tokenizer, number) for number, puzzle in enumerate(made)]
        session.forward_results(name, found, **QUIET)
        return found

    from puzzles import side_neighbor_relations

    puzzles("reference", range(500, 564), side_neighbor_relations)
    shown, held = (puzzles(name, seeds, "erase down") for name, seeds in (("a", range(12)), ("b", range(100, 112))))
    ablation: Any = {"mode": "position_mean", "source_dataset_id": "reference"} | QUIET
    found = find_graph(shown, session, 12, grown_on=2, steps=1, **ablation)
    assert faithfulness(found.heads, held, session, **ablation).kept > 0.9
