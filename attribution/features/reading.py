"""Autoencoders on disk: directories of SAELens (cfg.json + sae_weights.safetensors) and of eai-sparsify (cfg.json +
sae.safetensors).

Nothing is guessed: a file that does not hold exactly the tensors that its config asks for is refused. Weights are
mapped, so that what is never used does not stay in memory.
"""

import json
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attribution.errors import InvalidArgument, StorageFailed
from attribution.features.autoencoder import Autoencoder, Gate
from attribution.features.configs import WITH_SAELENS, Config, Stored, saelens_config, sparsify_config

CONFIG, WEIGHTS, SPARSIFY_WEIGHTS = "cfg.json", "sae_weights.safetensors", "sae.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNUSED = {"scaling_factor"}
"""What SAELens wrote for a while although it was all ones."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sizes(Config):
    """What the config says, and the widest dtype of the weights."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False, kw_only=True)
class Read(Sizes):
    """An autoencoder that was read, with what its config says."""

    autoencoder: Autoencoder


def read_sizes(folder: Path | str) -> Sizes:
    """What an autoencoder is and where it sits, from its config and the header of its weights alone.

    Raises:
        StorageFailed, InvalidArgument: as `read_autoencoder`, but for values that are not finite.
    """
    path, config = _weights_and_config(Path(folder))
    try:
        with safe_open(path, framework="pt") as file:
            dtype = _check(path, config, file)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return Sizes(**_values(config), dtype=dtype)


def read_autoencoder(folder: Path | str) -> Read:
    """The autoencoder of a folder, on the CPU, in the widest dtype of its file.

    Raises:
        StorageFailed: a file is missing or damaged.
        InvalidArgument: the config asks for what is not done, or the weights are not what it says; what to do.
    """
    path, config = _weights_and_config(Path(folder))
    try:
        with safe_open(path, framework="pt") as file:
            dtype = _check(path, config, file)
            tensors = {name: _tensor(path, file, stored) for name, stored in config.stored.items()}
            for name in _UNUSED & set(file.keys()):
                _check_ones(path, name, file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    autoencoder = _assembled(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return Read(**_values(config), dtype=dtype, autoencoder=autoencoder)


def _assembled(config: Config, tensors: dict[str, Tensor]) -> Autoencoder:
    gate = None
    if config.activation == "gated":
        gate = Gate(*(tensors.pop(field.name) for field in fields(Gate)))
    return Autoencoder(
        activation=config.activation,
        b_enc=tensors.pop("b_enc", None),
        gate=gate,
        k=config.k,
        subtracts_b_dec=config.subtracts_b_dec,
        rescaled=config.rescaled,
        normalisation=config.normalisation,
        restores=not config.is_transcoder,
        centred=config.centred,
        **tensors,
    )


def _values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _weights_and_config(folder: Path) -> tuple[Path, Config]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidArgument(
            f"{folder} is no autoencoder: there is no {path}; expected a directory of SAELens ({CONFIG}, {WEIGHTS}) or "
            f"of eai-sparsify ({CONFIG}, {SPARSIFY_WEIGHTS})",
            param="folder",
        ) from error
    except OSError as error:
        raise StorageFailed(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidArgument(f"{path} is no JSON: {error}", param="folder") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path} holds {type(values).__name__}; expected an object", param="folder")
    if (folder / SPARSIFY_WEIGHTS).exists() and not (folder / WEIGHTS).exists():
        return folder / SPARSIFY_WEIGHTS, sparsify_config(path, values)
    return folder / WEIGHTS, saelens_config(path, values)


def _check(path: Path, config: Config, file: Any) -> torch.dtype:
    """See that a file holds exactly the tensors that its config asks for; their widest dtype."""
    expected = {stored.name: stored.shape for stored in config.stored.values()}
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys() - _UNUSED)
    if missing or extra:
        wrong = [f"has no {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} too"] * bool(extra)
        raise InvalidArgument(
            f"{path} {' and '.join(wrong)}; as {config.architecture!r} it holds {', '.join(sorted(expected))}. If "
            f"sae-lens reads it, {WITH_SAELENS}",
            param="folder",
        )
    for name, shape in expected.items():
        if tuple(found[name].get_shape()) != shape:
            raise InvalidArgument(
                f"{path}: {name} has the shape {found[name].get_shape()}; its {CONFIG} says {list(shape)}",
                param="folder",
            )
        if found[name].get_dtype() not in _DTYPES:
            raise InvalidArgument(
                f"{path}: {name} is of {found[name].get_dtype()}; {', '.join(_DTYPES)} are read", param="folder"
            )
    return reduce(torch.promote_types, (_DTYPES[found[name].get_dtype()] for name in expected))


def _tensor(path: Path, file: Any, stored: Stored) -> Tensor:
    tensor = file.get_tensor(stored.name)
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        raise InvalidArgument(f"{path}: {stored.name} holds a value that is not finite", param="folder")
    return tensor.T if stored.transposed else tensor


def _check_ones(path: Path, name: str, tensor: Tensor) -> None:
    if not (tensor == 1).all():
        raise InvalidArgument(
            f"{path}: {name} is not 1 everywhere, and is not folded into the weights; {WITH_SAELENS}",
            param="folder",
        )


def _damaged(path: Path, error: Exception) -> StorageFailed:
    return StorageFailed(f"{path} cannot be read: {error}")
