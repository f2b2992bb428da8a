"""The tracer: logits first, then the features that matter most.

1. The effects on each logit's direction, U_t − mean U at the final normed stream (before a softcap).
2. Influence of every feature on the logits, through the targets that are known by now.
3. The effects on the most influential features that have none yet, some batches of them; then step 2 again, until
   `max_features` have.
4. Features that were not reached leave the graph; which share of what reaches its nodes came from them is kept.

What is held at once has a ceiling: rows are computed for as many features as fit, batches are as large as fit, and
neither ever grows with the square of the number of active features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attribution.errors import InvalidArgument
from attribution.features.circuits.influence import Effects, influence, row_sums
from attribution.features.circuits.replacement import Replacement
from attribution.features.circuits.rows import effects, n_columns
from attribution.operation import Progress, Steps

_MOST_AT_ONCE = 64
"""Targets of one backward pass."""
_BATCHES_PER_RANKING = 4


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits that are explained.

    Attributes:
        directions: U_t − mean U.
        offsets: the biases of the unembedding, less their mean.
        probabilities: of the model, over the whole vocabulary.
    """

    token_ids: list[int]
    directions: Float[Tensor, "logit d_model"]
    offsets: Float[Tensor, "logit"]
    probabilities: list[float]

    @property
    def weights(self) -> Float[Tensor, "logit"]:
        """Their probabilities among each other; equal where all are 0."""
        found = torch.tensor(self.probabilities, dtype=torch.float64)
        return found / found.sum() if found.sum() > 0 else torch.full_like(found, 1 / len(found))


@dataclass(frozen=True)
class Room:
    """What may be held at once.

    Attributes:
        n_features: rows for at most so many features.
        at_once: targets of one backward pass.
        reduced: whether `n_features` is fewer than were asked for and are active.
    """

    n_features: int
    at_once: int
    reduced: bool


def room_for(replacement: Replacement, n_logits: int, max_features: int, max_bytes: int) -> Room:
    """How many rows and targets at once a ceiling in bytes leaves room for.

    A sixth of it is for rows: what is chosen of them, what is kept, its scores and their order are copies. A sixth is
    for gradients, of which a backward pass holds about three times what it returns.

    Raises:
        InvalidArgument: there is no room for a single feature, or not for one target at once.
    """
    dims, size = replacement.model.dimensions, replacement.model.work_dtype.itemsize
    row = n_columns(replacement) * size
    target = 3 * (dims.n_layers + 1) * replacement.n_positions * dims.d_model * size
    rows, at_once = max_bytes // 6 // row - n_logits, max_bytes // 6 // target
    if rows < 1 or at_once < 1:
        needed = 6 * max(row * (n_logits + 1), target)
        raise InvalidArgument(
            f"max_bytes is {max_bytes}, and this graph ({len(replacement.features)} active features, "
            f"{replacement.n_positions} tokens, {n_logits} logits) needs at least {needed}",
            param="max_bytes",
        )
    wanted = min(max_features, len(replacement.features))
    return Room(min(wanted, rows), min(at_once, _MOST_AT_ONCE), rows < wanted)


@dataclass(frozen=True, eq=False)
class Circuit:
    """A graph before it is pruned.

    Attributes:
        chosen: the features that are nodes, as indices of `replacement.features`, ascending.
        effects: of the nodes on each other; the rows of features are in the order of `chosen`.
        values: of each row, what the target is: the pre-activation, or the logit less the mean logit.
        constants: of each row, the part that no source has: biases.
        missed: of what reaches the nodes, averaged by influence, the share from features that are no nodes.
    """

    replacement: Replacement
    logits: Logits
    chosen: Int[Tensor, "feature"]
    effects: Effects
    values: Float[Tensor, "target"]
    constants: Float[Tensor, "target"]
    missed: float


class _Rows:
    """Rows as they come: logits, then features."""

    def __init__(self, replacement: Replacement, logits: Logits, n_features: int) -> None:
        self.replacement, self.logits = replacement, logits
        dtype = replacement.model.work_dtype
        self.weights = torch.empty(len(logits.token_ids) + n_features, n_columns(replacement), dtype=dtype)
        self.values = torch.empty(len(self.weights), dtype=dtype)
        self.features = torch.zeros(n_features, dtype=torch.long)
        self.count = 0

    def add(self, depth: int, positions: Tensor, vectors: Tensor, values: Tensor) -> slice:
        """The rows of some targets of one depth."""
        at = slice(self.count, self.count + len(positions))
        self.weights[at], self.values[at] = effects(self.replacement, depth, positions, vectors), values.cpu()
        self.count = at.stop
        return at

    def add_features(self, layer: int, chosen: Int[Tensor, "feature"]) -> None:
        """The rows of some features of one layer."""
        features = self.replacement.features
        vectors = self.replacement.transcoders[layer].autoencoder.readers(features.index[chosen])
        at = self.add(layer, features.position[chosen], vectors, features.activation[chosen])
        self.features[at.start - len(self.logits.token_ids) : at.stop - len(self.logits.token_ids)] = chosen.cpu()

    def effects(self) -> Effects:
        """What is known by now."""
        features = self.features[: self.count - len(self.logits.token_ids)]
        return Effects(
            weights=self.weights[: self.count],
            columns=features,
            layers=self.replacement.features.layer.cpu()[features],
            n_features=len(self.replacement.features),
            n_tokens=self.replacement.n_positions,
            logit_weights=self.logits.weights,
        )


def trace(replacement: Replacement, logits: Logits, max_features: int, max_bytes: int) -> Steps[tuple[Circuit, Room]]:
    """The graph of the most influential features, one step per batch of targets.

    Raises:
        InvalidArgument: `max_bytes` leaves no room.
    """
    room = room_for(replacement, len(logits.token_ids), max_features, max_bytes)
    rows, total = _Rows(replacement, logits, room.n_features), len(logits.token_ids) + room.n_features
    last, final = replacement.n_positions - 1, replacement.linear.final.detach()
    for start in range(0, len(logits.token_ids), room.at_once):
        vectors = logits.directions[start : start + room.at_once]
        values = vectors @ final[last].to(vectors) + logits.offsets[start : start + room.at_once].to(vectors)
        rows.add(replacement.n_layers, torch.full((len(vectors),), last), vectors, values)
        yield Progress(rows.count, total)
    layers = replacement.features.layer.cpu()
    while rows.count < total:
        queue = _next_features(rows, min(_BATCHES_PER_RANKING * room.at_once, total - rows.count))
        for layer in layers[queue].unique().tolist():
            for batch in queue[layers[queue] == layer].split(room.at_once):
                rows.add_features(layer, batch)
                yield Progress(rows.count, total)
    return _circuit(rows), room


def _next_features(rows: _Rows, count: int) -> Int[Tensor, "feature"]:
    """The most influential features without a row."""
    found = influence(rows.effects())[: len(rows.replacement.features)]
    found[rows.features[: rows.count - len(rows.logits.token_ids)]] = -1
    return found.argsort(descending=True, stable=True)[:count]


def _circuit(rows: _Rows) -> Circuit:
    known = rows.effects()
    chosen, order = rows.features.sort()
    order = torch.cat([torch.arange(known.n_logits), known.n_logits + order])
    reaches, constants = row_sums(known.weights)[order], (rows.values - known.weights.sum(1))[order]
    found = known.amounts(influence(known))[order]
    columns = torch.cat([chosen, torch.arange(known.n_features, known.weights.shape[1])])
    weights = known.weights[order[:, None], columns]
    missed = (reaches - row_sums(weights)) / reaches.clamp(min=1e-10)  # 0 of a target that nothing reaches
    return Circuit(
        replacement=rows.replacement,
        logits=rows.logits,
        chosen=chosen,
        effects=Effects(
            weights=weights,
            columns=torch.arange(len(chosen)),
            layers=rows.replacement.features.layer.cpu()[chosen],
            n_features=len(chosen),
            n_tokens=known.n_tokens,
            logit_weights=known.logit_weights,
        ),
        values=rows.values[order],
        constants=constants,
        missed=float((missed * found).sum() / found.sum()),
    )
