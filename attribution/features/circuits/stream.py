"""A circuit of one layer, through an autoencoder of the stream: gradient × activation.

1. Encode the stream at the autoencoder's place: activations, and the error that the reconstruction leaves.
2. The gradient of each logit's direction with respect to the stream there, through the true later layers: attention,
   norms and MLPs as they are at this input.
3. A feature's effect is its activation times the gradient along its decoder direction: the first-order change of the
   logit. It is no path through later features, and exact only for small changes.
4. The features with the largest influence on the logits are nodes, at most as many as are asked for.
5. The self-check adds a little of what a feature or an error adds in the running model, and takes a little away, which
   is what the gradient claims; and it takes it out, which is what one may want to know.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.circuits.check import addition_of, sampled
from attribution.features.circuits.influence import Effects, Pruned, influence, row_sums
from attribution.features.circuits.live_check import agreement
from attribution.features.circuits.nodes import node_id_of_row, node_id_of_source
from attribution.features.circuits.replacement import Replacement, Transcoder, encoded, features_of
from attribution.features.circuits.targets import Choose
from attribution.features.circuits.trace import Circuit, Logits
from attribution.features.places import Place, place_rows, place_stream
from attribution.features.source import Source
from attribution.model.capture import Batch, forward
from attribution.model.linearised import Linearised
from attribution.model.live import Addition, live_gradients, run_live
from attribution.model.traced import TracedModel

_STEP, _SMALL = 0.05, 0.02
"""Of what a source adds, what is added and taken away: this share, and no more than the second of the stream's norm."""
TOLERANCE = 0.05
"""The largest relative error of a check that passes."""


def depth_of(place: Place) -> int:
    """The depth (`attribution.model.live`) of what is added to the stream at a place."""
    return place.layer if place.point == "resid_pre" else place.layer + 1


def trace_stream(
    model: TracedModel,
    source: Source,
    token_ids: list[int],
    choose: Choose,
    max_features: int,
    *,
    skip_first: bool,
    most_encoded: int,
) -> Circuit:
    """The effects of the features of one autoencoder, and of its error at each position, on logits.

    Args:
        choose: the logits that are explained, given those of the last position.
        skip_first: leave the first position out: neither features nor an error.

    Raises:
        GradientsRefused: the model is quantised.
    """
    x, last = _stream(model, source.reads, token_ids)
    logits = choose(last)
    grads, final = live_gradients(model, token_ids, depth_of(source.reads), logits.directions)
    autoencoder = source.autoencoder(model.device, model.work_dtype)
    linear = Linearised(leaves=(), reads=(), final=final[None], logits=last)  # nothing is linear here
    replacement = _taken_apart(model, source, autoencoder, x, token_ids, linear, skip_first, most_encoded)
    weights = _first_order(replacement, source.layer, grads.to(model.work_dtype))
    values = (logits.directions @ final.to(logits.directions) + logits.offsets).cpu()
    return _most_influential(replacement, logits, weights, values, max_features)


def _stream(model: TracedModel, place: Place, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """What an autoencoder at a place reads, and the logits of the last position."""
    ids, stream = torch.tensor([token_ids], device=model.device), place_stream(model, place)
    positions = torch.arange(len(token_ids), device=model.device)[None]
    logits, captured = forward(model, Batch(ids, torch.ones_like(ids), positions, None, 1), [stream])
    return place_rows(model, place, captured[stream][0, 0]), logits[0, -1]


def _taken_apart(
    model: TracedModel,
    source: Source,
    autoencoder: Autoencoder,
    x: Tensor,
    token_ids: list[int],
    linear: Linearised,
    skip_first: bool,
    most_encoded: int,
) -> Replacement:
    layer, x = source.layer, x.to(autoencoder.W_enc)
    active, written = encoded(autoencoder, x, most_encoded)
    errors = [torch.zeros_like(x)] * model.dimensions.n_layers
    errors[layer] = x - written
    if skip_first:
        active, errors[layer][0] = active[:, active[0] > 0], 0
    return Replacement(
        model=model,
        token_ids=token_ids,
        transcoders={layer: Transcoder(source.name, source.reads.point, autoencoder)},
        linear=linear,
        reads={layer: x},
        features=features_of([torch.cat([torch.full_like(active[:1], layer), active])], model.work_dtype),
        errors=tuple(errors),
        scales={layer: autoencoder.scale_of(x)},
        skips_first=skip_first,
    )


def _first_order(
    replacement: Replacement, layer: int, grads: Float[Tensor, "logit pos d_model"]
) -> Float[Tensor, "logit source"]:
    """Gradient times what each source adds; only the errors of one layer are not 0, and no token."""
    features, count = replacement.features, replacement.n_positions
    found = [
        torch.einsum("tfd,fd->tf", grads[:, features.position[part]], replacement.writes(layer, part).to(grads))
        for part in torch.arange(len(features), device=grads.device).split(1024)
        if len(part)
    ]
    others = grads.new_zeros(len(grads), (replacement.n_layers + 1) * count)
    error = torch.einsum("tpd,pd->tp", grads, replacement.errors[layer].to(grads))
    others[:, layer * count : (layer + 1) * count] = error
    return torch.cat([*found, others], dim=1).cpu()


def _most_influential(
    replacement: Replacement, logits: Logits, weights: Tensor, values: Tensor, max_features: int
) -> Circuit:
    whole = _effects(replacement, logits, weights, len(replacement.features))
    found = influence(whole)[: whole.n_features]
    chosen = found.argsort(descending=True, stable=True)[:max_features].sort().values
    columns = torch.cat([chosen, torch.arange(whole.n_features, weights.shape[1])])
    kept = weights[:, columns]
    reaches = row_sums(weights)
    missed = (reaches - row_sums(kept)) / reaches.clamp(min=1e-10)
    return Circuit(
        replacement=replacement,
        logits=logits,
        chosen=chosen,
        effects=_effects(replacement, logits, kept, len(chosen)),
        values=values,
        constants=values - weights.sum(1),
        missed=float(missed @ logits.weights),
    )


def _effects(replacement: Replacement, logits: Logits, weights: Tensor, n_features: int) -> Effects:
    none = torch.zeros(0, dtype=torch.long)
    return Effects(weights, none, none, n_features, replacement.n_positions, logits.weights)


def explained(circuit: Circuit) -> float:
    """Of what reaches the logits, by magnitude, the share that is not of errors."""
    weights = circuit.effects.weights
    errors = row_sums(weights[:, circuit.effects.errors]) / row_sums(weights).clamp(min=1e-10)
    return float(1 - errors @ circuit.logits.weights)


def check_stream(circuit: Circuit, pruned: Pruned, source: Source, count: int) -> dict[str, Any]:
    """Change what the sources of `count` edges add, in the running model.

    Returns:
        edges: source, target, expected, found (from a small step to both sides, per unit) and removed (the change when
        it is taken out), each; relative_error: the largest difference of expected and found, over the edge or a
        thousandth of the target; tolerance and passed, both None of a model in 16 bits, whose rounding hides a small
        step; and of taking the sources out, against −expected: same_sign and
        correlation.
    """
    replacement, logits = circuit.replacement, circuit.logits
    edges, depth = sampled(circuit, pruned, count), depth_of(source.reads)
    additions, steps = [], []
    for number, (_, column) in enumerate(edges):
        one = addition_of(circuit, 1, column)
        assert one.position is not None
        stream = replacement.reads[source.layer][one.position]
        steps.append(min(_STEP, _SMALL * float(stream.norm()) / max(float(one.value.norm()), 1e-30)))
        for row, scale in enumerate((steps[-1], -steps[-1], -1.0), start=1 + 3 * number):
            additions.append(Addition(row, depth, one.position, scale * one.value))
    final = run_live(replacement.model, replacement.token_ids, additions).normed.to(logits.directions)
    shown, errors = [], [0.0]
    for number, ((row, column), step) in enumerate(zip(edges, steps, strict=True)):
        chosen = final[[0, *range(1 + 3 * number, 4 + 3 * number)]]
        base, up, down, out = (chosen @ logits.directions[row]).tolist()
        expected, found = float(circuit.effects.weights[row, column]), (up - down) / (2 * step)
        names = {"source": node_id_of_source(circuit, column), "target": node_id_of_row(circuit, row)}
        shown.append(names | {"expected": expected, "found": found, "removed": out - base})
        errors.append(abs(found - expected) / max(abs(expected), 1e-3 * abs(base), 1e-30))
    tolerance = TOLERANCE if replacement.model.dtype.itemsize > 2 else None
    return {
        "edges": shown,
        "relative_error": max(errors),
        "tolerance": tolerance,
        "passed": None if tolerance is None else max(errors) <= tolerance,
        **agreement([-one["expected"] for one in shown], [one["removed"] for one in shown]),
    }
