"""How far the linear picture holds: features really taken out of the running model, nothing held fixed.

1. The most influential features of the graph.
2. What the graph says taking one out does to the first logit: its edges along all paths, each feature on the way moved
   in proportion, all other things unchanged.
3. A forward pass with a row per feature, without what that feature adds: attention, norms and all later features are
   free to change. How the logit moved is what the model says.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from attribution.features.circuits.influence import Effects, Pruned
from attribution.features.circuits.nodes import node_id_of_row, node_id_of_source
from attribution.features.circuits.trace import Circuit
from attribution.model.live import Addition, run_live


def total_effects(effects: Effects, activations: Float[Tensor, "feature"], logit: int) -> Float[Tensor, "source"]:
    """The effect of each source on a logit: over all paths, the sum of edge · Π (edge / activation), in float64."""
    weights = effects.weights
    found = weights[logit].double().clone()
    for layer in effects.layers.unique().flip(0):
        rows = (effects.layers == layer).nonzero()[:, 0]
        amounts = found[effects.columns[rows]] / activations[rows].double()
        for part, share in zip(rows.split(256), amounts.split(256), strict=True):
            found += share @ weights[effects.n_logits + part].double()
    return found


def live_check(circuit: Circuit, pruned: Pruned, count: int) -> dict[str, Any]:
    """Take `count` features out, each by itself.

    Returns:
        target; features: node_id, expected and found change of the target, and what it would be had the final norm
        kept its scale, each; same_sign: the share of those that moved it as expected; correlation of expected and
        found, None where it is not defined; at_fixed_scale: the same two with the final norm's scale kept.
    """
    features, chosen = circuit.replacement.features, circuit.chosen
    kept = pruned.sources[: len(chosen)].nonzero()[:, 0]
    columns = kept[pruned.influence[kept].argsort(descending=True, stable=True)][:count].tolist()
    totals = total_effects(circuit.effects, features.activation[chosen].cpu(), 0)
    additions = []
    for row, column in enumerate(columns, start=1):
        at = chosen[column]
        layer, position = int(features.layer[at]), int(features.position[at])
        additions.append(Addition(row, layer + 1, position, -circuit.replacement.writes(layer, at[None])[0]))
    final = run_live(circuit.replacement.model, circuit.replacement.token_ids, additions)
    expected = [-float(totals[column]) for column in columns]
    found, fixed = (_changes(rows, circuit.logits.directions[0]) for rows in (final.normed, final.at_fixed_scale))
    return {
        "target": node_id_of_row(circuit, 0),
        "features": [
            {
                "node_id": node_id_of_source(circuit, column),
                "expected": one,
                "found": two,
                "found_at_fixed_scale": three,
            }
            for column, one, two, three in zip(columns, expected, found, fixed, strict=True)
        ],
        **agreement(expected, found),
        "at_fixed_scale": agreement(expected, fixed),
    }


def _changes(rows: Float[Tensor, "row d_model"], direction: Float[Tensor, "d_model"]) -> list[float]:
    values = rows.to(direction) @ direction
    return (values[1:] - values[0]).tolist()


def agreement(expected: list[float], found: list[float]) -> dict[str, float | None]:
    """How well changes that were expected agree with those found: same_sign and correlation."""
    if not expected:
        return {"same_sign": None, "correlation": None}
    one, other = np.array(expected), np.array(found)
    varies = len(one) > 2 and one.std() > 0 and other.std() > 0
    return {
        "same_sign": float((np.sign(one) == np.sign(other)).mean()),
        "correlation": float(np.corrcoef(one, other)[0, 1]) if varies else None,
    }
