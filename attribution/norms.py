"""Norms, frozen at an actual activation.

A norm is frozen at `x` by keeping its scale: x' ↦ w ⊙ x' / rms(x), and x' ↦ w ⊙ (x' − mean(x')) / std(x) + b for a
LayerNorm. At x' = x this is the norm itself; everywhere it is affine, so that its gradient is a product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A norm of the last axis. All tensors are in the dtype of the attribution (float32 or float64).

    Attributes:
        weight: what the normed value is multiplied with (for Gemma 1 + w).
        bias: None but for a LayerNorm.
        eps: added to the variance.
        centred: whether the mean is taken off (LayerNorm).
    """

    weight: Float[Tensor, "width"]
    bias: Float[Tensor, "width"] | None
    eps: float
    centred: bool

    def at(self, x: Float[Tensor, "*rows width"]) -> "FrozenNorm":
        """The norm with its scale frozen at `x`."""
        x = x.to(self.weight.dtype)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return FrozenNorm(self, torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


@dataclass(frozen=True)
class FrozenNorm:
    """A norm whose scale is constant: an affine map of the rows that it was frozen at.

    Attributes:
        norm: the norm itself.
        norm_scale: 1 / rms (or 1 / standard deviation) of each row.
    """

    norm: Norm
    norm_scale: Float[Tensor, "*rows 1"]

    def __call__(self, x: Float[Tensor, "*more width"]) -> Float[Tensor, "*more width"]:
        """Apply it; `x` may have further axes in front of the rows."""
        y = self.scaled(x) * self.norm.weight
        return y if self.norm.bias is None else y + self.norm.bias

    def scaled(self, x: Float[Tensor, "*more width"]) -> Float[Tensor, "*more width"]:
        """The same before weight and bias."""
        if self.norm.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.norm_scale

    def backward(self, grad: Float[Tensor, "*more width"]) -> Float[Tensor, "*more width"]:
        """The gradient with respect to its input, given that with respect to its output."""
        grad = grad * self.norm_scale * self.norm.weight
        return grad - grad.mean(-1, keepdim=True) if self.norm.centred else grad

    def rows(self, index: list[int]) -> "FrozenNorm":
        """The same, for some of its rows (the axis before the last)."""
        return FrozenNorm(self.norm, self.norm_scale[..., index, :])
