"""The weights of autoencoders that are in memory: read when they are first needed, and a bounded part of them kept."""

import threading
from collections import OrderedDict
from pathlib import Path

import psutil
import torch

from attribution.errors import CannotFit, StorageFailed
from attribution.features.autoencoder import Autoencoder
from attribution.features.reading import read_autoencoder, read_sizes

DEFAULT_BYTES = 8 * 1024**3
"""The most that is kept; a single autoencoder that is larger is kept alone."""

Key = tuple[Path, torch.device, torch.dtype | None]


class KeptWeights:
    """Autoencoders by folder, device and dtype: those used last, up to `most_bytes`. Safe to use from several threads.

    Of two threads that ask for the same, one reads. What is used while it is let go stays until that use ends.
    """

    def __init__(self, most_bytes: int = DEFAULT_BYTES) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[Key, Autoencoder] = OrderedDict()
        self._reading: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """The bytes that are kept."""
        with self._lock:
            return self._used()

    def get(self, folder: Path, device: torch.device, dtype: torch.dtype | None) -> Autoencoder:
        """The autoencoder of a folder, in the dtype of its file when that is None.

        Raises:
            CannotFit: there is no memory for it.
            StorageFailed, InvalidArgument: as `read_autoencoder`.
        """
        key = (folder, device, dtype)
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            _check_room(folder, device, dtype)
            found = read_autoencoder(folder).autoencoder.to(device, dtype)
            with self._lock:
                self._kept[key] = found
                while len(self._kept) > 1 and self._used() > self.most_bytes:
                    self._kept.popitem(last=False)
            return found

    def drop(self, folder: Path) -> None:
        """Let go of what was read from a folder."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == folder]:
                del self._kept[key]

    def _used(self) -> int:
        return sum(_bytes(one) for one in self._kept.values())


def _bytes(one: Autoencoder) -> int:
    skip = 0 if one.W_skip is None else one.W_skip.numel()
    return (one.n_features * (one.d_in + one.d_out) + skip) * one.dtype.itemsize


def _check_room(folder: Path, device: torch.device, dtype: torch.dtype | None) -> None:
    sizes = read_sizes(folder)
    needed = sizes.n_features * (sizes.d_in + sizes.d_out) * (dtype or sizes.dtype).itemsize
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > there:
        raise CannotFit(
            f"the autoencoder in {folder} takes {needed:,} bytes on {device} and {there:,} are free: unload another, "
            "or name one layer at a time",
            param="source",
        )


def check_unchanged(found: Autoencoder, n_features: int, d_in: int, d_out: int, folder: Path) -> None:
    """See that the weights have the sizes that they had when they were checked against their model.

    Raises:
        StorageFailed: the files were replaced by others meanwhile.
    """
    if (found.n_features, found.d_in, found.d_out) != (n_features, d_in, d_out):
        raise StorageFailed(
            f"the files in {folder} were replaced: {found.n_features} features of width {found.d_in} to {found.d_out}, "
            f"where there were {n_features} of {d_in} to {d_out}; load the autoencoder again"
        )
