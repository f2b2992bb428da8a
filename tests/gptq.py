"""Tiny GPTQ checkpoints in the published layout, written from codes that the test knows, and their dense twins."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import tiny_model, tiny_tokenizer

WORD = 32
GROUP = 32
SIZES = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}  # the packing and the CPU kernel want multiples
KEYS = ("qweight", "qzeros", "scales", "g_idx")
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Packed(NamedTuple):
    """One linear layer as a checkpoint holds it, and the weight [out, in] that its codes stand for."""

    tensors: dict[str, Tensor]
    dense: Tensor


def pack_weight(
    weight: Tensor, bits: int = 4, version: int = 1, *, symmetric: bool = True, act_order: bool = False, group: int = 32
) -> Packed:
    """Round a weight [out, in] to codes, group by group, and pack these; scales are float16."""
    most = 2**bits - 1
    n_out, n_in = weight.shape
    g_idx = torch.arange(n_in) // group
    if act_order:
        g_idx = g_idx[torch.randperm(n_in, generator=torch.Generator().manual_seed(7))]
    n_groups = int(g_idx.max()) + 1
    scales, zeros = torch.zeros(n_groups, n_out).half(), torch.zeros(n_groups, n_out, dtype=torch.int64)
    codes = torch.zeros(n_in, n_out, dtype=torch.int64)
    for index in range(n_groups):
        rows = weight.T[g_idx == index]
        low, high = rows.amin(0), rows.amax(0)
        if symmetric:
            scales[index], zeros[index] = 2 * torch.maximum(-low, high) / most, 2 ** (bits - 1)
        else:
            scales[index] = (high - low) / most
            zeros[index] = (-low / scales[index].float()).round().clamp(0, most)
        scale = scales[index].float()
        codes[g_idx == index] = (rows / scale + zeros[index]).round().clamp(0, most).long()
    # what the codes stand for: an integer times a float16, rounded to float16
    dense = (scales[g_idx].double() * (codes - zeros[g_idx]).double()).half().T.contiguous()
    stored = zeros if version == 2 else (zeros - 1) % (most + 1)
    tensors = {
        "qweight": packed(codes, bits),
        "qzeros": packed(stored.T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return Packed(tensors, dense)


def packed(values: Tensor, bits: int) -> Tensor:
    """Every 32 / bits rows of values in one row of int32, the first in the lowest bits."""
    per_word = WORD // bits
    words = torch.zeros(values.shape[0] // per_word, values.shape[1], dtype=torch.int64)
    for place in range(per_word):
        words += values[place::per_word] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def save_gptq(
    folder: Path, family: str = "qwen2", *, stored: int = 1, label: str = "gptq", bits: int = 4, **how: Any
) -> Any:
    """Write a checkpoint with tensors of version `stored` under a label; returns its dense twin, in float32."""
    model = tiny_model(family, **SIZES).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.split(".")[-2] in PLACES and name.endswith(".weight")]:
        tensors, dense = pack_weight(state.pop(name).float(), bits, stored, **how)
        prefix = name.removesuffix("weight")
        state |= {prefix + key: tensor for key, tensor in tensors.items()}
        model.get_submodule(prefix[:-1]).weight.data = dense
    model.config.dtype = torch.float16
    model.config.save_pretrained(folder)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": how.get("symmetric", True),
        "desc_act": how.get("act_order", False),
        "checkpoint_format": label,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return model.float()


class RepackingKernel(torch.nn.Module):
    """What kernels do: right outputs, tensors that mean something else after the first forward, and a backward
    that raises nothing and is wrong."""

    def __init__(self, dense: torch.nn.Linear, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._weight, self._bias = dense.weight.data, None if dense.bias is None else dense.bias.data

    def forward(self, x: Tensor) -> Tensor:
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.zeros_like(buffer))
        with torch.no_grad():
            out = torch.nn.functional.linear(x.float(), self._weight, self._bias).to(x.dtype)
        return out + 0 * x.sum()


def with_kernels(dense: Any, folder: Path) -> Any:
    """The model of a checkpoint that `save_gptq` wrote, on `RepackingKernel`s."""
    model, state = copy.deepcopy(dense), load_file(folder / "model.safetensors")
    for name, module in list(model.named_modules()):
        tensors = {key: state[f"{name}.{key}"] for key in (*KEYS, "bias") if f"{name}.{key}" in state}
        if "qweight" in tensors:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, RepackingKernel(module, tensors))
    model.config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return model
