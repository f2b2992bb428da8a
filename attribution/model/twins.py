"""Dense twins of the layers of a quantised model: what gradients are traced through.

A kernel of quantised weights may have no gradient, or a wrong one once it has repacked its weights. So a twin of a
layer has the layer's own modules, but in place of each linear one a `DenseLinear`, whose weight is dequantised when it
is needed (of GPTQ from the files of the checkpoint, whatever became of the tensors in memory).
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float
from nnsight import NNsight
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from attribution.errors import GradientsRefused
from attribution.model.dequantise import dense_weight, is_bitsandbytes, is_dense
from attribution.model.quantised import Scheme, Snapshot

TWIN_BYTES = 4 * 1024**3
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_WRAPPERS = ("forward", "__nnsight__", "_old_forward", "_hf_hook")  # what nnsight and accelerate put on an instance


class DenseLinear(torch.nn.Module):
    """A linear layer whose weight is asked for, not held."""

    def __init__(self, twins: "Twins", path: str, bias: Float[Tensor, "out"] | None) -> None:
        super().__init__()
        self.bias: Tensor | None
        self._twins, self._path = twins, path
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantised weight."""
        return self._twins.weight(self._path)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """x Wᵀ + b."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Twins:
    """The twins of one model, used on its thread alone. Dense weights are kept up to `most_bytes`, last used last out.

    Args:
        module: the transformers model.
        dtype: of the dense weights, float32 or float64: gradients in float16 would underflow.
    """

    def __init__(
        self, module: Any, layers: str, scheme: Scheme, snapshot: Snapshot, dtype: torch.dtype, most_bytes: int
    ) -> None:
        self._module, self._layers, self._scheme, self._snapshot = module, layers, scheme, snapshot
        self._dtype, self._most_bytes = dtype, most_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._envoys: dict[int, Any] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the dense weights that are kept now."""
        return sum(weight.numel() * weight.element_size() for weight in self._kept.values())

    def layer(self, index: int) -> Any:
        """The envoy of the twin of a layer.

        Raises:
            GradientsRefused: it has a part that cannot be dequantised.
        """
        if index not in self._envoys:
            self._envoys[index] = NNsight(self.plain(f"{self._layers}.{index}"))
        return self._envoys[index]

    def plain(self, path: str) -> torch.nn.Module:
        """A twin of any part of the model, without an envoy; norms are shared with the model, not copied."""
        module = self._module.get_submodule(path)
        if not module._modules and not self._is_shared(module):
            return DenseLinear(self, path, self._bias(module, path)).eval()
        twin = copy.copy(module)
        for name in _WRAPPERS:
            twin.__dict__.pop(name, None)
        for name in _HOOKS:
            twin.__dict__[name] = OrderedDict()
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {name: self.plain(f"{path}.{name}") for name in module._modules}
        return twin

    def weight(self, path: str) -> Float[Tensor, "out in"]:
        """The dense weight of a quantised linear layer."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        weight = self._dequantised(path).to(self._dtype)
        size = weight.numel() * weight.element_size()
        while self._kept and self.kept_bytes + size > self._most_bytes:
            self._kept.popitem(last=False)
        if size <= self._most_bytes:
            self._kept[path] = weight
        return weight

    def clear(self) -> None:
        """Let go of all dense weights."""
        self._kept.clear()

    def _dequantised(self, path: str) -> Tensor:
        module: Any = self._module.get_submodule(path)
        if self._is_gptq(module):
            return self._snapshot.gptq_weight(path, self._scheme, _device(module))
        return dense_weight(module)

    def _bias(self, module: Any, path: str) -> Tensor | None:
        if self._is_gptq(module):  # kernels may repack this one, too
            bias = self._snapshot.read(f"{path}.bias")
            return None if bias is None else bias.to(_device(module), self._dtype)
        if not is_bitsandbytes(module) and not is_dense(module):
            raise GradientsRefused(f"{type(module).__name__} at {path} is not dequantised here")
        return None if module.bias is None else module.bias.detach().to(self._dtype)

    def _is_shared(self, module: Any) -> bool:
        """Norms and the like; linear layers too when they are in the dtype of the twins already."""
        linear = isinstance(module, torch.nn.Linear | Conv1D)
        return is_dense(module) and not (linear and module.weight.dtype != self._dtype)

    def _is_gptq(self, module: Any) -> bool:
        return self._scheme.name == "gptq" and hasattr(module, "qweight")


def _device(module: Any) -> torch.device:
    return next(iter([*module.parameters(), *module.buffers()])).device
