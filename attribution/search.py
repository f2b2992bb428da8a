"""From results to a graph of few heads that carries the answer.

1. Heads are ranked by attribution patching, position by position (`gradient_x_activation`, absolute); the first ones
   are the candidates.
2. Greedy elimination over all samples, all other heads being ablated, puts them in order; the last ones to go are
   chosen.
3. A graph is grown among these and the MLPs, over a few samples, with every edge that they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.errors import OutOfRange
from attribution.faithful import Elimination, Mode, by_gradient, eliminate
from attribution.graph import Graph
from attribution.graph_scope import GraphModel

GROWN_ON = 8
"""How many samples the graph is grown over: its scores are means, which settle early."""


@dataclass(frozen=True)
class Found:
    """A graph of few heads.

    Attributes:
        graph: of the chosen heads and the MLPs, with every edge between them.
        heads: the chosen ones, the one that would have gone last first.
        candidates: the heads that were to choose from, the highest first.
        elimination: in which order they went.
    """

    graph: Graph
    heads: tuple[tuple[int, int], ...]
    candidates: tuple[tuple[int, int], ...]
    elimination: Elimination


def find_graph(
    results: Sequence[Any],
    model: Any,
    n_heads: int,
    *,
    candidates: int | None = None,
    grown_on: int = GROWN_ON,
    mode: Mode = "mean",
    source_dataset_id: str | None = None,
    at_once: int = 1,
    save: Path | str | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Found:
    """Find `n_heads` heads that carry the answers of these results, and the graph that they form.

    Args:
        candidates: how many heads elimination begins with; None is four times as many as are asked for,
            and at least 64: a ranking by gradients now and then misses a head that ablation shows to be needed.
        grown_on: how many of the results the graph is grown over.
        mode, source_dataset_id: what an ablated head writes, as in `ablate`.
        at_once: how many heads go in one round of elimination; see `eliminate`.
        save: a file that the graph is written to.
        options: `steps` and `rule` of `compute_node_gradient`.

    Raises:
        InvalidArgument, OutOfRange: as `Graph.expand` and `eliminate`.
    """
    for name, value in (("results", len(results)), ("n_heads", n_heads), ("grown_on", grown_on)):
        if value < 1:
            raise OutOfRange(f"{name}: there are {value}, and at least 1 is needed", param=name)
    ablation: dict[str, Any] = {"mode": mode, "source_dataset_id": source_dataset_id}
    about = GraphModel.of(model)
    every, first = about.n_layers * about.n_heads, max(4 * n_heads, 64) if candidates is None else candidates
    if n_heads > every:
        raise OutOfRange(f"n_heads is {n_heads}; the model has {every} heads", param="n_heads")
    if first < n_heads:
        raise OutOfRange(f"candidates is {first}; {n_heads} heads are to be chosen from them", param="candidates")
    ranked = by_gradient(results, model, show_progress=show_progress, absolute=True, **ablation)[:first]
    rounds: dict[str, Any] = {"at_once": at_once, "show_progress": show_progress} | ablation
    gone = eliminate(results, model, 1, among=ranked, **rounds)
    heads = gone.order[:n_heads]
    graph = Graph(max(r.index for r in results) + 1, about.hidden_size)
    most = about.n_layers * (about.n_heads + 1)
    whole: dict[str, Any] = {"k": most, "threshold": 1.0, "budget": most, "order": "depth", "heads": heads}
    graph.expand(results[:grown_on], model, save=save, show_progress=show_progress, **whole, **options)
    return Found(graph, heads, tuple(ranked), gone)
