"""Some heads of one layer, at the activations of one sample."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.attention import attention_pattern, attention_scores, repeat_heads
from attribution.model.block import Block
from attribution.norms import Norm
from attribution.paths.pieces import pieces


@dataclass(frozen=True)
class HeadsAt:
    """Some heads of a layer at the sample's activations: what the three attention nodes hold fixed.

    Attributes:
        resid: the stream that the layer reads, at positions 0 … key − 1, in the dtype of the attribution.
        queries: the positions whose writes are scored.
        q_raw, k_raw: before norm and rotary; q of the chosen heads, k of all key/value heads.
        value_grad: ∂O/∂A = ⟨G_i, W_O^h v_j⟩.
        z_grad: ∂O/∂z.
    """

    block: Block
    resid: Float[Tensor, "key d_model"]
    queries: list[int]
    heads: list[int]
    q_raw: Float[Tensor, "query heads d_head"]
    k_raw: Float[Tensor, "key kv_heads d_head"]
    value_grad: Float[Tensor, "heads query key"]
    z_grad: Float[Tensor, "query heads d_head"]
    hidden: Tensor = field(repr=False)

    @classmethod
    def of(cls, block: Block, resid: Tensor, queries: list[int], heads: list[int], z_grad: Tensor) -> "HeadsAt":
        """Project the stream by the layer's own modules."""
        q, k, v = block.project(resid)
        dtype, count = block.dtype, block.dims.n_heads
        v = repeat_heads(v, heads, count).to(dtype)
        return cls(
            block,
            resid.to(block.device, dtype),
            queries,
            heads,
            q[queries][:, heads].to(dtype),
            k.to(dtype),
            torch.einsum("qhd,khd->hqk", z_grad, v),
            z_grad,
            block.hidden(queries, len(resid)).to(block.device),
        )

    def query(self, raw: Float[Tensor, "*point query heads d_head"]) -> Tensor:
        """q as it meets the keys: its norm frozen at the actual q, then rotary."""
        return self.block.rotate(_frozen(self.block.query_norm, self.q_raw, raw), self.queries)

    def key(self, raw: Float[Tensor, "*point key kv_heads d_head"]) -> Float[Tensor, "*point key met d_head"]:
        """k as the chosen heads meet it: its norm frozen at the actual k, then rotary; what is shared is there once."""
        return self._turned_key(self.k_raw, raw)[..., self.block.kv_heads_of(self.heads), :]

    def key_backward(self, grad: Float[Tensor, "key heads d_head"]) -> Float[Tensor, "key heads d_head"]:
        """From the gradient at the k that each head meets to that at the projection's output, for each head alone."""
        return _transposed(lambda raw: self._turned_key(self.repeated(self.k_raw), raw), grad)

    def query_backward(self, grad: Float[Tensor, "query heads d_head"]) -> Float[Tensor, "query heads d_head"]:
        """The same for q."""
        return _transposed(self.query, grad)

    def _turned_key(self, actual: Tensor, raw: Tensor) -> Tensor:
        return self.block.rotate(_frozen(self.block.key_norm, actual, raw), list(range(len(actual))))

    def repeated(self, kv: Float[Tensor, "*rows kv_heads d_head"]) -> Float[Tensor, "*rows heads d_head"]:
        """The key/value head of each chosen head."""
        return repeat_heads(kv, self.heads, self.block.dims.n_heads)

    def scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "*point heads query key"]:
        """The scores of turned q and k."""
        return attention_scores(q, k, self.block.scaling)

    def pattern(self, scores: Float[Tensor, "*point heads query key"]) -> Float[Tensor, "*point heads query key"]:
        """The pattern of scores."""
        return attention_pattern(scores, self.hidden, self.block.softcap)

    def writes(self, scores: Float[Tensor, "*point heads query key"]) -> Float[Tensor, "*point heads"]:
        """⟨G, what each head writes⟩ with these scores, and the actual v."""
        # einsum would copy both into another layout, here and in the backward
        return torch.linalg.vecdot(self.pattern(scores).flatten(-2), self.value_grad.flatten(-2))

    def projected(self, name: str, normed: Float[Tensor, "*point pos d_model"]) -> Tensor:
        """The projection q, k or v of normed rows by the layer's dense module."""
        module = self.block.module(self.block.family.projections[name].module)._module
        return self.cut(name, module(normed.to(self.block.weight_dtype)))

    def cut(self, name: str, projected: Tensor) -> Float[Tensor, "*point pos some d_head"]:
        """The output of a projection: the chosen heads of q, all key/value heads of k and v."""
        cut = self.block.cut(name, projected).to(self.block.dtype)
        return cut[..., self.heads, :] if name == "q" else cut

    def through_weight(self, name: str, grad: Float[Tensor, "pos heads d_head"]) -> Float[Tensor, "heads pos d_model"]:
        """From the gradient at the output of a projection to that at its input, one product per head."""
        weight = self.block.weight(name).to(self.block.dtype)
        if name == "q":
            weight = weight[self.heads]
        else:
            weight = weight[[head // (self.block.dims.n_heads // len(weight)) for head in self.heads]]
        return torch.einsum("phd,hde->hpe", grad, weight)

    def at_queries(self, rows: list[int]) -> "HeadsAt":
        """The same for some of the queries."""
        return HeadsAt(
            self.block,
            self.resid,
            [self.queries[row] for row in rows],
            self.heads,
            self.q_raw[rows],
            self.k_raw,
            self.value_grad[:, rows],
            self.z_grad[rows],
            self.hidden[rows],
        )

    def in_pieces(self, points: int) -> Iterator[tuple[list[int], "HeadsAt"]]:
        """The queries in pieces whose patterns, one per point, fit."""
        for rows in pieces(len(self.queries), points * len(self.heads) * len(self.resid)):
            yield rows, self.at_queries(rows)


def _transposed(linear: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    """The gradient at the input of a linear map, given that at its output, of one shape."""
    with torch.enable_grad():
        value = torch.zeros_like(grad, requires_grad=True)
        return torch.autograd.grad(linear(value), value, grad)[0]


def _frozen(norm: Norm | None, actual: Tensor, value: Tensor) -> Tensor:
    return value if norm is None else norm.at(actual)(value)
