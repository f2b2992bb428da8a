"""Tensors of files that are kept in memory as well: a bounded number of bytes, the least recently used leave first."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from attribution.sample_file import FileKey


class KeptTensors:
    """The tensors of whole files, `limit` bytes at most. Methods may be called from any thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, tuple[FileKey, dict[str, Tensor]]] = OrderedDict()

    def has_room_for(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors alone are within the limit."""
        return _size(tensors) <= self.limit

    def put(self, path: Path, key: FileKey, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a file, which have room; others go before they come."""
        size = _size(tensors)
        with self._lock:
            self._drop(path)
            while self._kept and self.used + size > self.limit:
                self._drop(next(iter(self._kept)))
            self._kept[path] = (key, dict(tensors))
            self.used += size

    def get(self, path: Path, key: FileKey) -> dict[str, Tensor] | None:
        """The tensors of a file, when they are here and the file is still that one."""
        with self._lock:
            found = self._kept.get(path)
            if found is None:
                return None
            if found[0] != key:
                self._drop(path)
                return None
            self._kept.move_to_end(path)
            return found[1]

    def forget(self, folder: Path) -> None:
        """Let go of all files of a folder."""
        with self._lock:
            for path in [path for path in self._kept if path.parent == folder]:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        _, tensors = self._kept.pop(path, (None, {}))
        self.used -= _size(tensors)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
