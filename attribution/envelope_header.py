"""The header of an envelope: what it says of the tensors, and whether that can be true."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attribution.errors import BadEnvelope

METADATA = "sightline"
"""The key of the value under `__metadata__`."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN = frozenset({str, int, float, bool, type(None)})
"""What holds no tensor and nothing else."""
_MAX_AXES = 16
_MAX_DEPTH = 100


@dataclass(frozen=True)
class Entry:
    """One tensor: `start` and `end` count bytes from the end of the header."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(text: bytes) -> tuple[list[Entry], Any]:
    """The tensors in the order of their bytes, and the value with references in their places.

    Raises:
        BadEnvelope: naming the first thing that is wrong.
    """
    header = _object(_json(text, "the header"), "the header")
    metadata = _object(header.pop("__metadata__", {}), "__metadata__")
    if not isinstance(metadata.get(METADATA), str):
        raise BadEnvelope(f"the header has no {METADATA!r} under __metadata__, which holds the value as JSON")
    value = _json(metadata[METADATA].encode(), f"__metadata__.{METADATA}")
    entries = sorted((_entry(key, one) for key, one in header.items()), key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end:
            raise BadEnvelope(f"the tensor {entry.key!r} begins at {entry.start:,}; the one before it ends at {end:,}")
        end = entry.end
    _check_references(value, set(header))
    return entries, value


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadEnvelope(f"{where} is not JSON: {str(error)[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadEnvelope(f"{where} is no JSON object")
    return value


def _entry(key: str, given: Any) -> Entry:
    """One tensor's description, when it can be true."""
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise BadEnvelope(f"the tensor {key[:80]!r} is described by dtype, shape and data_offsets, and nothing else")
    name, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise BadEnvelope(f"the tensor {key!r} has the dtype {str(name)[:40]!r}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > _MAX_AXES:
        raise BadEnvelope(f"the shape of the tensor {key!r} is no list of up to {_MAX_AXES} counts")
    if not _counts(offsets) or len(offsets) != 2:
        raise BadEnvelope(f"the data_offsets of the tensor {key!r} are not two counts of bytes")
    needed, given_bytes = math.prod(shape) * DTYPES[name].itemsize, offsets[1] - offsets[0]
    if needed != given_bytes:
        raise BadEnvelope(
            f"the tensor {key!r} of type {name} and shape {shape} needs {needed:,} bytes; its data_offsets give it "
            f"{given_bytes:,}"
        )
    return Entry(key, DTYPES[name], tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**62 for one in value)


def _check_references(value: Any, keys: set[str]) -> None:
    used = set()
    for key in _references(value):
        if key not in keys:
            raise BadEnvelope(f"there is no tensor {str(key)[:80]!r}, which the value names")
        used.add(key)
    if unused := sorted(keys - used):
        raise BadEnvelope(f"the value does not use the tensor {unused[0][:80]!r}")


def _references(value: Any) -> Iterator[str]:
    """The keys of the tensors in a value, each as often as it is named."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise BadEnvelope(f"the value is nested more than {_MAX_DEPTH} deep")
        if isinstance(one, list):
            waiting.extend((item, depth + 1) for item in one if type(item) not in PLAIN)
        elif isinstance(one, dict):
            for name, kind in (("$tensor", str), ("$tuple", list)):
                if name in one and (len(one) != 1 or not isinstance(one[name], kind)):
                    raise BadEnvelope(f"an object with {name!r} has nothing else, and a {kind.__name__} under it")
            if "$tensor" in one:
                yield one["$tensor"]
            else:
                waiting.extend((item, depth + 1) for item in one.values() if type(item) not in PLAIN)
