"""One stored sample as a file: safetensors, there whole or not at all, read in slices by positioned reads.

The file is an envelope (`attribution.envelope`): the length of its header (8 bytes), the header (JSON: dtype, shape and
byte range of every tensor, and the metadata) and the tensors one after the other. Nothing is mapped into memory: of a
cold file a positioned read fetches what was asked for, and a mapping several times as much.

1. `write_file` writes to a temporary name in the same folder and renames it: a file that can be seen is whole.
2. `read_layout` parses the header and compares it with the size of the file. Nothing in it is trusted.
3. `read_rows` reads layers × positions, what lies side by side in one go.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from attribution.envelope_header import DTYPES, METADATA, parse_header
from attribution.errors import BadEnvelope, StorageFailed

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8  # bytes that hold the length of the header
_LONGEST_HEADER = 100_000_000  # as the safetensors library has it
_OLD = 3600.0  # seconds after which a temporary file of another machine is nobody's


class FileKey(NamedTuple):
    """What tells a file from one that took its name later."""

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileKey":
        """The key of a file, from its `os.stat`."""
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in its file. `start` counts bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one position of one layer: the first two axes are [layer, pos]."""
        return prod(self.shape[2:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The header of a file: its tensors by name, and its metadata."""

    path: Path
    key: FileKey
    slots: dict[str, Slot]
    metadata: dict[str, Any]


def damaged(path: Path, reason: str) -> StorageFailed:
    """The error for a file that is not what a sample is."""
    return StorageFailed(f"{path} is no stored sample: {reason}; delete the file and run the sample again")


# --- writing


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: dict[str, Any]) -> bytes:
    """The beginning of a file of tensors of these dtypes and shapes; the tensors follow in this order."""
    value = metadata | {"tensors": {name: {"$tensor": name} for name in tensors}}
    header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(value, separators=(",", ":"))}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # so that the tensors are aligned
    return len(text).to_bytes(_LENGTH, "little") + text


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> FileKey:
    """Write a file, or nothing at all. Tensors may be views: one layer at a time is made contiguous.

    Raises:
        FileNotFoundError: the folder is gone.
        StorageFailed: the file could not be written, and why; what was written of it is deleted.
    """
    header = header_bytes({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    hidden = path.with_name(temporary_name())
    try:
        with open(hidden, "xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            for layer in (layer for tensor in tensors.values() for layer in tensor):
                _write_all(file.fileno(), _bytes_of(layer.contiguous()))
            key = FileKey.of(os.fstat(file.fileno()))
        hidden.rename(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageFailed(f"{path} could not be written: {error}; nothing of this sample was kept") from error
    finally:
        hidden.unlink(missing_ok=True)  # after the rename there is none
    return key


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]  # one call writes 2 GiB at most


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, whatever its dtype."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  it is one


def temporary_name() -> str:
    """A hidden name that says whose it is."""
    return f".{_host()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"


def is_left_over(path: Path) -> bool:
    """Whether the one who was writing `path` is gone; on another machine: whether it has been still for an hour."""
    host, _, rest = path.name.removeprefix(".").rpartition(".tmp")[0].partition(".")
    process = rest.partition(".")[0]
    try:
        changed = path.stat().st_mtime
        if host != _host() or not process.isdigit():
            return changed < time.time() - _OLD
        # in a container a new process may have the id of the one that was killed
        return changed < psutil.Process(int(process)).create_time() - 1
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return False


def _host() -> str:
    return socket.gethostname().replace(".", "-")[:64]


# --- reading


def read_layout(path: Path) -> Layout:
    """The header of a file, every part of it checked.

    Raises:
        FileNotFoundError: there is no such file.
        StorageFailed: it cannot be read, or is not what its header says.
    """
    file = _opened(path)
    try:
        status = os.fstat(file)
        start = int.from_bytes(_read(file, 0, min(_LENGTH, status.st_size)), "little") + _LENGTH
        if start > min(status.st_size, _LONGEST_HEADER):
            raise ValueError(f"its header would take {start - _LENGTH} bytes and the file has {status.st_size}")
        entries, metadata = parse_header(_read(file, _LENGTH, start - _LENGTH))
        size = start + (entries[-1].end if entries else 0)
        if size != status.st_size:
            raise ValueError(f"by its header it has {size} bytes and the file has {status.st_size}")
    except (BadEnvelope, ValueError) as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        raise StorageFailed(f"{path} cannot be read: {error}") from error
    finally:
        os.close(file)
    slots = {entry.key: Slot(entry.dtype, entry.shape, start + entry.start) for entry in entries}
    return Layout(path, FileKey.of(status), slots, metadata)


def read_rows(layout: Layout, name: str, layers: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Some layers and positions of a tensor, [layers, pos, …]: no other byte of the file is read.

    Raises:
        FileNotFoundError: the file is gone.
        StorageFailed: it cannot be read, or is not the one whose header was read.
    """
    slot = layout.slots[name]
    rows = torch.empty((len(layers), len(positions), *slot.shape[2:]), dtype=slot.dtype)
    buffer, row = _bytes_of(rows), slot.row_bytes
    file = _opened(layout.path)
    try:
        if FileKey.of(os.fstat(file)) != layout.key:
            raise StorageFailed(f"{layout.path} was replaced while it was being read; read the sample again")
        numbers = (layer * slot.shape[1] + position for layer in layers for position in positions)
        done = 0
        for first, count in _runs(numbers):
            _read_into(file, slot.start + first * row, buffer[done : done + count * row])
            done += count * row
    except (OSError, ValueError) as error:
        raise StorageFailed(f"{layout.path} cannot be read: {error}") from error
    finally:
        os.close(file)
    return rows


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers together: (first, how many)."""
    first, count = 0, 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageFailed(f"{path} cannot be read: {error}") from error


def _read(file: int, offset: int, size: int) -> bytes:
    data = bytearray(size)
    _read_into(file, offset, memoryview(data))
    return bytes(data)


def _read_into(file: int, offset: int, buffer: memoryview) -> None:
    """Read exactly `len(buffer)` bytes, straight into their place."""
    while buffer:
        got = os.preadv(file, [buffer], offset)
        if not got:
            raise ValueError(f"it ends at byte {offset}")
        buffer, offset = buffer[got:], offset + got
