"""How much of the logits goes back to each node, what is kept, and how much of the whole is explained.

The definitions are those of the attribution graphs of Ameisen et al. (2025), as circuit-tracer computes them.

1. Each target's effects are taken by magnitude and divided by their sum: shares of what reaches it.
2. Influence of a node: over all paths to the logits, the sum of the products of the shares along the path, logits
   weighted by their probability. Features are visited from the last layer to the first, so that one pass is exact.
3. Nodes: the fewest, by influence, that hold `node` of all influence; tokens and logits are kept always.
4. Edges between them: shares and influence once more, of what is left; the fewest whose score (share × influence of the
   target) holds `edge` of the whole.
5. Features without a way in or out, and errors without a way out, go, until none is left to go.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_AT_ONCE = 1 << 22
"""Entries of a matrix that are copied at once."""
_SMALLEST = 1e-10
"""What a row's sum is at least taken as."""


@dataclass(frozen=True, eq=False)
class Effects:
    """The effects of sources on targets.

    Rows: the logits, then features. Columns: features, then errors, then tokens.

    Attributes:
        columns: of each row that is a feature, its column.
        layers: of each row that is a feature.
        n_features: how many columns are features.
        n_tokens: how many of the last columns are tokens.
        logit_weights: of each logit, the probability among them.
    """

    weights: Float[Tensor, "target source"]
    columns: Int[Tensor, "row"]
    layers: Int[Tensor, "row"]
    n_features: int
    n_tokens: int
    logit_weights: Float[Tensor, "logit"]

    @property
    def n_logits(self) -> int:
        """How many rows are logits."""
        return len(self.logit_weights)

    @property
    def errors(self) -> slice:
        """The columns of errors."""
        return slice(self.n_features, self.weights.shape[1] - self.n_tokens)

    def amounts(self, found: Float[Tensor, "source"]) -> Float[Tensor, "target"]:
        """Of each row, its influence, and of a logit its weight."""
        return torch.cat([self.logit_weights.double(), found[self.columns]])


def row_sums(weights: Float[Tensor, "target source"]) -> Float[Tensor, "target"]:
    """The sum of the magnitudes of each row, in float64, never all at once."""
    return torch.cat([part.abs().sum(1, dtype=torch.float64) for part in weights.split(_rows_at_once(weights))])


def pull(weights: Float[Tensor, "target source"], amounts: Float[Tensor, "target"]) -> Float[Tensor, "source"]:
    """Σ amount of a target × share of each source of it, in float64."""
    shares = amounts.double() / row_sums(weights).clamp(min=_SMALLEST)
    found = torch.zeros(weights.shape[1], dtype=torch.float64)
    rows = _rows_at_once(weights)
    for part, share in zip(weights.split(rows), shares.split(rows), strict=True):
        found += share @ part.abs().double()
    return found


def influence(effects: Effects) -> Float[Tensor, "source"]:
    """The influence of each source on the logits (steps 1 and 2)."""
    weights, n_logits = effects.weights, effects.n_logits
    found = pull(weights[:n_logits], effects.logit_weights)
    for layer in effects.layers.unique().flip(0):
        for rows in (effects.layers == layer).nonzero()[:, 0].split(_rows_at_once(weights)):
            found += pull(weights[n_logits + rows], found[effects.columns[rows]])
    return found


def _rows_at_once(weights: Tensor) -> int:
    return max(1, _AT_ONCE // max(1, weights.shape[1]))


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is kept.

    Attributes:
        sources: of all columns, whether the node is kept.
        edges: (target row, source column) of each kept edge, strongest target order not implied.
        cumulative: of all columns, the share of all influence that this node and those above it have.
        influence: of all columns.
    """

    sources: Bool[Tensor, "source"]
    edges: Int[Tensor, "edge 2"]
    cumulative: Float[Tensor, "source"]
    influence: Float[Tensor, "source"]


def prune(effects: Effects, node_threshold: float, edge_threshold: float) -> Pruned:
    """Keep what matters (steps 3 to 5). Thresholds are shares from 0 to 1. Every feature has a row, in any order."""
    found = influence(effects)
    kept = _held(found, node_threshold)
    kept[len(kept) - effects.n_tokens :] = True
    columns = kept.nonzero()[:, 0]
    rows = kept[effects.columns].nonzero()[:, 0]
    targets = torch.cat([torch.arange(effects.n_logits), effects.n_logits + rows])
    left = Effects(
        weights=effects.weights[targets][:, columns],
        columns=torch.searchsorted(columns, effects.columns[rows]),
        layers=effects.layers[rows],
        n_features=int(kept[: effects.n_features].sum()),
        n_tokens=effects.n_tokens,
        logit_weights=effects.logit_weights,
    )
    edges = _kept_edges(left, edge_threshold)
    sources = _connected(edges, left)
    kept = torch.zeros_like(kept)
    kept[columns[sources]] = True
    pairs = edges.nonzero()
    return Pruned(kept, torch.stack([targets[pairs[:, 0]], columns[pairs[:, 1]]], dim=1), _cumulative(found), found)


def _kept_edges(effects: Effects, threshold: float) -> Bool[Tensor, "target source"]:
    amounts = effects.amounts(influence(effects))
    shares = (amounts / row_sums(effects.weights).clamp(min=_SMALLEST)).to(effects.weights)
    scores = effects.weights.abs().mul_(shares[:, None])
    return _held(scores.flatten(), threshold).view(scores.shape)


def _held(scores: Float[Tensor, "score"], threshold: float) -> Bool[Tensor, "score"]:
    """The largest scores that together hold a share of the whole; never one that is 0."""
    if threshold >= 1:  # beside a large score a small one adds nothing to a sum
        return scores > 0
    ordered = np.sort(scores[scores > 0].numpy())[::-1]
    if not len(ordered):
        return torch.zeros(len(scores), dtype=torch.bool)
    held = np.cumsum(ordered, dtype=np.float64)
    last = min(int(np.searchsorted(held / held[-1], threshold)), len(ordered) - 1)
    return scores >= float(ordered[last])


def _connected(edges: Bool[Tensor, "target source"], effects: Effects) -> Bool[Tensor, "source"]:
    """Take away, in place, the edges of features and errors that lead nowhere; which sources are left."""
    inner, into = effects.weights.shape[1] - effects.n_tokens, edges[effects.n_logits :]
    kept = torch.ones(edges.shape[1], dtype=torch.bool)
    while True:
        before = int(kept.sum())
        kept[:inner] &= edges[:, :inner].any(0)
        kept[effects.columns] &= into.any(1)
        into[~kept[effects.columns]] = False
        edges[:, ~kept] = False
        if int(kept.sum()) == before:
            return kept


def _cumulative(scores: Float[Tensor, "source"]) -> Float[Tensor, "source"]:
    order = scores.argsort(descending=True, stable=True)
    found = torch.zeros_like(scores)
    found[order] = scores[order].cumsum(0) / scores.sum().clamp(min=1e-300)
    return found


@dataclass(frozen=True)
class Scores:
    """How much of the graph is explained by features, each from 0 to 1.

    Attributes:
        replacement: of the influence that reaches the ends, tokens and errors, the share of tokens.
        completeness: of what reaches each node, the share that is not of errors, averaged by influence.
    """

    replacement: float
    completeness: float


def scores(effects: Effects) -> Scores:
    """The two scores of a graph before it is pruned."""
    found = influence(effects)
    errors, tokens = found[effects.errors].sum(), found[len(found) - effects.n_tokens :].sum()
    share = row_sums(effects.weights[:, effects.errors]) / row_sums(effects.weights).clamp(min=_SMALLEST)
    amounts = effects.amounts(found)
    whole = found.sum() + effects.logit_weights.double().sum()
    return Scores(float(tokens / (tokens + errors)), float(1 - (share * amounts).sum() / whole))
