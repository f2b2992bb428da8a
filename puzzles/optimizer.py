"""Muon for matrices on a CPU: momentum, then the nearest semi-orthogonal matrix by Newton-Schulz iteration.

``torch.optim.Muon`` iterates in bfloat16, one matrix at a time; where the CPU has no bfloat16 units, that
takes longer than this small model's forward and backward. Here it is float32, over stacks of matrices of
equal shape. Method and coefficients: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural
networks" (2024).
"""

from collections import defaultdict

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(stack: Tensor, steps: int = 5) -> Tensor:
    """``[count, rows, columns]`` with every matrix's singular values pushed towards 1."""
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide if stack.shape[1] <= stack.shape[2] else wide.mT


class Muon(torch.optim.Optimizer):
    """Steps of size ``lr * sqrt(max(1, rows / columns))`` along the orthogonalized Nesterov momentum."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; matrices of equal shape go through the iteration together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    direction = self._nesterov(matrix, matrix.grad, group["momentum"])
                    by_shape[matrix.shape].append((matrix, direction))
            for (rows, columns), pairs in by_shape.items():
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                directions = orthogonalize(torch.stack([direction for _, direction in pairs]))
                for (matrix, _), direction in zip(pairs, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=scale)

    def _nesterov(self, matrix: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        average = state.setdefault("average", torch.zeros_like(matrix))
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)
