"""The paths of `mlp_i` and `mlp_g`."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.integrate import Points
from attribution.model.block import Block
from attribution.model.traced_backward import traced_input_gradient
from attribution.paths.pieces import normed_rows, pieces


class MLPPath:
    """`mlp_i` and `mlp_g`: O = Σ_i ⟨G_i, mlp(Ñ(mid_i))⟩, one branch at a time, the other detached at the same α."""

    def __init__(self, block: Block, mid: Float[Tensor, "pos d_model"], grad: Tensor, branch: str) -> None:
        self.block, self.x = block, mid.to(block.device, block.dtype)
        self._frozen = block.mlp_norm.at(self.x)
        self._mlp = block.module(block.family.mlp)
        other = {"mlp_i": block.family.gate, "mlp_g": block.family.up}[branch]
        self._detached = None if other is None else block.module(other)
        self._grad = grad
        post = block.norm(block.family.mlp_post_norm)
        if post is not None:  # frozen: what the MLP writes is scaled, and so is G
            self._grad = grad * post.at(self._writes(1.0)).norm_scale * post.weight

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "1 chosen d_model"]:
        """See `attribution.integrate.Path`."""
        return self._gradient(points, self._detached)[:, rows]

    def complete_gradient(self, points: Points) -> Float[Tensor, "1 pos d_model"]:
        """Both branches: neither is complete alone."""
        return self._gradient(points, None)

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "1"]:
        """See `attribution.integrate.Path`."""
        return (self._writes(alpha).double() * self._grad.double()).sum()[None]

    def _gradient(self, points: Points, detached: Any) -> Float[Tensor, "1 pos d_model"]:
        parts, width = [], self.block.mlp_width
        for rows in pieces(len(self.x), len(points.alphas) * width):
            frozen, grad = self._frozen.rows(rows), self._grad[rows]
            normed = normed_rows(points, frozen, self.x[rows])
            found = traced_input_gradient(
                self._mlp,
                normed.to(self.block.weight_dtype),
                lambda out, grad=grad: (points.weigh(out.to(grad.dtype)) * grad).sum(),
                detached=detached,
            )
            parts.append(frozen.backward(found.to(self.block.dtype).sum(0)))
        return torch.cat(parts)[None]

    @torch.no_grad()
    def _writes(self, alpha: float) -> Float[Tensor, "pos d_model"]:
        normed = self._frozen(alpha * self.x).to(self.block.weight_dtype)
        return self._mlp._module(normed[None])[0].to(self.block.dtype)
