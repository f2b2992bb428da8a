"""nnsight's traced backward through one module.

1. Trace the module alone; its input holds one row per interpolation point.
2. Choose the path of the gradient: what is detached inside, what takes the place of the output.
3. Compute the objective on the output, and ask for the gradient inside its traced backward.
"""

import threading
from collections.abc import Callable
from typing import Any

import nnsight
import torch
from torch import Tensor

# a traced backward patches torch.Tensor.grad for the whole process: models take turns
_GRADIENTS = threading.Lock()

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of the module's output: the scalar to differentiate, and the tensor with respect to which: detached there, or on."""


def traced_gradient(module: Any, x: Tensor, objective: Objective) -> Tensor:
    """The gradient that `objective` asks for, of a module's output at `x`."""
    with _GRADIENTS, torch.enable_grad():
        with module.trace(x):
            value, wanted = objective(module.output)
            with value.backward():  # pyright: ignore[reportOptionalContextManager]  nnsight's
                grad = nnsight.save(wanted.grad)
    return grad


def traced_input_gradient(
    module: Any,
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    detached: Any = None,
    output: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The gradient of a scalar of a module's output with respect to its input.

    Args:
        detached: a part of the module that no gradient passes.
        output: what takes the place of the module's output, as a function of its input.
    """
    x = x.detach().requires_grad_()
    with _GRADIENTS, torch.enable_grad():
        with module.trace(x):
            if detached is not None:
                detached.output = detached.output.detach()
            if output is not None:
                module.output = output(x)
            value = objective(module.output)
            with value.backward():  # pyright: ignore[reportOptionalContextManager]  nnsight's
                grad = nnsight.save(x.grad)
    return grad
