"""Heads by what they look at: distances of attention patterns, clusters of heads, names for the clusters.

1. The distance of two heads is the Jensen–Shannon divergence of their rows, averaged over rows and samples. Logarithms
   for every pair would take minutes for a thousand heads. But x·ln x is an integral over exponentials, up to a linear
   part that cancels: x·ln x = ∫ (e^(−tx) − 1 + …) dt/t², and so

       JS(p, q) = ½ Σ ∫ (e^(−t·p/2) − e^(−t·q/2))² dt/t²

   is a squared distance of vectors that each head has on its own, and all pairs are one matrix product. The trapezoid
   rule over ln t converges exponentially (as in Braess and Hackbusch, Approximation of 1/x by exponential sums, 2005).
2. Heads are joined by average linkage, and the tree is cut at a distance.
3. A group is named for the key that its heads look at most, query by query.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as average_linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument

Head = tuple[int, int]
"""(layer, head)"""

_OFF_BY = 0.01  # a row in bfloat16 sums to 1 within 0.4 %
_POINTS, _FIRST_POINT = 32, 2.0**-7  # of the integral
_BLOCK = 128  # heads that are multiplied with all others at a time
_AT_ONCE = 2**22  # numbers of all heads that are held at a time, beside the patterns


def compute_js_matrix(
    patterns: Mapping[Head, Float[Tensor, "*rows key"]] | Float[Tensor, "head *rows key"],
) -> Float[Tensor, "head head"]:
    """Jensen–Shannon divergences in nats between the rows of every two heads, averaged over rows.

    Exactly symmetric, exactly 0 on the diagonal, at most ln 2, and within 2e-5 of the divergence. Products are in
    float32 (float64 for patterns in float64), their sums in float64. Runs where the patterns are, and holds some 50 MB
    beside them.

    Args:
        patterns: one pattern per head, all of one shape, in the order of the result; every row is a distribution over
            the keys, which may be padded with 0.

    Raises:
        InvalidArgument: there is no head; a row is no distribution: negative, not finite, or its sum is not 1.
        ShapeMismatch: the patterns differ in shape.
    """
    rows = _checked_rows(patterns)
    count, keys = rows[0].shape
    dtype = torch.float64 if any(one.dtype == torch.float64 for one in rows) else torch.float32
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    at_once = max(1, _AT_ONCE // (len(rows) * keys))
    for start in range(0, count, at_once):
        stacked = torch.stack([one[start : start + at_once] for one in rows]).to(dtype)
        weights = (stacked / stacked.sum(-1, keepdim=True)).flatten(1)
        weights = weights[:, (weights > 0).any(0)]  # what nobody looks at, such as the future, is 0 in all
        for piece in weights.split(max(1, _AT_ONCE // (len(rows) * _POINTS)), dim=1):
            _add_products(products, _features(piece))
    norms = products.diagonal()
    upper = (norms[:, None] + norms - 2 * products).div(count).clamp(0, log(2)).triu(1)
    return upper + upper.T


def _features(weights: Float[Tensor, "head entry"]) -> Float[Tensor, "head feature"]:
    """Vectors whose squared distances are the divergences: √(w/2) · (e^(−t·p/2) − 1) for every point t of the integral.

    A geometric sum of the points that are left out on either side goes to the first and the last one. Every t is twice
    the one before, so that one exponential serves all of them: e^2a − 1 = (e^a − 1)(e^a − 1 + 2).
    """
    step = log(2)
    found = weights.new_empty(len(weights), _POINTS, weights.shape[1])
    grown = torch.expm1(weights * (-_FIRST_POINT / 2))
    for point in range(_POINTS):
        ends = 2 if point in (0, _POINTS - 1) else 1  # 1 + 1/2 + 1/4 + …
        weight = ends * step / (_FIRST_POINT * 2**point)
        torch.mul(grown, (weight / 2) ** 0.5, out=found[:, point])
        grown = grown * (grown + 2)
    return found.flatten(1)


def _add_products(products: Tensor, features: Float[Tensor, "head feature"]) -> None:
    """Add the products of every two heads, on and above the diagonal."""
    for start in range(0, len(features), _BLOCK):
        products[start : start + _BLOCK, start:] += features[start : start + _BLOCK] @ features[start:].T


def _checked_rows(patterns: Mapping[Head, Tensor] | Tensor) -> list[Float[Tensor, "row key"]]:
    """The rows of every head, one after the other."""
    stacked = isinstance(patterns, Tensor)
    named = dict(enumerate(patterns)) if stacked else dict(patterns)
    if not named:
        raise InvalidArgument("patterns is empty; it holds at least one head", param="patterns")
    shape = next(iter(named.values())).shape
    for head, pattern in named.items():
        if pattern.shape != shape or pattern.dim() < 2 or not pattern.numel():
            expected = f"{list(shape)}, as the first head" if pattern.shape != shape else "[samples, query, key]"
            raise checks.mismatch("patterns", f"the shape {list(pattern.shape)} at head {head}", expected)
        _check_distributions(head, pattern)
    return [pattern.detach().flatten(0, -2) for pattern in named.values()]


def _check_distributions(head: object, pattern: Tensor) -> None:
    sums = pattern.sum(-1, dtype=torch.float64)
    wrong = ((sums - 1).abs() <= _OFF_BY).logical_not() | (pattern < 0).any(-1)  # NaN is in no range
    if not wrong.any():
        return
    row = wrong.nonzero()[0].tolist()
    values = pattern[tuple(row)]
    least = float(values.min())
    found = f"it sums to {float(sums[tuple(row)]):.4g}" if not least < 0 else f"it holds {least:.4g}"
    raise InvalidArgument(
        f"patterns at head {head}, row {row} is no distribution: {found}; attention is positive and sums to 1 (an "
        "attribution is none: cluster the patterns themselves)",
        param="patterns",
    )


@dataclass(frozen=True)
class ClusterMetrics:
    """How well groups are apart.

    Attributes:
        groups: how many there are.
        silhouette: mean over heads of (b − a) / max(a, b), with a the mean distance to the own group and b that to the
            nearest other one; a head alone counts 0. None for one group, or when every head is alone.
        within: mean distance of two heads of a group; None when every head is alone.
        between: mean distance of two heads of different groups; None for one group.
    """

    groups: int
    silhouette: float | None
    within: float | None
    between: float | None


def cluster_heads(
    patterns: Mapping[Head, Float[Tensor, "*rows key"]],
    dist_fn: Callable[[Mapping[Head, Tensor]], Tensor] = compute_js_matrix,
    threshold: float = 0.5,
) -> tuple[list[list[Head]], ClusterMetrics, np.ndarray, Float[Tensor, "head head"]]:
    """Groups of heads with alike patterns: average linkage, cut where groups are farther apart than `threshold`.

    Args:
        patterns: as for `compute_js_matrix`.
        dist_fn: gives the distances of all heads, in the order of `patterns`.
        threshold: in the unit of the distances; Jensen–Shannon divergences are at most ln 2 = 0.693 nats.

    Returns:
        groups: the largest first, in each the heads in order; metrics; linkage: scipy's matrix `[heads − 1, 4]`, its
        leaves in the order of `patterns`; distances.

    Raises:
        InvalidArgument: the threshold is negative or not finite, or what `dist_fn` gives are no distances.
        ShapeMismatch: it gives no square matrix of all heads.
    """
    if not (isfinite(threshold) and threshold >= 0):
        raise InvalidArgument(f"threshold is {threshold}; it is a distance, 0 or more", param="threshold")
    heads = list(patterns)
    distances = _checked_distances(dist_fn(patterns), len(heads))
    square = distances.cpu().numpy()
    if len(heads) == 1:
        return [heads], ClusterMetrics(1, None, None, None), np.empty((0, 4)), distances
    tree = average_linkage(squareform(square, checks=False), method="average")
    numbers = fcluster(tree, threshold, criterion="distance")
    groups = [sorted(heads[i] for i in np.flatnonzero(numbers == one)) for one in np.unique(numbers)]
    return sorted(groups, key=lambda group: (-len(group), group)), _metrics(square, numbers), tree, distances


def _checked_distances(distances: Tensor, count: int) -> Tensor:
    distances = checks.shape("dist_fn", torch.as_tensor(distances), (count, count), "heads, heads").double()
    fit = distances.isfinite().all() and (distances >= 0).all() and not distances.diagonal().any()
    if not fit or not torch.allclose(distances, distances.T):
        raise InvalidArgument(
            "dist_fn gives no distances; they are finite, not negative, symmetric, and 0 from a head to itself",
            param="dist_fn",
        )
    return distances


def _metrics(distances: np.ndarray, numbers: np.ndarray) -> ClusterMetrics:
    """The metrics of groups given as a number per head."""
    count = len(numbers)
    member = (numbers[:, None] == np.unique(numbers)).astype(float)
    same = member @ member.T > 0
    pairs = np.triu(np.ones((count, count), dtype=bool), 1)
    means = [float(distances[choice].mean()) if choice.any() else None for choice in (pairs & same, pairs & ~same)]
    groups = member.shape[1]
    silhouette = _silhouette(distances, member) if 1 < groups < count else None
    return ClusterMetrics(groups, silhouette, *means)


def _silhouette(distances: np.ndarray, member: np.ndarray) -> float:
    sizes = member.sum(0)
    to_groups = distances @ member
    own_size = member @ sizes
    own = (to_groups * member).sum(1) / np.maximum(own_size - 1, 1)
    other = np.where(member > 0, np.inf, to_groups / sizes).min(1)
    larger = np.maximum(own, other)
    scores = np.divide(other - own, larger, out=np.zeros_like(own), where=(larger > 0) & (own_size > 1))
    return float(scores.mean())


@dataclass(frozen=True)
class SourceLabel:
    """What the heads of a group look at.

    Attributes:
        name: the name that the key with the most attention has most often.
        share: the share of all heads, samples and queries where it is that one.
        mass: the mean attention that this key gets there.
    """

    name: str
    share: float
    mass: float

    def __str__(self) -> str:
        return f"{self.name} ({self.share:.0%})"


Names = Sequence[Sequence[str]] | Callable[[int, int, int], str]
"""A name per sample and key, or a function of (sample, query, key), all three counted in the pattern."""


def offset_names(queries: Sequence[Sequence[int]]) -> Callable[[int, int, int], str]:
    """Names by how far a key lies from its query, such as "-3"; the query itself is "0".

    Args:
        queries: for each sample the token positions of the pattern's queries; its keys are all positions from 0.
    """
    return lambda sample, query, key: f"{offset:+d}" if (offset := key - queries[sample][query]) else "0"


def label_by_source(
    groups: Sequence[Sequence[Head]], patterns: Mapping[Head, Float[Tensor, "*samples query key"]], names: Names
) -> list[SourceLabel]:
    """For each group the typical source of its heads: at each query, the name of the key that gets the most attention.

    Args:
        groups: as from `cluster_heads`.
        patterns: `[samples, query, key]`, or `[query, key]` for one sample.
        names: for example the tokens of every sample, names of a puzzle's cells, or `offset_names`.

    Raises:
        InvalidArgument: a group is empty, or has a head without a pattern.
        ShapeMismatch: a key has no name.
    """
    labels = []
    for group in groups:
        votes, mass = Counter[str](), defaultdict[str, float](float)
        for head in group:
            if head not in patterns:
                raise InvalidArgument(f"patterns has no head {head}, which is in a group", param="patterns")
            pattern = patterns[head][None] if patterns[head].dim() == 2 else patterns[head]
            values, keys = pattern.max(-1)
            places = zip(np.ndindex(*keys.shape), keys.flatten().tolist(), values.flatten().tolist(), strict=True)
            for (sample, query), key, value in places:
                name = _name(names, sample, query, key)
                votes[name] += 1
                mass[name] += value
        if not votes:
            raise InvalidArgument("groups has an empty group; each has at least one head", param="groups")
        ((name, count),) = votes.most_common(1)
        labels.append(SourceLabel(name, count / votes.total(), mass[name] / count))
    return labels


def _name(names: Names, sample: int, query: int, key: int) -> str:
    if callable(names):
        return names(sample, query, key)
    if sample >= len(names) or key >= len(names[sample]):
        raise checks.mismatch("names", f"no name for key {key} of sample {sample}", "one per key that is looked at")
    return names[sample][key]
