"""Operations by result: what a `LocalSession` or a `ModelClient` is asked about the sample of a result.

A result is anything with `index` and `outputs`, such as `puzzles.Result` after `forward_results`. Formulas:
`docs/attribution.md`; how nodes and graphs fit together: `docs/graphs.md`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument
from attribution.graph import deepest_first
from attribution.graph_scope import sample_of
from attribution.nodes import Node, NodeGradient

TOGETHER = 16
"""How many samples' calls travel together when `mr` maps `attribute_step` over them."""

# --- what is stored


def get_hidden_states(
    model: Any, r: Any, layer: int, pos_ids: Sequence[int] | None = None, device: str = "cpu"
) -> Float[Tensor, "1 pos hidden"]:
    """The residual stream entering `layer`; the number of layers gives the final one.

    Raises:
        InvalidArgument: `r` is no result with outputs; and as the operation of this name.
    """
    sample = sample_of(r)
    return model.get_hidden_states(sample.dataset_id, sample.sample_id, layer, pos_ids=pos_ids, device=device)


def get_attn_weights(
    model: Any,
    r: Any,
    layer: int,
    head: int | None = None,
    pos_ids: Sequence[int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """The attention pattern `[1, heads, query, key]`, of one head `[1, query, key]`; `pos_ids` selects queries.

    Raises:
        InvalidArgument: `r` is no result with outputs; and as the operation of this name.
    """
    sample = sample_of(r)
    return model.get_attn_weights(sample.dataset_id, sample.sample_id, layer, head=head, pos_ids=pos_ids, device=device)


def get_head_output(
    model: Any, r: Any, layer: int, head: int, pos_ids: Sequence[int] | None = None, device: str = "cpu"
) -> Float[Tensor, "pos hidden"]:
    """What a head writes to the residual stream.

    Raises:
        InvalidArgument: `r` is no result with outputs; and as the operation of this name.
    """
    sample = sample_of(r)
    return model.get_head_output(sample.dataset_id, sample.sample_id, layer, head, pos_ids=pos_ids, device=device)


# --- attribution


def attribute_residual(
    r: Any, model: Any, nodes: Node | Sequence[Node], from_layer: int = 0, to_layer: int | None = None
) -> Float[Tensor, "layer column node"]:
    """What each head and MLP adds to the objective through each node, by the gradients that the nodes hold for `r`.

    Returns:
        `[layers, heads + 1, nodes]` in the order of `nodes`, the MLP in the last column of axis 1; 0 for what is not
        upstream of a node or not in `from_layer` … `to_layer` (both inclusive).

    Raises:
        InvalidArgument: there is no node, or one that holds no gradient for this sample.
        SampleMismatch: the graph is of another model or dataset.
    """
    groups = _residual_calls(r, model, _nodes(nodes), from_layer, to_layer)
    return _in_columns(groups, [model.attribute_residual(**arguments) for _, arguments in groups])


def attribute_step(
    r: Any,
    model: Any,
    nodes: Node | Sequence[Node],
    from_layer: int = 0,
    to_layer: int | None = None,
    *,
    replace: bool = False,
    **options: Any,
) -> Float[Tensor, "layer column node"]:
    """The gradient of each node for `r`, the deepest first, and with it `attribute_residual`.

    Args:
        nodes: each with its downstream nodes in the graph, which are among `nodes` or hold their gradient for `r`.
        replace: take the place of other gradients that the nodes hold for this sample.
        options: `steps` and `rule` of `compute_node_gradient`.

    Returns:
        `[layers, heads + 1, nodes]`, as `attribute_residual`.

    Raises:
        InvalidArgument, SampleMismatch: as `Node.backward`.
    """
    chosen = _nodes(nodes)
    for node in deepest_first(dict.fromkeys(chosen)):
        node.backward(r, model, replace=replace, **options)
    return attribute_residual(r, model, chosen, from_layer, to_layer)


def _steps_of_many(
    results: Sequence[Any],
    model: Any,
    nodes: Node | Sequence[Node],
    from_layer: int = 0,
    to_layer: int | None = None,
    *,
    replace: bool = False,
    **options: Any,
) -> Iterator[Float[Tensor, "layer column node"]]:
    """`attribute_step` for many results: the calls of a few samples travel together (`run_calls`)."""
    chosen = _nodes(nodes)
    for start in range(0, len(results), TOGETHER):
        some = results[start : start + TOGETHER]
        for node in deepest_first(dict.fromkeys(chosen)):
            asked = [node.asked(r, model, **options) for r in some]
            grads = model.run_calls(_calls("compute_node_gradient", [arguments for _, arguments in asked]))
            for r, (held, _), grad in zip(some, asked, grads, strict=True):
                node.hold(r.index, held, grad, replace=replace)
        groups = [_residual_calls(r, model, chosen, from_layer, to_layer) for r in some]
        arguments = [arguments for one in groups for _, arguments in one]
        scores = iter(model.run_calls(_calls("attribute_residual", arguments)))
        for one in groups:
            yield _in_columns(one, [next(scores) for _ in one])


attribute_step.of_many = _steps_of_many  # type: ignore[attr-defined]  # what `mr` looks for


def _calls(operation: str, arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"operation": operation, "arguments": one} for one in arguments]


def _residual_calls(
    r: Any, model: Any, nodes: list[Node], from_layer: int, to_layer: int | None
) -> list[tuple[list[int], dict[str, Any]]]:
    """Which of the nodes share their positions, and the arguments of `attribute_residual` for each such group."""
    sample = nodes[0].graph.scope.admit(r, model)
    held = [node.gradient(r.index) for node in nodes]
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, one in enumerate(held):
        groups.setdefault(one.positions, []).append(at)
    shared = {"dataset_id": sample.dataset_id, "sample_id": sample.sample_id}
    shared |= {"from_layer": from_layer, "to_layer": to_layer}
    return [
        (
            group,
            shared
            | {
                "pos_ids": list(positions),
                "downstream_grads": [held[at].grad for at in group],
                "downstream_layers": [nodes[at].depth for at in group],
            },
        )
        for positions, group in groups.items()
    ]


def _in_columns(
    groups: list[tuple[list[int], dict[str, Any]]], scores: list[Tensor]
) -> Float[Tensor, "layer column node"]:
    """The scores of all groups, in the order of the nodes."""
    columns = {
        at: column
        for (group, _), found in zip(groups, scores, strict=True)
        for at, column in zip(group, found.unbind(-1), strict=True)
    }
    return torch.stack([columns[at] for at in sorted(columns)], dim=-1)


def attribute_attn_weights(
    r: Any, model: Any, layer: int, head: int, downstream_nodes: Node | Sequence[Node], signed: bool = False
) -> tuple[Float[Tensor, "query key"], Float[Tensor, "query key"]]:
    """A head's pattern, and how much each of its edges matters to the nodes, by the gradients that they hold for `r`.

    Returns:
        `(aw, aa)`: the pattern A, and A · Σ_g |⟨G_i, W_O^h v_j⟩|, `signed` without the bars. The queries are the
        positions at which any of the nodes holds a gradient, in order; the keys are all positions of the sample.

    Raises:
        InvalidArgument: there is no node, one that holds no gradient, or one that does not read what the head writes.
        SampleMismatch: the graph is of another model or dataset.
    """
    chosen = _nodes(downstream_nodes)
    sample = chosen[0].graph.scope.admit(r, model)
    for node in chosen:
        if node.type != "lm_head" and node.depth <= layer:
            raise InvalidArgument(f"{node} does not read what layer {layer} writes", param="downstream_nodes")
    held = [node.gradient(r.index) for node in chosen]
    queries = sorted({position for one in held for position in one.positions})
    grads = [_spread(one, queries) for one in held]
    return model.attribute_attn_weights(sample.dataset_id, sample.sample_id, layer, head, grads, queries, signed=signed)


def _spread(held: NodeGradient, positions: list[int]) -> Float[Tensor, "1 pos hidden"]:
    """A gradient at more positions than it is held for: 0 at the others."""
    row = {position: at for at, position in enumerate(positions)}
    wider = held.grad.new_zeros(1, len(positions), held.grad.shape[-1])
    wider[0, [row[position] for position in held.positions]] = held.grad[0]
    return wider


def _nodes(nodes: Node | Sequence[Node]) -> list[Node]:
    chosen = list(nodes) if isinstance(nodes, Sequence) else [nodes]
    if not chosen:
        raise InvalidArgument("nodes is empty; it names at least one node", param="nodes")
    if len({id(node.graph) for node in chosen}) > 1:
        raise InvalidArgument("nodes are of several graphs", param="nodes")
    return chosen
