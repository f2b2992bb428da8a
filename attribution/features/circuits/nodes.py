"""The nodes of a graph, with the names and fields that circuit-tracer's and Neuronpedia's viewers know.

    features  {layer}_{index}_{position}    "cross layer transcoder" (also for a transcoder of one layer)
    errors    {layer}_-1_{position}         "mlp reconstruction error"
    tokens    E_{token id}_{position}       "embedding"
    logits    {layers + 1}_{token id}_{position}   "logit"

`feature` of a feature is layer and index in one number, by Cantor's pairing.
"""

from collections.abc import Callable
from typing import Any

from attribution.features.circuits.influence import Pruned
from attribution.features.circuits.trace import Circuit
from attribution.prompts import token_text

Describe = Callable[[int, int], str | None]
"""The description of a feature by layer and index, if there is one."""


def cantor(layer: int, index: int) -> int:
    """Layer and index of a feature in one number."""
    return (layer + index) * (layer + index + 1) // 2 + index


def node_id_of_row(circuit: Circuit, row: int) -> str:
    """The name of a target: the logits, then the features."""
    n_logits = len(circuit.logits.token_ids)
    if row >= n_logits:
        return node_id_of_source(circuit, row - n_logits)
    replacement = circuit.replacement
    return f"{replacement.n_layers + 1}_{circuit.logits.token_ids[row]}_{replacement.n_positions - 1}"


def node_id_of_source(circuit: Circuit, column: int) -> str:
    """The name of a source: the features, then errors by layer and position, then tokens."""
    replacement = circuit.replacement
    if column < len(circuit.chosen):
        layer, position, index = _feature(circuit, column)
        return f"{layer}_{index}_{position}"
    layer, position = divmod(column - len(circuit.chosen), replacement.n_positions)
    if layer < replacement.n_layers:
        return f"{layer}_-1_{position}"
    return f"E_{replacement.token_ids[position]}_{position}"


def _feature(circuit: Circuit, column: int) -> tuple[int, int, int]:
    """Layer, position and index of a feature of the graph."""
    at, features = circuit.chosen[column], circuit.replacement.features
    return int(features.layer[at]), int(features.position[at]), int(features.index[at])


def nodes(circuit: Circuit, pruned: Pruned, describe: Describe) -> list[dict[str, Any]]:
    """The nodes that are kept: tokens, errors and features by layer, and the logits."""
    found = [_source(circuit, pruned, column, describe) for column in pruned.sources.nonzero()[:, 0].tolist()]
    tokens = [one for one in found if one["feature_type"] == "embedding"]
    inner = [one for one in found if one["feature_type"] != "embedding"]
    inner.sort(key=lambda one: (int(one["layer"]), one["ctx_idx"], one["feature"]))
    tokens.sort(key=lambda one: one["ctx_idx"])
    return [*tokens, *inner, *(_logit(circuit, row) for row in range(len(circuit.logits.token_ids)))]


def _source(circuit: Circuit, pruned: Pruned, column: int, describe: Describe) -> dict[str, Any]:
    replacement, name = circuit.replacement, node_id_of_source(circuit, column)
    influence = float(pruned.cumulative[column])
    if column < len(circuit.chosen):
        layer, position, index = _feature(circuit, column)
        return {
            **_node(name, cantor(layer, index), str(layer), position, "cross layer transcoder", f"{layer}_{index}-0"),
            "clerp": describe(layer, index) or "",
            "influence": influence,
            "activation": float(replacement.features.activation[circuit.chosen[column]]),
            "index": index,
            "source": replacement.transcoders[layer].name,
            "constant": _constant(circuit, len(circuit.logits.token_ids) + column),
        }
    layer, position = divmod(column - len(circuit.chosen), replacement.n_positions)
    if layer < replacement.n_layers:
        error = _node(name, -1, str(layer), position, "mlp reconstruction error", f"{layer}_-1-{position}")
        return {
            **error,
            "clerp": f"error at layer {layer}, position {position}",
            "influence": influence,
            "activation": None,
        }
    token = replacement.token_ids[position]
    embedding = _node(name, position, "E", position, "embedding", f"E_{token}-{position}")
    text = token_text(replacement.model, token)
    return {**embedding, "clerp": f'Token "{text}"', "influence": influence, "activation": None}


def _constant(circuit: Circuit, row: int) -> float | None:
    """The part of a target that no source has; None where the node is no target."""
    return float(circuit.constants[row]) if row < len(circuit.constants) else None


def _logit(circuit: Circuit, row: int) -> dict[str, Any]:
    replacement, token = circuit.replacement, circuit.logits.token_ids[row]
    layer, last = str(replacement.n_layers + 1), replacement.n_positions - 1
    probability = circuit.logits.probabilities[row]
    text = token_text(replacement.model, token)
    return {
        **_node(node_id_of_row(circuit, row), token, layer, last, "logit", f"L_{token}-{last}"),
        "token_prob": probability,
        "is_target_logit": row == 0,
        "clerp": f'Output "{text}" (p={probability:.3f})',
        "influence": None,
        "activation": None,
        "value": float(circuit.values[row]),
        "constant": float(circuit.constants[row]),
    }


def _node(name: str, feature: int, layer: str, position: int, kind: str, js_id: str) -> dict[str, Any]:
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
    }


def links(circuit: Circuit, pruned: Pruned) -> list[dict[str, Any]]:
    """The edges that are kept, by target and source."""
    weights = circuit.effects.weights[pruned.edges[:, 0], pruned.edges[:, 1]].tolist()
    rows = {row: node_id_of_row(circuit, row) for row in pruned.edges[:, 0].unique().tolist()}
    columns = {column: node_id_of_source(circuit, column) for column in pruned.edges[:, 1].unique().tolist()}
    return [
        {"source": columns[column], "target": rows[row], "weight": weight}
        for (row, column), weight in zip(pruned.edges.tolist(), weights, strict=True)
    ]
