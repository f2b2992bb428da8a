"""Faithfulness: how much of an answer the heads of a graph carry, measured by ablation.

1. Four runs of each sample: as it is (whole), without any head (nothing), without the heads outside of the graph
   (inside), and without those of the graph (outside). A head that is taken away writes its mean over the dataset; the
   MLPs stay.
2. A run scores Σ log p(answer), the mean over samples, and
   kept = (inside − nothing) / (whole − nothing), lost = (whole − outside) / (whole − nothing).
3. `eliminate` chooses heads by what it costs to take them away: the oracle that a graph is compared with.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument, OutOfRange
from attribution.graph import Graph
from attribution.graph_scope import GraphModel, sample_of
from attribution.progress import progress_bar
from attribution.reduce import mr

Head = tuple[int, int]
Mode = Literal["zero", "mean", "position_mean"]


@dataclass(frozen=True)
class Faithfulness:
    """What the heads of a graph carry; log-probabilities of the answer in nats, means over the samples.

    Attributes:
        kept: the share of the answer that is left when all other heads are ablated; above 1 when they had harmed.
        lost: the share that is gone when these heads alone are ablated.
        heads: (layer, head) of the graph's heads, with `n_heads` those of the model.
        whole, nothing, inside, outside: the four runs.
    """

    kept: float
    lost: float
    heads: tuple[Head, ...]
    n_heads: int
    whole: float
    nothing: float
    inside: float
    outside: float


@dataclass(frozen=True)
class FaithfulnessCurves:
    """The share kept by the first `sizes[i]` heads of three orders.

    Attributes:
        graph: by the scores of the graph.
        gradient: by plain gradient × activation.
        random: drawn, `[draws, sizes]`.
    """

    sizes: tuple[int, ...]
    graph: Float[Tensor, "size"]
    gradient: Float[Tensor, "size"]
    random: Float[Tensor, "draw size"]


@dataclass(frozen=True)
class Elimination:
    """Heads in the order of how long they stayed, the last to go first.

    Attributes:
        order: `order[:k]` are the k heads that were left.
        kept: the share kept by `order[:k]`, by k, on the samples by which it was chosen.
    """

    order: tuple[Head, ...]
    kept: dict[int, float]


def faithfulness(
    heads: Graph | Sequence[Head],
    results: Sequence[Any],
    model: Any,
    *,
    mode: Mode = "mean",
    source_dataset_id: str | None = None,
    show_progress: bool = True,
) -> Faithfulness:
    """How much of the answer the heads of a graph carry.

    Args:
        heads: a graph, or (layer, head) each.
        results: whose samples are stored; best others than those by which the graph was found.
        model: a `LocalSession` or a `ModelClient`.
        mode, source_dataset_id: what an ablated head writes, as in `ablate`: "position_mean" over a dataset of puzzles
            of one shape leaves what a head says about the position, and with all rules in it nothing about the rule.

    Raises:
        InvalidArgument: there are no results, or one that was never run; the answer does not hang on any head.
        OutOfRange: the model has no such head.
    """
    every = _every_head(model)
    chosen = _chosen(heads, every)
    rest = _without(chosen, every)
    ablation = {"mode": mode, "source_dataset_id": source_dataset_id}
    sets = [[], every, rest, chosen]
    runs = _log_probabilities(sets, results, model, ablation, show=show_progress)
    whole, nothing, inside, outside = runs.tolist()
    span = _span(whole, nothing)
    return Faithfulness(
        (inside - nothing) / span, (whole - outside) / span, tuple(chosen), len(every), whole, nothing, inside, outside
    )


def faithfulness_curves(
    graph: Graph | Sequence[Head],
    results: Sequence[Any],
    model: Any,
    *,
    sizes: Sequence[int] | None = None,
    draws: int = 10,
    seed: int = 0,
    mode: Mode = "mean",
    source_dataset_id: str | None = None,
    show_progress: bool = True,
) -> FaithfulnessCurves:
    """The share of the answer kept by more and more heads: of the graph, by gradient × activation, and at random.

    Args:
        graph: ordered by `ranked_heads`; or heads in an order of their own.
        sizes: how many heads; None is eight sizes up to the graph's.
        draws: how many random orders, from `seed`.
        results, model, mode, source_dataset_id: as in `faithfulness`.

    Raises:
        InvalidArgument, OutOfRange: as `faithfulness`, or a size that the graph does not have.
    """
    every = _every_head(model)
    ranked = _chosen(graph, every)
    counts = _sizes(sizes, len(ranked))
    if draws < 1:
        raise OutOfRange(f"draws is {draws}; it is at least 1", param="draws")
    draw = random.Random(seed)
    orders = [ranked, by_gradient(results, model, show_progress=show_progress)]
    orders += [draw.sample(every, len(every)) for _ in range(draws)]
    sets = [[], every, *(_without(order[:count], every) for order in orders for count in counts)]
    ablation = {"mode": mode, "source_dataset_id": source_dataset_id}
    runs = _log_probabilities(sets, results, model, ablation, show=show_progress)
    shares = (runs[2:] - runs[1]) / _span(float(runs[0]), float(runs[1]))
    table = shares.view(len(orders), len(counts))
    return FaithfulnessCurves(counts, table[0], table[1], table[2:])


def ranked_heads(graph: Graph) -> list[Head]:
    """The heads of a graph by the size of what they add to the objective through its edges, the greatest first."""
    totals: dict[Head, float] = {}
    for node in graph.nodes:
        if node.type.startswith("attn"):
            scores = [graph.score(node, one) or 0.0 for one in graph.downstream(node)]
            totals[node.component] = max(totals.get(node.component, 0.0), abs(sum(scores)))
    return sorted(totals, key=lambda head: -totals[head])


def eliminate(
    results: Sequence[Any],
    model: Any,
    keep: int,
    *,
    among: Sequence[Head] | Graph | None = None,
    mode: Mode = "mean",
    source_dataset_id: str | None = None,
    at_once: int = 1,
    show_progress: bool = True,
) -> Elimination:
    """Greedy backward elimination: again and again the head goes whose ablation costs the answer least.

    Args:
        keep: how many heads are left.
        among: heads that may stay, or a graph; the others are ablated from the start. None is every head.
        at_once: how many heads go in one round: more is faster and less exact, and may fail, as heads that can stand in
            for each other go together; measure what is left. A round runs every sample once for each
            head that is left.
        results, model, mode, source_dataset_id: as in `faithfulness`.

    Raises:
        InvalidArgument, OutOfRange: as `faithfulness`, or `keep` is not a number of these heads.
    """
    every = _every_head(model)
    left = every if among is None else _chosen(among, every)
    for name, value, most in (("keep", keep, len(left)), ("at_once", at_once, len(left))):
        if not 1 <= value <= most:
            raise OutOfRange(f"{name} is {value}; there are 1 to {most} heads to choose from", param=name)
    gone, kept, removed = _without(left, every), {}, []
    ablation = {"mode": mode, "source_dataset_id": source_dataset_id}
    whole, nothing = _log_probabilities([[], every], results, model, ablation, show=False).tolist()
    span = _span(whole, nothing)
    with progress_bar(len(left) - keep, "eliminate", show=show_progress) as bar:
        bar.unit = "head"
        while len(left) > keep:
            tries = [[*gone, *removed, head] for head in left]
            runs = _log_probabilities(tries, results, model, ablation, show=False)
            going = runs.argsort(descending=True)[: min(at_once, len(left) - keep)].tolist()
            removed += [left[at] for at in going]
            left = [head for at, head in enumerate(left) if at not in going]
            if len(going) == 1:
                kept[len(left)] = (float(runs[going[0]]) - nothing) / span
            bar.update(len(going))
    return Elimination((*left, *reversed(removed)), kept)


def _log_probabilities(
    sets: Sequence[Sequence[Head]],
    results: Sequence[Any],
    model: Any,
    ablation: dict[str, str | None],
    *,
    show: bool,
) -> Float[Tensor, "set"]:
    """The summed log-probability of the answer with each set of heads ablated, the mean over samples, in float64."""
    listed = [{"heads": list(heads)} for heads in sets]

    def ablated(r: Any, model: Any) -> Float[Tensor, "set"]:
        return model.ablate_sweep(sets=listed, **_asked(r), **ablation)["after"]

    return mr(ablated)(results, model, show_progress=show)


def by_gradient(results: Sequence[Any], model: Any, *, show_progress: bool = True, **options: Any) -> list[Head]:
    """All heads by the mean of gradient × activation, the greatest first; options as of `gradient_x_activation`."""

    def gradient(r: Any, model: Any) -> Float[Tensor, "layer column"]:
        return model.gradient_x_activation(**_asked(r), **options)

    mean = mr(gradient)(results, model, show_progress=show_progress)
    return sorted(_every_head(model), key=lambda head: -float(mean[head]))


def _asked(r: Any) -> dict[str, Any]:
    """The sample of a result and its answer, as operations take them."""
    sample = sample_of(r)
    of = {"dataset_id": sample.dataset_id, "sample_id": sample.sample_id}
    return of | {"labels": r.labels, "candidate_ids": r.candidate_ids, "pos_ids": r.query_positions}


def _every_head(model: Any) -> list[Head]:
    found = GraphModel.of(model)
    return [(layer, head) for layer in range(found.n_layers) for head in range(found.n_heads)]


def _chosen(heads: Graph | Sequence[Head], every: list[Head]) -> list[Head]:
    given = ranked_heads(heads) if isinstance(heads, Graph) else [(int(layer), int(head)) for layer, head in heads]
    known = set(every)
    for one in given:
        if one not in known:
            raise OutOfRange(f"{one} is no head of this model; its last is {every[-1]}", param="heads")
    return list(dict.fromkeys(given))


def _without(heads: Sequence[Head], every: list[Head]) -> list[Head]:
    taken = set(heads)
    return [one for one in every if one not in taken]


def _sizes(sizes: Sequence[int] | None, most: int) -> tuple[int, ...]:
    if most == 0:
        raise InvalidArgument("the graph has no head; g.expand(results, model) grows it", param="graph")
    if sizes is None:
        return tuple(sorted({max(1, round(most * part / 8)) for part in range(1, 9)}))
    for size in sizes:
        if not 1 <= size <= most:
            raise OutOfRange(f"sizes has {size}; the graph has 1 to {most} heads", param="sizes")
    return tuple(sizes)


def _span(whole: float, nothing: float) -> float:
    if abs(whole - nothing) < 1e-6:
        raise InvalidArgument(
            f"the answer's log-probability is {whole:.6f} with all heads and {nothing:.6f} without any: there is "
            "nothing to be shared out",
            param="results",
        )
    return whole - nothing
