"""Quantised checkpoints: what they say they are, what is asked for, and whether tensors agree with their label.

Gradients never pass a quantised kernel (`attribution.model.twins`), so that the fastest kernel may run the forwards.
"""

from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig

from attribution.errors import GradientsRefused, InvalidRequest, ModelLoadFailed
from attribution.model.dequantise import GPTQTensors, gptq_weight, is_bitsandbytes

QUANTIZATIONS = ("gptq", "nf4", "int8")
_EXTRAS = {"gptq": ("gptqmodel", "gptq"), "nf4": ("bitsandbytes", "bnb"), "int8": ("bitsandbytes", "bnb")}
_EXTRAS["fp4"] = _EXTRAS["nf4"]
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are quantised.

    Attributes:
        name: one of `QUANTIZATIONS`, "fp4", or what config.json calls another way.
        config: the `quantization_config` of the checkpoint; empty when a dense one is quantised on loading.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Bits of a GPTQ code."""
        return int(self.config.get("bits", 4))

    @property
    def label(self) -> str:
        """The format that a GPTQ checkpoint says it has."""
        return str(self.config.get("checkpoint_format") or self.config.get("format") or "gptq").lower()

    @property
    def symmetric(self) -> bool:
        """Whether all zeros of a GPTQ checkpoint are the middle code."""
        return bool(self.config.get("sym", True))

    @property
    def version(self) -> int:
        """The version of the format of a GPTQ checkpoint.

        Raises:
            GradientsRefused: the format is none that is unpacked here.
        """
        if self.label not in _VERSIONS:
            raise GradientsRefused(f"its format is {self.label!r}; unpacked here are {', '.join(_VERSIONS)}")
        return _VERSIONS[self.label]


def check_quantization(asked: str | None) -> None:
    """Raises InvalidRequest when this is no quantisation that can be asked for."""
    if asked is not None and asked not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        raise InvalidRequest(f"quantization is one of {allowed}, or null; found {asked!r}", param="quantization")


def find_scheme(source: str, asked: str | None, **options: Any) -> Scheme | None:
    """What the config of a checkpoint and the caller's wish come to; None is dense.

    Raises:
        ModelLoadFailed: they contradict each other, or the library for it is not installed.
    """
    config, _ = PreTrainedConfig.get_config_dict(source, **options)
    declared: dict[str, Any] = config.get("quantization_config") or {}
    found = _name(declared) if declared else None
    if found is None and asked == "gptq":
        raise _refused(
            source, "it is not quantised; GPTQ needs calibration, and is loaded here, not made (nf4 and int8 are made)"
        )
    if found is not None and asked not in (None, found):
        raise _refused(source, f"quantization is {asked!r}, but the checkpoint is {found!r} by its config.json")
    name = found or asked
    if name is None:
        return None
    library, extra = _EXTRAS.get(name, (None, None))
    if library is not None and not installed(library):
        raise _refused(source, f"{name} needs the library {library}: pip install 'sightline[{extra}]'")
    return Scheme(name, declared)


def scheme_of(module: Any) -> Scheme | None:
    """How a transformers model in memory is quantised; None is dense."""
    declared = getattr(module.config, "quantization_config", None)
    if not declared:
        return None
    config = declared if isinstance(declared, dict) else declared.to_dict()
    return Scheme(_name(config), config)


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return find_spec(library) is not None


def load_options(scheme: Scheme | None, source: str, dtype: str, on_cpu: bool, **options: Any) -> dict[str, Any]:
    """What `from_pretrained` must be told beside what it reads in config.json.

    Raises:
        ModelLoadFailed: nf4 of a dtype of which it cannot be made.
    """
    if scheme is None or (scheme.config and scheme.name != "gptq"):
        return {}
    if scheme.name == "gptq":
        if on_cpu and dtype in ("float32", "float64"):  # the kernel that is chosen otherwise computes in bfloat16
            config = AutoConfig.from_pretrained(source, **options)
            config.quantization_config = scheme.config | {"backend": "gptq_torch"}
            return {"config": config}
        return {}
    if scheme.name == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config, _ = PreTrainedConfig.get_config_dict(source, **options)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    compute = getattr(torch, stored if dtype == "auto" else dtype)
    if compute == torch.float64:
        raise _refused(source, "bitsandbytes makes nf4 of float32, float16 and bfloat16; name one of them as dtype")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": nf4}


def settle(module: Any) -> None:
    """Keep kernels from repacking weights that are read later, and from being compiled on a CPU; before any forward."""
    for part in module.modules():
        if is_bitsandbytes(part) and hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
        if hasattr(part, "qweight") and part.qweight.device.type == "cpu":
            vars(part).pop("dequantize_weight", None)  # compiled: many seconds per shape, to unpack a little faster


def held_bytes(module: Any) -> int:
    """Bytes of all tensors that a model holds: parameters, buffers, and what quantised layers keep beside them."""
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if is_bitsandbytes(part):
            state = getattr(part.weight, "quant_state", None)
            tensors += [] if state is None else [state.absmax, state.code, *_nested(state)]
            tensors += [getattr(part.weight, "SCB", None), getattr(getattr(part, "state", None), "SCB", None)]
        if hasattr(part, "qweight"):
            tensors += [value for value in vars(part).values() if isinstance(value, Tensor)]
    held = {(one.data_ptr(), one.shape): one for one in tensors if isinstance(one, Tensor)}
    return sum(one.numel() * one.element_size() for one in held.values())


def _nested(state: Any) -> list[Tensor]:
    return [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]


class Snapshot:
    """The safetensors files of a checkpoint on this machine, read tensor by tensor.

    Raises:
        GradientsRefused: the files are not here.
    """

    def __init__(self, source: str, revision: str | None, prefix: str = "") -> None:
        """`source` is a folder or a hub id; `prefix` that of the base model, which some checkpoints leave out."""
        self._source, self._revision, self._prefix = source, revision, prefix

    @cached_property
    def _files(self) -> dict[str, Path]:
        try:
            folder = Path(self._source)
            if not folder.is_dir():
                folder = Path(snapshot_download(self._source, revision=self._revision, local_files_only=True))
            index = folder / _INDEX
            if index.is_file():
                return {name: index.parent / file for name, file in loads(index.read_bytes())["weight_map"].items()}
            with safe_open(index.parent / _SINGLE, "pt") as file:
                return dict.fromkeys(file.keys(), index.parent / _SINGLE)
        except (OSError, ValueError, LookupError) as error:
            raise GradientsRefused(f"the safetensors files of the checkpoint cannot be read: {error}") from error

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def read(self, name: str) -> Tensor | None:
        """One tensor on the CPU, or None when there is none of this name."""
        name = name if name in self._files else name.removeprefix(self._prefix)
        if name not in self._files:
            return None
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def gptq_weight(self, path: str, scheme: Scheme, device: torch.device) -> Tensor:
        """The dense weight [out, in] of a GPTQ layer, in the dtype of its scales.

        Raises:
            GradientsRefused: it is not in the files, or packed in a way that is not known.
        """
        found = {name: self.read(f"{path}.{name}") for name in GPTQTensors._fields}
        if found["g_idx"] is None and found["qweight"] is not None:
            n_in = found["qweight"].shape[0] * 32 // scheme.bits
            size = int(scheme.config.get("group_size", 128))
            found["g_idx"] = torch.arange(n_in) // (n_in if size == -1 else size)
        absent = [name for name, tensor in found.items() if tensor is None]
        if absent:
            raise GradientsRefused(f"{path} has no {', '.join(absent)} in the files of the checkpoint")
        tensors = GPTQTensors(*(tensor.to(device) for tensor in found.values() if tensor is not None))
        return gptq_weight(tensors, scheme.bits, scheme.version)


def check_label(source: str, scheme: Scheme, snapshot: Snapshot) -> None:
    """Symmetric zeros are the middle code; version 1 stores one less. So a wrong label shows.

    Raises:
        ModelLoadFailed: the tensors are of another version than their label says: each weight would be one scale off.
    """
    if scheme.name != "gptq" or not scheme.symmetric or scheme.label not in _VERSIONS or scheme.bits not in (2, 4, 8):
        return
    try:
        name = next((name for name in snapshot.names() if name.endswith(".qzeros")), "")
    except GradientsRefused:  # without safetensors files: the guard says so, and there is no gradient to be wrong
        return
    zeros = snapshot.read(name)
    if zeros is None:
        return
    other = next(label for label in _VERSIONS if label != scheme.label)
    if bool((zeros == _symmetric_word(scheme.bits, _VERSIONS[other])).all()):
        held = f"0x{int(zeros[0, 0]) % 2**32:08x}"
        raise _refused(
            source,
            f"its config.json calls the format {scheme.label!r}, but {name} holds the zeros {held} of {other!r}: every"
            f" weight would be one step off. In config.json, set quantization_config.checkpoint_format to {other!r}",
        )


def _symmetric_word(bits: int, version: int) -> int:
    """The int32 that holds nothing but symmetric zeros."""
    zero = 2 ** (bits - 1) - (version == 1)
    word = sum(zero << shift for shift in range(0, 32, bits))
    return word - 2**32 if word >= 2**31 else word


def _name(declared: dict[str, Any]) -> str:
    method = declared.get("quant_method", "")
    method = str(getattr(method, "value", method)).lower()
    if method == "bitsandbytes" or declared.get("load_in_4bit") or declared.get("load_in_8bit"):
        return "int8" if declared.get("load_in_8bit") else str(declared.get("bnb_4bit_quant_type", "fp4"))
    return method or "unknown"


def _refused(source: str, reason: str) -> ModelLoadFailed:
    return ModelLoadFailed(f"cannot load {source!r}: {reason}", param="quantization")
