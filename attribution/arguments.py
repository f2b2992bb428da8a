"""The types of the arguments of operations, and how a value that does not fit is refused.

What notebooks pass is accepted (numpy integers, ranges, arrays); what would be guessed at is not (a bool or 2.0 for a
position).
"""

import operator
import re
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, ValidationError, WithJsonSchema
from torch import Tensor

from attribution.errors import InvalidArgument

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_NAME_RULE = "1 to 128 letters, digits, '.', '_' and '-', not starting with '.'"


def _index(value: object) -> int:
    if isinstance(value, bool | np.bool_):
        raise ValueError("an integer is expected")
    if isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool or value.is_floating_point()):
        raise ValueError("an integer is expected")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError("an integer is expected") from None


def _indices(value: object) -> object:
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, range | tuple) else value


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"a name has {_NAME_RULE}")
    return value


def _sample(value: object) -> int | str:
    if isinstance(value, str):
        name = _name(value)
        return int(name) if name.isdigit() and str(int(name)) == name else name
    number = _index(value)
    if number < 0:
        raise ValueError("an integer of at least 0 or a name is expected")
    return number


def _samples(value: object) -> int | str | list[int | str]:
    return [_sample(one) for one in value] if isinstance(value, list | tuple | range) else _sample(value)


def _tensor(value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise ValueError("a tensor is expected (over HTTP: a body of application/vnd.sightline+safetensors)")
    return value.detach()


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor | np.ndarray):
        value = list(_tensor(value).unbind())
    if not isinstance(value, list | tuple):
        raise ValueError("a list of tensors, or one stacked along its first axis, is expected")
    return [_tensor(item) for item in value]


_TENSOR_SCHEMA = {"type": "object", "properties": {"$tensor": {"type": "string"}}, "required": ["$tensor"]}

Index = Annotated[int, BeforeValidator(_index, json_schema_input_type=int)]
"""An integer; numpy's too, but no bool and no float."""
Positions = Annotated[list[Index], BeforeValidator(_indices, json_schema_input_type=list[int])]
"""Token positions, or token ids: a list, range, array or tensor of integers."""
DatasetId = Annotated[str, BeforeValidator(_name, json_schema_input_type=str)]
SampleId = Annotated[int | str, BeforeValidator(_sample, json_schema_input_type=int | str)]
"""An integer from 0 or a name; "7" is the integer 7."""
SampleIds = Annotated[
    int | str | list[int | str],
    BeforeValidator(_samples, json_schema_input_type=int | str | list[int | str]),
]
"""One sample, or several."""
TensorArg = Annotated[Tensor, BeforeValidator(_tensor), WithJsonSchema(_TENSOR_SCHEMA)]
TensorList = Annotated[
    list[Tensor], BeforeValidator(_tensors), WithJsonSchema({"type": "array", "items": _TENSOR_SCHEMA})
]
"""Tensors of one shape; one tensor stands for its rows."""


def refusal(name: str, error: ValidationError) -> InvalidArgument:
    """The first thing that is wrong with the arguments of the operation `name`, in words."""
    first: dict[str, Any] = error.errors()[0]  # type: ignore[assignment]
    where = ".".join(_named_parts(first["loc"]))
    kind = first["type"]
    if kind == "extra_forbidden":
        *path, extra = first["loc"]
        where = ".".join([*(_named_parts(path) if path else []), str(extra)])
        return InvalidArgument(f"{name} has no argument {where!r}", param=where)
    if kind == "missing":
        return InvalidArgument(f"{name} needs the argument {where!r}", param=where)
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidArgument(f"{where or name}: {reason}; found {_shown(first['input'])}", param=where or None)


def _named_parts(location: Iterable[Any]) -> list[str]:
    """The path to the argument; names that pydantic gives to the branches of a union are left out."""
    first, *rest = location or ("",)
    return [str(first), *(str(part) for part in rest if isinstance(part, int))]


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value)[:80]
