"""What must hold before a quantised model gives gradients; run once, after the first forward, on one layer.

1. Each quantised layer computes what its dense twin computes, up to the rounding of the kernel.
2. The gradient traced through a twin says what the running kernel does: for a linear layer and any step d,
   ⟨G, layer(x + d) − layer(x)⟩ = ⟨gradient, d⟩. The step is along the gradient and as long as x.
3. The gradient traced through the twin of the MLP is that of plain autograd through another one.
"""

from typing import Any

import torch
from torch import Tensor

from attribution.errors import SightlineError
from attribution.model.families import Family
from attribution.model.traced import TracedModel
from attribution.model.traced_backward import traced_input_gradient
from attribution.model.twins import DenseLinear, Twins

_ROWS = 4
_TOLERANCE_TRACED = 1e-4


def kernel_tolerance(quantization: str | None) -> float:
    """How far a kernel may be from its dequantised weights: some compute in bfloat16, whatever the dtype of the model.

    Those of int8 round the activations to eight bits, too.
    """
    return 0.06 if quantization == "int8" else 0.03


def gradient_refusal(model: TracedModel) -> str | None:
    """Why a quantised model gives no gradients, in a sentence; None when they hold."""
    assert model.family is not None
    assert model.twins is not None
    try:
        return _wrong(model, model.twins, model.family)
    except SightlineError as error:
        return error.message
    except Exception as error:  # what cannot even be checked does not hold
        return f"they cannot be checked: {type(error).__name__}: {error}"


def _wrong(model: TracedModel, twins: Twins, family: Family) -> str | None:
    index = model.dimensions.n_layers // 2
    base = f"{family.layers}.{index}"
    envoy, own = twins.layer(index), model.module.get_submodule(base)
    tolerance = kernel_tolerance(model.quantization)
    for name, part in envoy._module.named_modules():
        if isinstance(part, DenseLinear):
            kernel = own.get_submodule(name)
            error = _forward_error(kernel, part, model.dtype)
            if not error <= tolerance:
                return f"{base}.{name} differs from its dequantised weights by {error:.1e} of its output"
            error = _step_error(kernel, envoy.get(name), part, model.dtype)
            if not error <= tolerance:
                return f"the gradient of {base}.{name} is off by {error:.1e} from what a step along it does"
    shape = (_ROWS, model.dimensions.d_model)
    x, grad = (_noise(*shape, seed).to(next(own.parameters()).device, model.work_dtype) for seed in (0, 1))
    error = _traced_error(envoy.get(family.mlp), twins.plain(f"{base}.{family.mlp}"), x, grad)
    return None if error <= _TOLERANCE_TRACED else f"the traced gradient of {base}.{family.mlp} is off by {error:.1e}"


@torch.no_grad()
def _forward_error(kernel: Any, twin: DenseLinear, dtype: torch.dtype) -> float:
    x = _noise(_ROWS, twin.weight.shape[1]).to(twin.weight.device, dtype)
    return _distance(kernel(x), twin(x.to(twin.weight.dtype)))


def _step_error(kernel: Any, envoy: Any, twin: DenseLinear, dtype: torch.dtype) -> float:
    weight = twin.weight
    x, grad = (_noise(_ROWS, width).to(weight) for width in reversed(weight.shape))
    found = traced_input_gradient(envoy, x, lambda out: (out * grad).sum())
    step = found * (x.norm() / found.norm())
    with torch.no_grad():
        moved = kernel((x + step).to(dtype)).to(grad) - kernel(x.to(dtype)).to(grad)
    return float(((moved * grad).sum() / (found * step).sum() - 1).abs())


def _traced_error(envoy: Any, plain: Any, x: Tensor, grad: Tensor) -> float:
    found = traced_input_gradient(envoy, x, lambda out: (out * grad).sum())
    with torch.enable_grad():
        x = x.requires_grad_()
        (expected,) = torch.autograd.grad((plain(x) * grad).sum(), x)
    return _distance(found, expected)


def _noise(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + width))


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected) - expected).norm() / expected.norm().clamp_min(1e-30))
