"""Steering vectors: directions that were computed once, kept under a name with where they came from.

    <root>/<name>.safetensors    the tensor `vector`, and everything else as JSON in the metadata

1. `VectorStore.write` writes to a temporary name and renames it: a file that can be seen is whole.
2. `VectorStore.read` checks all of a file before it believes it, and whose vector it is: one that was computed with
   other weights says nothing about these.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from attribution.arguments import DatasetId
from attribution.envelope import Unpacker
from attribution.errors import BadEnvelope, InvalidArgument, StorageFailed, VectorNotFound
from attribution.sample_file import header_bytes, is_left_over, temporary_name
from attribution.steering_vector import SteeringVector, check_vector
from attribution.stored import Identity

_KIND, _FORMAT, _SUFFIX, _TENSOR = "steering vector", 1, ".safetensors", "vector"
_SHOWN = 12
_NAME = TypeAdapter(DatasetId)

__all__ = ["SteeringVector", "VectorStore"]


class VectorStore:
    """The steering vectors below `root`, of whichever models; the folder is made with the first of them.

    Methods may be called from any thread, and several processes may use one folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()  # between seeing that a name is free and taking it

    def write(self, vector: SteeringVector, *, overwrite: bool = False) -> SteeringVector:
        """Keep a vector under its name: when this returns it is on disk, when it raises nothing has changed.

        Args:
            overwrite: replace the vector that has this name, whichever model's it is.

        Returns:
            The vector, its tensor detached and on the CPU.

        Raises:
            InvalidArgument: a name that cannot be one, or is taken; numbers that are not finite, not floating, or do
                not fit the layers; a provenance without a model.
            StorageFailed: the file could not be written, and why.
        """
        path = self._path(vector.name)
        tensor = vector.vector.detach().cpu().contiguous()
        check_vector(vector, tensor)
        metadata = {
            "kind": _KIND,
            "format": _FORMAT,
            "name": vector.name,
            "selector": vector.selector,
            "layers": list(vector.layers),
            "stacked": vector.stacked,
            "provenance": vector.provenance,
            "statistics": list(vector.statistics),
        }
        with self._lock:
            if not overwrite and path.exists():
                raise taken(vector.name)
            self._write(path, header_bytes({_TENSOR: (tensor.dtype, tensor.shape)}, metadata), tensor)
        return self.read(vector.name)

    def read(self, name: str, identity: Identity | None = None) -> SteeringVector:
        """A vector by its name.

        Args:
            identity: the model that it is for; None reads any model's.

        Raises:
            InvalidArgument: a name that cannot be one.
            VectorNotFound: there is none of this name; says what there is.
            VectorMismatch: it was computed with another model.
            StorageFailed: its file cannot be read, or holds something else.
        """
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self._absent(name) from None
        except OSError as error:
            raise StorageFailed(f"{path} cannot be read: {error}") from error
        vector = _unpacked(path, name, data)
        if identity is not None:
            vector.check_model(identity)
        return vector

    def names(self) -> list[str]:
        """The names of all vectors, in order.

        Raises:
            StorageFailed: the folder cannot be read.
        """
        try:
            files = os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageFailed(f"the folder of steering vectors {self.root} cannot be read: {error}") from error
        return sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX) and name[0] != ".")

    def delete(self, name: str) -> int:
        """Delete a vector, whichever model's. Returns the bytes that it took.

        Raises:
            InvalidArgument: a name that cannot be one.
            VectorNotFound: there is none of this name.
            StorageFailed: it cannot be deleted.
        """
        path = self._path(name)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            raise self._absent(name) from None
        except OSError as error:
            raise StorageFailed(f"{path} could not be deleted: {error}") from error
        return size

    def check_free(self, name: str) -> None:
        """See that a name can be given to a new vector, before it is computed.

        Raises:
            InvalidArgument: it cannot be one, or is taken.
        """
        if self._path(name).exists():
            raise taken(name)

    def list(self) -> list[dict[str, Any]]:
        """All vectors by name, each as `SteeringVector.describe`.

        Raises:
            StorageFailed: the folder or one of the files cannot be read, or holds something else.
        """
        found = []
        for name in self.names():
            try:
                found.append(self.read(name).describe())
            except VectorNotFound:  # deleted since its name was read
                continue
        return found

    def _path(self, name: str) -> Path:
        try:
            return self.root / f"{_NAME.validate_python(name)}{_SUFFIX}"
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidArgument(f"name: {reason}; found {name!r}", param="name") from error

    def _absent(self, name: str) -> VectorNotFound:
        names = self.names()
        there = ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
        return VectorNotFound(f"no steering vector {name!r}; there is {there or 'none'}", param="name")

    def _write(self, path: Path, header: bytes, tensor: Tensor) -> None:
        hidden = path.with_name(temporary_name())
        memory: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy knows no bfloat16
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for old in self.root.glob(".*.tmp"):
                if is_left_over(old):
                    old.unlink(missing_ok=True)
            with open(hidden, "xb") as file:
                file.write(header)
                file.write(memory)
            hidden.rename(path)
        except OSError as error:
            raise StorageFailed(f"{path} could not be written: {error}; nothing was changed") from error
        finally:
            with suppress(OSError):
                hidden.unlink(missing_ok=True)  # after the rename there is none


def taken(name: str) -> InvalidArgument:
    """The error for a name that a vector has already."""
    return InvalidArgument(
        f"there is a steering vector {name!r} already; take another name, overwrite=True, or delete it first",
        param="name",
    )


def _unpacked(path: Path, name: str, data: bytes) -> SteeringVector:
    try:
        unpacker = Unpacker(announced=len(data))
        unpacker.feed(data)
        found = unpacker.finish()
        if (found["kind"], found["format"]) != (_KIND, _FORMAT):
            raise ValueError(f"it is of kind {found['kind']!r} and format {found['format']!r}")
        if not (type(found["stacked"]) is bool and all(type(layer) is int for layer in found["layers"])):
            raise ValueError("its layers are no integers")
        vector = SteeringVector(
            name,
            found["tensors"][_TENSOR],
            found["selector"],
            tuple(found["layers"]),
            found["stacked"],
            found["provenance"],
            tuple(found["statistics"]),
        )
        check_vector(vector, vector.vector)
    except (BadEnvelope, InvalidArgument, KeyError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, BadEnvelope | InvalidArgument) else str(error)
        raise StorageFailed(f"{path} is no steering vector: {reason}; delete or move the file") from error
    return vector
