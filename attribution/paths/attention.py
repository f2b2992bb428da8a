"""The paths of `attn_q`, `attn_k`, `attn_v` and `attn_a`: one head sees one of its inputs vary.

All heads of a layer share one backward to their scores, where the interpolation points are summed. What lies between
the scores and the stream is linear, and one product per head. `HeadsAt` holds what is fixed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.integrate import Points
from attribution.model.traced_backward import traced_gradient
from attribution.norms import FrozenNorm
from attribution.paths.heads import HeadsAt
from attribution.paths.pieces import normed_rows


class QueryPath:
    """`attn_q`: q of each head varies, k and v are held."""

    def __init__(self, at: HeadsAt) -> None:
        self.at, self.x = at, at.resid[at.queries]
        self._frozen = at.block.attn_norm.at(self.x)
        self._key = at.key(at.k_raw)
        self._seen = self._key.repeat_interleave(len(at.heads) // self._key.shape[1], dim=1)  # one k for each head

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "heads chosen d_model"]:
        """See `attribution.integrate.Path`."""
        return self.complete_gradient(points)[:, rows]

    def complete_gradient(self, points: Points) -> Float[Tensor, "heads pos d_model"]:
        """See `attribution.integrate.Path`."""
        parts = []
        module = self.at.block.module(self.at.block.family.projections["q"].module)
        for rows, at in self.at.in_pieces(len(points.alphas)):
            frozen = self._frozen.rows(rows)

            def objective(projected: Tensor, at: HeadsAt = at) -> tuple[Tensor, Tensor]:
                scores = at.scores(at.query(at.cut("q", projected)), self._key).detach().requires_grad_()
                return points.weigh(at.writes(scores)).sum(), scores

            normed = normed_rows(points, frozen, self.x[rows])
            grad = traced_gradient(module, normed.to(at.block.weight_dtype), objective).sum(0)
            grad = at.query_backward(torch.einsum("hqk,khd->qhd", grad, self._seen) * at.block.scaling)
            parts.append(frozen.backward(at.through_weight("q", grad)))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "heads"]:
        """See `attribution.integrate.Path`."""
        raw = self.at.projected("q", self._frozen(alpha * self.x))
        return _sum_over_queries(self.at, lambda rows, at: at.writes(at.scores(at.query(raw[rows]), self._key)))


class KeyPath:
    """`attn_k`: the k that each head sees varies, q and v are held."""

    def __init__(self, at: HeadsAt) -> None:
        self.at, self.x = at, at.resid
        self._frozen = at.block.attn_norm.at(self.x)

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "heads chosen d_model"]:
        """See `attribution.integrate.Path`."""
        return _through(self.at, "k", self._frozen, self._key_gradient(points), rows)

    def complete_gradient(self, points: Points) -> Float[Tensor, "heads pos d_model"]:
        """See `attribution.integrate.Path`."""
        return _through(self.at, "k", self._frozen, self._key_gradient(points))

    def _key_gradient(self, points: Points) -> Float[Tensor, "key heads d_head"]:
        at = self.at
        module = at.block.module(at.block.family.projections["k"].module)
        normed = normed_rows(points, self._frozen, self.x).to(at.block.weight_dtype)
        total = torch.zeros_like(at.repeated(at.k_raw))
        for _, part in at.in_pieces(len(points.alphas)):
            query = part.query(part.q_raw)

            def objective(projected: Tensor, at: HeadsAt = part, query: Tensor = query) -> tuple[Tensor, Tensor]:
                scores = at.scores(query, at.key(at.cut("k", projected))).detach().requires_grad_()
                return points.weigh(at.writes(scores)).sum(), scores

            grad = traced_gradient(module, normed, objective).sum(0)
            total += torch.einsum("hqk,qhd->khd", grad, query) * at.block.scaling
        return at.key_backward(total)

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "heads"]:
        """See `attribution.integrate.Path`."""
        key = self.at.key(self.at.projected("k", self._frozen(alpha * self.x)))
        return _sum_over_queries(self.at, lambda rows, at: at.writes(at.scores(at.query(at.q_raw), key)))


class ValuePath:
    """`attn_v`: the v of each head's key/value head varies, the pattern is held. Linear: its gradient is a product."""

    def __init__(self, at: HeadsAt) -> None:
        self.at, self.x = at, at.resid
        self._frozen = at.block.attn_norm.at(self.x)
        self._value_grad = torch.zeros_like(at.repeated(at.k_raw))  # of the v that each head sees
        key = at.key(at.k_raw)
        for _, part in at.in_pieces(1):
            pattern = part.pattern(part.scores(part.query(part.q_raw), key))
            self._value_grad += torch.einsum("hqk,qhd->khd", pattern, part.z_grad)

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "heads chosen d_model"]:
        """See `attribution.integrate.Path`; the same for every rule."""
        return _through(self.at, "v", self._frozen, self._value_grad, rows)

    def complete_gradient(self, points: Points) -> Float[Tensor, "heads pos d_model"]:
        """See `attribution.integrate.Path`."""
        return _through(self.at, "v", self._frozen, self._value_grad)

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "heads"]:
        """See `attribution.integrate.Path`."""
        value = self.at.repeated(self.at.projected("v", self._frozen(alpha * self.x)))
        return torch.einsum("khd,khd->h", value.double(), self._value_grad.double())


class PatternPath:
    """`attn_a`: q and k vary together, v is held; the sum of the paths of `attn_q` and `attn_k`."""

    def __init__(self, at: HeadsAt) -> None:
        self.at, self.x = at, at.resid
        self._query, self._key = QueryPath(at), KeyPath(at)
        self._frozen = at.block.attn_norm.at(self.x)

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "heads chosen d_model"]:
        """See `attribution.integrate.Path`."""
        return self.complete_gradient(points)[:, rows]

    def complete_gradient(self, points: Points) -> Float[Tensor, "heads pos d_model"]:
        """See `attribution.integrate.Path`."""
        total = self._key.complete_gradient(points)
        total[:, self.at.queries] += self._query.complete_gradient(points)
        return total

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "heads"]:
        """See `attribution.integrate.Path`."""
        normed = self._frozen(alpha * self.x)
        key, raw = self.at.key(self.at.projected("k", normed)), self.at.projected("q", normed)[self.at.queries]
        return _sum_over_queries(self.at, lambda rows, at: at.writes(at.scores(at.query(raw[rows]), key)))


def _through(
    at: HeadsAt, name: str, frozen: FrozenNorm, grad: Float[Tensor, "pos heads d_head"], rows: list[int] | None = None
) -> Float[Tensor, "heads chosen d_model"]:
    """From the output of a projection back to the stream, at some positions or all."""
    if rows is not None:
        grad, frozen = grad[rows], frozen.rows(rows)
    return frozen.backward(at.through_weight(name, grad))


def _sum_over_queries(at: HeadsAt, writes: Callable[[list[int], HeadsAt], Tensor]) -> Float[Tensor, "heads"]:
    """⟨G, what each head writes⟩ summed over the queries, in float64."""
    total = torch.zeros(len(at.heads), dtype=torch.float64, device=at.resid.device)
    for rows, part in at.in_pieces(1):
        total += writes(rows, part).double()
    return total
