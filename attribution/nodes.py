"""Nodes of an attribution graph, and the gradients that they hold for each sample.

1. A node reads the residual stream. Its gradient says how the objective changes with what it reads, through it alone.
2. The gradient at what a node writes is the sum of the gradients that its downstream nodes hold for the sample, aligned
   by position: a position at which a downstream node holds none adds nothing.
3. From that, `compute_node_gradient` makes the node's own gradient (`docs/attribution.md`), which is kept for the nodes
   upstream of it.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from attribution import graph_registry
from attribution.errors import InvalidArgument, OutOfRange, SampleMismatch, ShapeMismatch
from attribution.gradients import NODE_TYPES

if TYPE_CHECKING:
    from attribution.graph import Graph

ROUNDING = 1e-4
"""Gradients whose distance is below this part of their norm are the same gradient."""
_MLP = ("mlp_i", "mlp_g")
_FROM_KEYS = ("attn_k", "attn_v", "attn_a")


@dataclass(frozen=True)
class NodeGradient:
    """The gradient of a node for one sample, on the CPU.

    Attributes:
        positions: of the sample's tokens, one per row.
        grad: with respect to the stream that the node reads; float32, float64 when the model is.
    """

    positions: tuple[int, ...]
    grad: Float[Tensor, "1 pos hidden"]


class Node:
    """A path into the stream: `Node(L, 0, "lm_head")`, `Node(75, n_heads, "mlp_i")`, `Node(70, 42, "attn_v")`.

    The same arguments give the same object, as long as the same graph is current. For `lm_head` the layers L − 1 and L
    both mean the final stream: they give one node.

    Attributes:
        head, type: as given.
        graph: the graph that was current when the node was made.

    Raises:
        InvalidArgument, OutOfRange: there is no such type, or no such layer or head in the model of the graph.
    """

    head: int
    type: str
    graph: "Graph"
    _layer: int  # the greatest that was given
    _gradients: dict[int, NodeGradient]

    def __new__(cls, layer: SupportsIndex, head: SupportsIndex, type: str) -> "Node":  # noqa: A002, D102
        return cls.of(graph_registry.current(), layer, head, type)

    @classmethod
    def of(cls, graph: "Graph", layer: SupportsIndex, head: SupportsIndex, type: str) -> "Node":  # noqa: A002
        """The node of `graph`, whichever graph is current."""
        if type not in NODE_TYPES:
            raise InvalidArgument(f"the type of a node is {type!r}; it is one of {', '.join(NODE_TYPES)}", param="type")
        number, column = _count("layer", layer), _count("head", head)
        if type == "lm_head" and column:
            raise OutOfRange(f"head is {column}; lm_head has the column 0", param="head")
        if graph.scope.model is not None:
            graph.scope.model.check(number, column, type)
        key = (type,) if type == "lm_head" else (type, number, column)
        known = graph.interned.get(key)
        if known is None:
            known = graph.interned[key] = object.__new__(cls)
            known._layer, known.head, known.type, known.graph = number, column, type, graph
            known._gradients = {}
        elif abs(number - known.layer) > 1:  # of lm_head alone: the layer is in the key of the others
            raise OutOfRange(f"lm_head is at layer {known.layer} in this graph; found {number}", param="layer")
        known._layer = max(known._layer, number)
        return known

    def __repr__(self) -> str:
        return f"Node({self.layer}, {self.head}, {self.type!r})"

    @property
    def layer(self) -> int:
        """As given; for `lm_head` it is L, or until the graph knows its model, the greatest that was given."""
        model = self.graph.scope.model
        return model.n_layers if model is not None and self.type == "lm_head" else self._layer

    @property
    def depth(self) -> float:
        """Where it reads: ℓ for attention, ℓ + ½ for an MLP, L for `lm_head`."""
        return self.layer + 0.5 if self.type in _MLP else float(self.layer)

    @property
    def component(self) -> tuple[int, int]:
        """(layer, head) of what it belongs to: the row and column of attribution scores."""
        return self.layer, self.head

    @property
    def downstream(self) -> list["Node"]:
        """The nodes to which its edges lead."""
        return self.graph.downstream(self)

    # --- gradients

    @property
    def samples(self) -> list[int]:
        """The indices of the samples for which it holds a gradient, in order."""
        return sorted(self._gradients)

    @property
    def grad(self) -> Float[Tensor, "1 pos hidden"]:
        """The mean of its gradients over samples, row by row: row i is the mean of every sample's i-th position.

        Raises:
            InvalidArgument: there is none yet.
            ShapeMismatch: the samples have gradients at different numbers of positions.
        """
        if not self._gradients:
            raise InvalidArgument(f"{self} holds no gradient yet; node.backward(r, model) computes it", param="node")
        found = [self._gradients[index].grad for index in self.samples]
        counts = sorted({one.shape[1] for one in found})
        if len(counts) > 1:
            raise ShapeMismatch(
                f"the gradients of {self} have {counts[0]} to {counts[-1]} positions, so that they have no mean; "
                "take node.gradient(index) of each sample",
                param="node",
            )
        return torch.stack(found).mean(0)

    def gradient(self, index: int) -> NodeGradient:
        """Its gradient for the sample `index`.

        Raises:
            InvalidArgument: it holds none.
        """
        if index not in self._gradients:
            raise InvalidArgument(
                f"{self} holds no gradient for sample {index}; {self}.backward(r, model) computes it, after those of "
                "its downstream nodes",
                param="node",
            )
        return self._gradients[index]

    def hold(
        self, index: int, positions: Sequence[int], grad: Float[Tensor, "1 pos hidden"], *, replace: bool = False
    ) -> None:
        """Keep a gradient for the sample `index`; the same one twice counts once.

        Raises:
            OutOfRange: the graph's dataset has no such sample.
            ShapeMismatch: the gradient does not fit the positions or the graph's hidden size.
            SampleMismatch: another gradient is held for it, and `replace` is false.
        """
        self.graph.scope.check_index(index)
        shape = (1, len(positions), self.graph.scope.hidden_size)
        if tuple(grad.shape) != shape:
            raise ShapeMismatch(f"grad has the shape {list(grad.shape)}; expected {list(shape)}", param="grad")
        kept = NodeGradient(tuple(positions), grad.detach().to("cpu"))
        held = self._gradients.get(index)
        if held is not None and not replace and not _same(held, kept):
            raise SampleMismatch(
                f"{self} holds another gradient for sample {index}: its positions, its steps or what is downstream of "
                "it have changed; replace=True takes the new one, and what is upstream of it is to follow",
                param="node",
            )
        if held is None or replace:
            self._gradients[index] = kept

    def forget(self) -> None:
        """Let go of its gradients."""
        self._gradients.clear()

    def output_gradient(self, index: int, pos_ids: Sequence[int] | None = None) -> NodeGradient:
        """The gradient at what it writes: the sum of its downstream nodes' for the sample, aligned by position.

        Args:
            pos_ids: the positions; None is every position at which a downstream node holds a gradient.

        Raises:
            InvalidArgument: it has no downstream node, or one of them, which is named, holds no gradient.
            OutOfRange: a position at which none of them holds one.
        """
        if not self.downstream:
            raise InvalidArgument(
                f"{self} has no downstream node; g.add_node(node, downstream=[…]) gives it some", param="node"
            )
        found = [node.gradient(index) for node in self.downstream]
        there = sorted({position for one in found for position in one.positions})
        positions = there if pos_ids is None else _indices(pos_ids)
        if missing := sorted(set(positions) - set(there)):
            raise OutOfRange(
                f"pos_ids has {missing[0]}, where no downstream node of {self} holds a gradient for sample {index}; "
                f"they are among {there[0]} to {there[-1]}",
                param="pos_ids",
            )
        row = {position: at for at, position in enumerate(positions)}
        total = torch.zeros(1, len(positions), self.graph.scope.hidden_size, dtype=found[0].grad.dtype)
        for one in found:
            columns = [at for at, position in enumerate(one.positions) if position in row]
            rows = [row[one.positions[at]] for at in columns]
            total[0].index_add_(0, torch.tensor(rows, dtype=torch.long), one.grad[0, columns])
        return NodeGradient(tuple(positions), total)

    def backward(
        self,
        r: Any,
        model: Any,
        *,
        pos_ids: Sequence[int] | None = None,
        src_pos_ids: Sequence[int] | None = None,
        replace: bool = False,
        **options: Any,
    ) -> Float[Tensor, "1 pos hidden"]:
        """Compute its integrated gradient for the sample of `r`, and keep it.

        Args:
            r: a result whose `outputs` are stored. `lm_head` takes its query positions, labels and candidates.
            model: a `LocalSession` or a `ModelClient`.
            pos_ids: where the node writes; fewer restrict the path. None is every position at which a downstream node
                holds a gradient, for `lm_head` the query positions.
            src_pos_ids: for attn_k, attn_v and attn_a, which look back, the positions of the result. None is every
                position up to the last of `pos_ids`, which is exact: what comes later is not seen.
            replace: take the place of another gradient that is held for this sample.
            options: `steps` and `rule` of `compute_node_gradient`.

        Returns:
            `[1, positions, hidden]`; `node.gradient(r.index)` has the positions too.

        Raises:
            InvalidArgument: `r` is no result with outputs; a downstream node, which is named, has no gradient for it.
            SampleMismatch: the graph is of another model or dataset, or another gradient is held.
        """
        held, arguments = self.asked(r, model, pos_ids=pos_ids, src_pos_ids=src_pos_ids, **options)
        grad = model.compute_node_gradient(**arguments)
        self.hold(r.index, held, grad, replace=replace)
        return grad

    def asked(
        self,
        r: Any,
        model: Any,
        *,
        pos_ids: Sequence[int] | None = None,
        src_pos_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[list[int], dict[str, Any]]:
        """The positions of its gradient for `r`, and the arguments of `compute_node_gradient`; as `backward`."""
        scope = self.graph.scope
        sample = scope.admit(r, model)
        scope.check_model(model).check(self._layer, self.head, self.type)
        if self.type == "lm_head":
            held, asked = _scored(r, pos_ids)
        else:
            given = self.output_gradient(r.index, pos_ids)
            held, asked = list(given.positions), {"output_grad": given.grad}
        asked = asked | {"pos_ids": held}
        if self.type in _FROM_KEYS:
            held = _indices(range(max(held) + 1) if src_pos_ids is None else src_pos_ids)
            asked = asked | {"src_pos_ids": held}
        of = {"dataset_id": sample.dataset_id, "sample_id": sample.sample_id}
        return held, of | {"node_type": self.type, "layer": self.layer, "head": self.head} | asked | options


def _scored(r: Any, pos_ids: Sequence[int] | None) -> tuple[list[int], dict[str, Any]]:
    """The query positions of a result, or some of them, with their labels."""
    labels = dict(zip(r.query_positions, r.labels, strict=True))
    positions = list(labels) if pos_ids is None else _indices(pos_ids)
    for position in positions:
        if position not in labels:
            raise OutOfRange(f"pos_ids has {position}; the query positions are {list(labels)}", param="pos_ids")
    return positions, {"labels": [labels[one] for one in positions], "candidate_ids": r.candidate_ids}


def _same(held: NodeGradient, new: NodeGradient) -> bool:
    if held.positions != new.positions:
        return False
    return bool((held.grad - new.grad).norm() <= ROUNDING * held.grad.norm())


def _indices(positions: Sequence[int]) -> list[int]:
    return [operator.index(one) for one in positions]


def _count(name: str, value: SupportsIndex) -> int:
    if isinstance(value, bool) or operator.index(value) < 0:
        raise OutOfRange(f"{name} is {value}; it is an integer from 0", param=name)
    return operator.index(value)
