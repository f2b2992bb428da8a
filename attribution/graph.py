"""A graph of nodes: which path feeds which, and the gradients that flow along.

An edge leads from a node to one that reads deeper in the model, where it takes its gradient from; so there is no cycle,
and in the order of depth every node comes after all that is upstream of it. A graph belongs to one model and one
dataset, which it knows from the first sample on; it is saved without its gradients.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from attribution import graph_registry
from attribution.errors import InvalidArgument, OutOfRange
from attribution.graph_scope import GraphModel, GraphScope
from attribution.json_files import read_json, write_json
from attribution.nodes import Node

if TYPE_CHECKING:
    from attribution.expand import Expansion


class Graph:
    """An attribution graph over the samples 0 … dataset_size − 1; it becomes the current one.

    Args:
        dataset_size, hidden_size: how many samples, and the width of the model.
        current: False leaves another graph the current one.

    Attributes:
        scope: the model and the dataset that it is tied to.
        interned: every node that was made in it, whether it was added or not.
        followed: the nodes from which `expand` has looked upstream.

    Raises:
        OutOfRange: a size below 1.
    """

    def __init__(self, dataset_size: int, hidden_size: int, *, current: bool = True) -> None:
        for name, size in (("dataset_size", dataset_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise OutOfRange(f"{name} is {size}; it is at least 1", param=name)
        self.scope = GraphScope(dataset_size, hidden_size)
        self.interned: dict[tuple[Any, ...], Node] = {}
        self.followed: set[Node] = set()
        self._edges: dict[Node, dict[Node, float | None]] = {}  # upstream → downstream → score
        if current:
            self.make_current()

    def make_current(self) -> None:
        """Let `Node(layer, head, type)` find its nodes in this graph."""
        graph_registry.make_current(self)

    def __repr__(self) -> str:
        sizes = f"{self.scope.dataset_size}, {self.scope.hidden_size}"
        return f"Graph({sizes}) of {len(self._edges)} nodes, {len(self.edges)} edges"

    # --- nodes and edges

    def add_node(self, node: Node, downstream: Sequence[Node] = (), scores: Sequence[float] | None = None) -> Node:
        """Add a node with its edges; added again, it gets these edges as well.

        Args:
            downstream: the nodes that read what it writes; each is in the graph already.
            scores: a number for each edge, as attribution gives it; pictures draw it.

        Raises:
            InvalidArgument: a node is another graph's or was not added, or an edge does not lead deeper; nothing is
                added then.
        """
        if scores is not None and len(scores) != len(downstream):
            raise InvalidArgument(f"there are {len(scores)} scores for {len(downstream)} edges", param="scores")
        if not all(math.isfinite(score) for score in scores or ()):
            raise InvalidArgument(f"a score of {node} is NaN or infinite", param="scores")
        self._own(node)
        for one in downstream:
            self._own(one)
            if order(node) >= order(one):
                raise InvalidArgument(
                    f"no edge can lead from {node} to {one}: it leads to a node that reads deeper, so that there is "
                    f"no cycle, and they read at the depths {node.depth:g} and {one.depth:g}",
                    param="downstream",
                )
            if one not in self._edges:
                raise InvalidArgument(f"{one} is not in the graph; add it first", param="downstream")
        edges = self._edges.setdefault(node, {})
        for at, one in enumerate(downstream):
            edges[one] = edges.get(one) if scores is None else float(scores[at])
        return node

    @property
    def nodes(self) -> list[Node]:
        """The nodes that were added, in the order of depth; at one depth by head and type."""
        return sorted(self._edges, key=lambda node: (*order(node), node.head, node.type))

    @property
    def edges(self) -> list[tuple[Node, Node]]:
        """(upstream, downstream) of every edge, in the order of depth."""
        return [(node, one) for node in self.nodes for one in self.downstream(node)]

    def score(self, upstream: Node, downstream: Node) -> float | None:
        """The number of an edge; None when it was given none.

        Raises:
            InvalidArgument: there is no such edge.
        """
        edges = self._edges.get(upstream, {})
        if downstream not in edges:
            raise InvalidArgument(f"there is no edge from {upstream} to {downstream}", param="downstream")
        return edges[downstream]

    def downstream(self, node: Node) -> list[Node]:
        """The nodes to which its edges lead, in the order of depth."""
        return sorted(self._edges.get(node, {}), key=lambda one: (*order(one), one.head, one.type))

    def upstream(self, node: Node) -> list[Node]:
        """The nodes whose edges lead to it, in the order of depth."""
        return [one for one in self.nodes if node in self._edges[one]]

    def node(self, layer: SupportsIndex, head: SupportsIndex, type: str) -> Node:  # noqa: A002
        """A node that was added.

        Raises:
            InvalidArgument: it was not.
        """
        found = Node.of(self, layer, head, type)
        if found not in self._edges:
            raise InvalidArgument(
                f"{found} is not in the graph; g.add_node(node, downstream=[…]) adds it", param="node"
            )
        return found

    def __contains__(self, node: object) -> bool:
        return node in self._edges

    def __len__(self) -> int:
        return len(self._edges)

    def _own(self, node: Node) -> None:
        if node.graph is not self:
            raise InvalidArgument(
                f"{node} is a node of another graph; g.make_current() lets Node(…) find those of this one", param="node"
            )

    # --- gradients

    def backward(self, r: Any, model: Any, *, replace: bool = False, **options: Any) -> None:
        """Compute the gradients of all nodes for a sample, the deepest first; options as in `Node.backward`."""
        for node in reversed(self.nodes):
            node.backward(r, model, replace=replace, **options)

    def forget(self) -> None:
        """Let go of all gradients, so that the graph can be used on another dataset."""
        for node in self.interned.values():
            node.forget()
        self.scope.dataset_id = None

    def expand(
        self,
        results: Sequence[Any],
        model: Any,
        *,
        k: int = 5,
        threshold: float = 0.8,
        budget: int = 20,
        order: Literal["score", "depth"] = "score",
        types: Sequence[str] | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
        save: Path | str | None = None,
        show_progress: bool = True,
        **options: Any,
    ) -> "Expansion":
        """Grow the graph upstream from `lm_head` (`attribution.expand` says how); called again, it goes on.

        Args:
            k: how many heads and MLPs feed one node at most.
            threshold: the share of a node's absolute attribution at which its feeding components are enough.
            budget: how many heads and MLPs the graph has at most.
            order: follow the node with the greatest score first, or the deepest.
            types: the paths of a component that enter; None is attn_q, attn_k, attn_v, mlp_i, and mlp_g where MLPs have
                a gate.
            heads: the only heads, (layer, head) each, that may enter, as `eliminate` chose them; None is every head.
            save: a file that is written after every node; `Graph.load` of it goes on from there.
            options: `steps` and `rule` of `compute_node_gradient`. Gradients that the nodes hold are replaced.

        Raises:
            InvalidArgument, OutOfRange: naming the argument.
            SampleMismatch: the graph is of another model or dataset.
        """
        from attribution.expand import Limits, expand

        chosen = None if heads is None else frozenset(heads)
        limits = Limits(k, threshold, budget, order, None if types is None else tuple(types), chosen)
        return expand(self, results, model, limits, save, show_progress=show_progress, **options)

    # --- disk

    def save(self, path: Path | str) -> Path:
        """Write nodes, edges and scores as JSON, with the model; gradients are not kept.

        Raises:
            StorageFailed: the file cannot be written.
        """
        return write_json(path, "graph", self.record())

    def record(self) -> dict[str, Any]:
        """What `save` writes."""
        scope, nodes = self.scope, self.nodes
        number = {node: at for at, node in enumerate(nodes)}
        return {
            "model": None if scope.model is None else asdict(scope.model),
            "dataset_size": scope.dataset_size,
            "hidden_size": scope.hidden_size,
            "nodes": [[node.layer, node.head, node.type] for node in nodes],
            "followed": [number[node] for node in nodes if node in self.followed],
            "edges": [[number[a], number[b], self._edges[a][b]] for a, b in self.edges],
        }

    @classmethod
    def load(cls, path: Path | str, model: Any = None) -> "Graph":
        """The graph of a file, which becomes the current one.

        Args:
            model: a session, whose model the graph must be of; None leaves that to the first gradient.

        Raises:
            StorageFailed: the file cannot be read.
            InvalidArgument: it is no graph.
            SampleMismatch: the graph is of another model.
        """
        record = read_json(path, "graph")
        try:
            graph = cls._read(record, model)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InvalidArgument(f"{path} is a damaged graph: {error!r}", param="path") from error
        graph.make_current()
        return graph

    @classmethod
    def _read(cls, record: Mapping[str, Any], model: Any) -> "Graph":
        graph = cls(record["dataset_size"], record["hidden_size"], current=False)
        if record["model"] is not None:
            graph.scope.model = GraphModel(**record["model"])
        if model is not None:
            graph.scope.check_model(model)
        nodes = [Node.of(graph, *one) for one in record["nodes"]]
        into: dict[Node, dict[Node, float | None]] = {node: {} for node in nodes}
        for a, b, score in record["edges"]:
            into[nodes[a]][nodes[b]] = score
        for node in sorted(nodes, key=order, reverse=True):
            graph.add_node(node, list(into[node]))
            graph._edges[node].update(into[node])
        graph.followed.update(nodes[at] for at in record["followed"])
        return graph


def order(node: Node) -> tuple[bool, float]:
    """What nodes are sorted by: `lm_head` last, by whichever layer it was named, the others by depth."""
    return node.type == "lm_head", node.depth


def deepest_first(nodes: Iterable[Node]) -> list[Node]:
    """Nodes in the order in which their gradients can be computed."""
    return sorted(nodes, key=order, reverse=True)
