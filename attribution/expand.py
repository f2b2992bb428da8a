"""Grow a graph upstream from the answer.

1. Take a node that was not followed yet; none of its downstream nodes is to be followed first.
2. Compute its gradient for every sample, and attribute it to every head and MLP upstream: the mean over samples.
3. Its greatest components by absolute score, `k` at most, until they make up `threshold` of the sum of all absolute
   scores, enter the graph with their paths (q, k and v of a head, the branches of an MLP), unless the budget is full.
4. A path that was followed before and has a new edge now has another gradient: it and all that is upstream of it are
   followed once more. So when nothing is left, every gradient and every score is that of the whole graph.

All scores are parts of one objective, in nats: those of different nodes compare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument, OutOfRange
from attribution.nodes import Node
from attribution.progress import progress_bar
from attribution.reduce import mr
from attribution.unified import attribute_step

if TYPE_CHECKING:
    from attribution.graph import Graph

TYPES = ("attn_q", "attn_k", "attn_v", "mlp_i", "mlp_g")


@dataclass(frozen=True)
class Expansion:
    """What `Graph.expand` leaves.

    Attributes:
        components: (layer, head) of every head and MLP in the graph, in the order of depth; an MLP's head is n_heads.
        pending: nodes upstream of which something was left out because the budget was full; a call with a greater one
            goes on with them.
    """

    components: tuple[tuple[int, int], ...]
    pending: tuple[Node, ...]


@dataclass(frozen=True)
class Limits:
    """How far a graph grows; the arguments of `Graph.expand`."""

    k: int
    threshold: float
    budget: int
    order: Literal["score", "depth"]
    types: tuple[str, ...] | None
    heads: frozenset[tuple[int, int]] | None

    def check(self) -> None:
        """Raises: OutOfRange, InvalidArgument, naming the argument."""
        for name, value in (("k", self.k), ("budget", self.budget)):
            if value < 1:
                raise OutOfRange(f"{name} is {value}; it is at least 1", param=name)
        if not 0 < self.threshold <= 1:
            raise OutOfRange(f"threshold is {self.threshold}; it is a share above 0, at most 1", param="threshold")
        if self.order not in ("score", "depth"):
            raise InvalidArgument(f"order is {self.order!r}; it is 'score' or 'depth'", param="order")
        if self.types is not None and (not self.types or not set(self.types) <= set(TYPES)):
            raise InvalidArgument(f"types is {self.types}; it names some of {', '.join(TYPES)}", param="types")


def expand(
    graph: "Graph",
    results: Sequence[Any],
    model: Any,
    limits: Limits,
    save: Path | str | None,
    *,
    show_progress: bool,
    **options: Any,
) -> Expansion:
    """Grow `graph`; see `Graph.expand`."""
    limits.check()
    if len(results) == 0:
        raise InvalidArgument("results is empty; a graph is grown from at least one", param="results")
    for r in results:
        graph.scope.admit(r, model)
    for layer, head in limits.heads or ():
        graph.scope.check_model(model).check(layer, head, "attn_v")
    about = graph.scope.check_model(model)
    if limits.types is None:
        limits = replace(limits, types=TYPES if about.gated_mlp else TYPES[:-1])
    graph.add_node(Node.of(graph, about.n_layers, 0, "lm_head"))
    _compute_followed(graph, results, model, options)
    cut: set[Node] = set()
    with progress_bar(limits.budget, "expand", show=show_progress) as bar:
        bar.unit = "component"
        while (node := _next(graph, cut, limits.order)) is not None:
            step = mr(attribute_step)(results, model, node, show_progress=False, replace=True, **options)
            whole = _follow(graph, node, step[..., 0], limits, cut)
            (graph.followed if whole else cut).add(node)
            bar.update(len(components(graph)) - bar.n)
            if save is not None:
                graph.save(save)
    return Expansion(tuple(components(graph)), tuple(one for one in graph.nodes if one in cut))


def components(graph: "Graph") -> list[tuple[int, int]]:
    """(layer, head) of every head and MLP that has a node in the graph, in the order of depth."""
    return list(dict.fromkeys(node.component for node in graph.nodes if node.type != "lm_head"))


def _compute_followed(graph: "Graph", results: Sequence[Any], model: Any, options: dict[str, Any]) -> None:
    """The gradients of nodes that were followed in an earlier call and did not come with the file."""
    for node in reversed(graph.nodes):
        for r in results:
            if node in graph.followed and r.index not in node.samples:
                node.backward(r, model, **options)


def _next(graph: "Graph", cut: set[Node], order: str) -> Node | None:
    """The node to be followed now: the deepest, or the one with the greatest score."""
    waiting = [node for node in graph.nodes if node not in graph.followed and node not in cut]
    ready = [node for node in waiting if not set(node.downstream) & set(waiting)]
    if not ready or order == "depth":
        return ready[-1] if ready else None
    return max(ready, key=lambda node: (node.type == "lm_head", abs(_score(graph, node)), node.depth))


def _score(graph: "Graph", node: Node) -> float:
    """What the component of a node adds to the objective through all nodes to which its edges lead."""
    return math.fsum(graph.score(node, one) or 0.0 for one in node.downstream)


def _follow(graph: "Graph", node: Node, scores: Float[Tensor, "layer column"], limits: Limits, cut: set[Node]) -> bool:
    """Give a node the edges from its greatest components; False when the budget left one of them out."""
    for one in graph.upstream(node):  # followed once more, it has other scores
        graph.add_node(one, [node], [float(scores[one.component])])
    there, whole = set(components(graph)), True
    heads = scores.shape[1] - 1
    for layer, head in _greatest(_allowed(scores, limits.heads), limits.k, limits.threshold):
        if (layer, head) not in there and len(there) >= limits.budget:
            whole = False
            continue
        there.add((layer, head))
        kind = "mlp" if head == heads else "attn"
        for name in (one for one in limits.types or () if one.startswith(kind)):
            path = Node.of(graph, layer, head, name)
            if node not in path.downstream:
                graph.add_node(path, [node], [float(scores[layer, head])])
                _follow_again(graph, path, cut)
    return whole


def _allowed(
    scores: Float[Tensor, "layer column"], heads: frozenset[tuple[int, int]] | None
) -> Float[Tensor, "layer column"]:
    """The scores with 0 for heads that may not enter; MLPs may."""
    if heads is None:
        return scores
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[:, -1] = True
    for one in heads:
        kept[one] = True
    return scores * kept


def _greatest(scores: Float[Tensor, "layer column"], k: int, threshold: float) -> list[tuple[int, int]]:
    sizes = scores.abs()
    total, taken, found = float(sizes.sum()), 0.0, []
    for flat in sizes.flatten().argsort(descending=True)[:k].tolist():
        layer, head = divmod(flat, sizes.shape[1])
        if taken >= threshold * total or sizes[layer, head] == 0:  # 0 is what is not upstream
            break
        taken += float(sizes[layer, head])
        found.append((layer, head))
    return found


def _follow_again(graph: "Graph", node: Node, cut: set[Node]) -> None:
    """Its gradient is another one now, and so are those of all that is upstream of it."""
    stale = [node]
    while stale:
        one = stale.pop()
        if one in graph.followed or one in cut:
            graph.followed.discard(one)
            cut.discard(one)
            stale += graph.upstream(one)
