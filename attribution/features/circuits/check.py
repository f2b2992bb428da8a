"""The self-check of a graph: edges and completeness against interventions that share no step with the gradients.

1. Some kept edges, at evenly spaced ranks of their magnitude, so that strong and weak ones are among them.
2. A forward pass (`attribution.model.held_fixed`) with a row per edge, in which what its source adds is added once
   more: by how much the target moves is the edge. Of many edges or a long prompt there are several passes.
3. One row more, in which everything is taken away that a node stands for: what is left of each of these targets is its
   constant.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attribution.features.circuits.influence import Pruned
from attribution.features.circuits.nodes import node_id_of_row, node_id_of_source
from attribution.features.circuits.replacement import Replacement, passes, what_is_multiplied
from attribution.features.circuits.trace import Circuit
from attribution.model.held_fixed import Held, run_held
from attribution.model.linearised import Reader
from attribution.model.live import Addition, rows_at_once

_FINE, _COARSE = (1e-3, 1e-3), (0.1, 0.1)
"""Of a model in 32 or 64 bits (most families compute norms in 32 anyway), and of one in 16: the largest relative error
of a check that passes, and the share of all that reaches a target (the sum of its edges by magnitude) below which
rounding is all that a difference shows."""


def check(circuit: Circuit, pruned: Pruned, count: int) -> dict[str, Any]:
    """Intervene for `count` edges.

    Returns:
        edges: source, target, expected and found of each; relative_error: the largest difference, over the edge
        or, where that is more, a thousandth of all that reaches the target (of 16 bits a tenth);
        constant_error: the largest difference of a target's constant, over all that reaches it; tolerance; passed.
    """
    tolerance, floor = _FINE if circuit.replacement.model.dtype.itemsize > 2 else _COARSE
    shown, errors, constants = [], [0.0], [0.0]
    for (target, column), (before, after, bare) in _moved(circuit, sampled(circuit, pruned, count)):
        expected = float(circuit.effects.weights[target, column])
        shown.append(
            {
                "source": node_id_of_source(circuit, column),
                "target": node_id_of_row(circuit, target),
                "expected": expected,
                "found": after - before,
            }
        )
        reaches = max(float(circuit.effects.weights[target].abs().sum()), 1e-30)
        errors.append(abs(after - before - expected) / max(abs(expected), floor * reaches))
        constants.append(abs(bare - float(circuit.constants[target])) / reaches)
    relative, constant = max(errors), max(constants)
    return {
        "edges": shown,
        "relative_error": relative,
        "constant_error": constant,
        "tolerance": tolerance,
        "passed": max(relative, constant) <= tolerance,
    }


def _moved(
    circuit: Circuit, edges: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], tuple[float, float, float]]]:
    """Each edge with its target as it is, with its source once more, and without all that a node stands for."""
    replacement = circuit.replacement
    readers = {layer: Reader(one.point, passes(one.autoencoder)) for layer, one in replacement.transcoders.items()}
    size = rows_at_once(replacement.n_positions)
    for part in (edges[first : first + size] for first in range(0, len(edges), size)):
        additions = [addition_of(circuit, row, column) for row, (_, column) in enumerate(part, start=1)]
        additions += _all_taken_away(replacement, len(part) + 1)
        held = run_held(replacement.model, replacement.token_ids, additions, readers)
        for row, edge in enumerate(part, start=1):
            before, after, bare = (_value(circuit, held, edge[0], at) for at in (0, row, len(part) + 1))
            yield edge, (before, after, bare)


def sampled(circuit: Circuit, pruned: Pruned, count: int) -> list[tuple[int, int]]:
    """Row and column of some kept edges, at evenly spaced ranks of their magnitude."""
    weights = circuit.effects.weights[pruned.edges[:, 0], pruned.edges[:, 1]].abs()
    order = weights.argsort(descending=True, stable=True)
    ranks = torch.linspace(0, max(0, len(order) - 1), min(count, len(order))).round().long().unique()
    return [(int(row), int(column)) for row, column in pruned.edges[order[ranks]]]


def addition_of(circuit: Circuit, row: int, column: int) -> Addition:
    """What a source adds, once more."""
    replacement, n_features = circuit.replacement, len(circuit.chosen)
    if column < n_features:
        at = circuit.chosen[column]
        layer, position = int(replacement.features.layer[at]), int(replacement.features.position[at])
        return Addition(row, layer + 1, position, replacement.writes(layer, at[None])[0])
    layer, position = divmod(column - n_features, replacement.n_positions)
    if layer < replacement.n_layers:
        return Addition(row, layer + 1, position, replacement.errors[layer][position])
    return Addition(row, 0, position, replacement.linear.values(0)[position])


def _all_taken_away(replacement: Replacement, row: int) -> list[Addition]:
    """The embeddings, and what the features and the error of each layer add, with a minus."""
    found = [Addition(row, 0, None, -replacement.linear.values(0))]
    for layer, error in enumerate(replacement.errors):
        whole = error.clone()
        if layer in replacement.transcoders:
            chosen = replacement.features.of_layer(layer)
            writes = replacement.writes(layer, chosen).to(whole)
            whole.index_add_(0, replacement.features.position[chosen], writes)
        found.append(Addition(row, layer + 1, None, -whole))
    return found


def _value(circuit: Circuit, held: Held, target: int, row: int) -> float:
    """The value of a target in a row: a pre-activation, or a logit less the mean logit."""
    replacement, logits = circuit.replacement, circuit.logits
    if target < len(logits.token_ids):
        final = held.final[row, -1].to(logits.directions)
        return float(final @ logits.directions[target] + logits.offsets[target])
    at = circuit.chosen[target - len(logits.token_ids)]
    features = replacement.features
    layer, position, index = (int(one[at]) for one in (features.layer, features.position, features.index))
    autoencoder, read = replacement.transcoders[layer].autoencoder, held.reads[layer]
    assert read is not None
    return _pre_activation(autoencoder, read[row, position], read[0, position], index)


def _pre_activation(autoencoder: Any, read: Tensor, at: Tensor, index: int) -> float:
    read, at = read.to(autoencoder.W_enc), at.to(autoencoder.W_enc)
    if autoencoder.normalisation == "none":
        return float(autoencoder.pre_activations(read[None])[0, index])
    base = autoencoder.pre_activations(at[None])[0, index]
    moved = what_is_multiplied(autoencoder, read[None], at[None]) - what_is_multiplied(autoencoder, at[None], at[None])
    return float(base + moved[0] @ autoencoder.readers([index])[0])
