"""Recorded runs on disk: `<activations-dir>/<run_id>/<choice>/<name>.pt` and `<run_id>/run.json`.

A run is written to a hidden directory beside its place and renamed when everything is in it, so a run that can be seen
is whole. The directory is bounded in bytes and age, oldest first; a run being written is never touched.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from attribution.errors import CaptureTooLarge, RunNotFound, StorageFailed

log = logging.getLogger("sightline.runs")

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,99}")
_HIDDEN = re.compile(r"\.[0-9a-f]{32}\.(\d+)\.tmp")
_RUN_JSON = "run.json"


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a run: what its file holds, and `positions`, the tokens that the rows of its `axis` belong to."""

    choice: int
    name: str
    selector: str
    tensor: Tensor
    positions: range
    axis: int


class RunStore:
    """The runs of one directory. Methods may be called from any thread."""

    def __init__(self, root: Path, max_bytes: int | None, ttl: float | None) -> None:
        self.root, self.max_bytes, self.ttl = root, max_bytes, ttl
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, int]] = {}
        for path in self._directories():
            self._known[path.name] = (path.stat().st_mtime, _size(path))

    def path(self, run_id: str, choice: int, name: str) -> Path:
        """Where a tensor of a run lies once the run is written."""
        return self.root / run_id / str(choice) / f"{name}.pt"

    def describe(self, run_id: str, saved: SavedTensor) -> dict[str, Any]:
        """The `activations_meta` of one tensor."""
        span = saved.positions
        return {
            "file": str(self.path(run_id, saved.choice, saved.name)),
            "selector": saved.selector,
            "shape": list(saved.tensor.shape),
            "dtype": str(saved.tensor.dtype).removeprefix("torch."),
            "positions": [span.start, span.stop, span.step],
            "axis": saved.axis,
            "bytes": saved.tensor.numel() * saved.tensor.element_size(),
        }

    def write(self, run_id: str, tensors: list[SavedTensor], record: dict[str, Any]) -> int:
        """Write a run; it is there when this returns, and nothing of it is when this raises. Returns its bytes.

        Raises:
            StorageFailed: a file could not be written.
            CaptureTooLarge: the run alone is larger than the directory may be.
        """
        size = sum(saved.tensor.numel() * saved.tensor.element_size() for saved in tensors)
        if self.max_bytes is not None and size > self.max_bytes:
            raise CaptureTooLarge(
                f"this run takes {size:,} bytes and the directory of runs may hold {self.max_bytes:,}; name fewer "
                "layers or positions, or start the server with a larger --activations-max-bytes",
                param="savepoints",
            )
        hidden = self.root / f".{run_id}.{os.getpid()}.tmp"
        try:
            for saved in tensors:
                folder = hidden / str(saved.choice)
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(saved.tensor.contiguous(), folder / f"{saved.name}.pt")
            hidden.mkdir(parents=True, exist_ok=True)
            (hidden / _RUN_JSON).write_text(json.dumps(record, indent=1))
            size = _size(hidden)
            hidden.rename(self.root / run_id)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(hidden, ignore_errors=True)
            raise StorageFailed(
                f"the activations could not be written below {self.root}: {error}; nothing of this run was kept"
            ) from error
        with self._lock:
            self._known[run_id] = (time.time(), size)
        try:
            self.retain(run_id)
        except StorageFailed as error:  # this run is whole, and the sweep will try again
            log.error("old runs could not be deleted", extra={"reason": error.message})
        return size

    def summaries(self) -> list[dict[str, Any]]:
        """A line per run, newest first; what vanishes meanwhile, or is damaged, is left out."""
        rows: list[tuple[float, dict[str, Any]]] = []
        for path in self._directories():
            try:
                rows.append((path.stat().st_mtime, self._summary(path)))
            except (FileNotFoundError, RunNotFound):
                continue
            except (StorageFailed, KeyError, TypeError) as error:
                log.warning("a run is damaged", extra={"path": str(path), "reason": str(error)})
        return [row for _, row in sorted(rows, key=lambda dated: dated[0], reverse=True)]

    def _summary(self, path: Path) -> dict[str, Any]:
        record = self.read(path.name)
        names = sorted({name for choice in record["choices"] for name in choice["activations"]})
        row = {key: record[key] for key in ("run_id", "created", "model")}
        return row | {"choices": len(record["choices"]), "savepoints": names, "bytes": _size(path)}

    def read(self, run_id: str) -> dict[str, Any]:
        """The run.json of a run.

        Raises:
            RunNotFound: there is no such run.
            StorageFailed: its run.json cannot be read.
        """
        try:
            return json.loads((self._folder(run_id) / _RUN_JSON).read_text())
        except FileNotFoundError as error:
            raise RunNotFound(f"no run {run_id!r} below {self.root}", param="run_id") from error
        except (OSError, ValueError) as error:
            raise StorageFailed(f"run.json of {run_id!r} cannot be read: {error}") from error

    def file(self, run_id: str, choice: int, name: str) -> Path:
        """The file of one tensor of a run.

        Raises:
            RunNotFound: there is no such run, choice or tensor.
        """
        record = self.read(run_id)
        path = self.path(run_id, choice, name)
        if not _NAME.fullmatch(name) or not path.is_file():
            kept = {c["index"]: sorted(c["activations"]) for c in record["choices"]}
            raise RunNotFound(f"run {run_id!r} has no tensor {name!r} for choice {choice}; it has {kept}", param="name")
        return path

    def delete(self, run_id: str) -> int:
        """Delete a run; returns the bytes freed.

        Raises:
            RunNotFound: there is no such run.
        """
        folder = self._folder(run_id)
        if not folder.is_dir():
            raise RunNotFound(f"no run {run_id!r} below {self.root}", param="run_id")
        size = _size(folder)
        self._remove(run_id)
        return size

    def _folder(self, run_id: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise RunNotFound(f"a run id is 32 hexadecimal digits; found {run_id!r}", param="run_id")
        return self.root / run_id

    def _directories(self) -> list[Path]:
        try:
            return [path for path in self.root.iterdir() if _RUN_ID.fullmatch(path.name) and path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageFailed(f"the directory of runs {self.root} cannot be read: {error}") from error

    def retain(self, newest: str | None = None) -> None:
        """Delete the oldest runs until the rest keeps to the bounds; never the one just written."""
        with self._lock:
            old = sorted((item for item in self._known.items() if item[0] != newest), key=lambda item: item[1])
            total = sum(size for _, size in self._known.values())
            doomed = []
            for run_id, (created, size) in old:
                expired = self.ttl is not None and created < time.time() - self.ttl
                if expired or (self.max_bytes is not None and total > self.max_bytes):
                    doomed.append(run_id)
                    total -= size
        for run_id in doomed:
            log.info("run deleted by retention", extra={"run_id": run_id})
            self._remove(run_id)

    def _remove(self, run_id: str) -> None:
        """Take a run out of sight in one step, then delete it."""
        hidden = self.root / f".{run_id}.{os.getpid()}.tmp"
        with self._lock:
            self._known.pop(run_id, None)
        try:
            (self.root / run_id).rename(hidden)
            shutil.rmtree(hidden)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageFailed(f"run {run_id!r} could not be deleted: {error}") from error

    def remove_unfinished(self) -> None:
        """Delete what a server that was killed left half-written; for a server that starts, not for one who looks."""
        for path in self.root.glob(".*.tmp") if self.root.is_dir() else ():
            hidden = _HIDDEN.fullmatch(path.name)
            if hidden and not _is_written_by(int(hidden[1]), path):
                shutil.rmtree(path, ignore_errors=True)


def _is_written_by(pid: int, folder: Path) -> bool:
    """Whether the process that is writing `folder` may be alive: in a container, a new one has the same id."""
    try:
        return folder.stat().st_mtime > psutil.Process(pid).create_time() - 1
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def _size(folder: Path) -> int:
    """The bytes of the files below `folder`; those that vanish meanwhile do not count."""
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(where, name)).st_size
    return size
