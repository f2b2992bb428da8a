"""Stored samples: dataset → sample → tensors, on disk, with a bounded part of them in memory.

    <root>/<dataset_id>/manifest.json              the model that all samples of the dataset are of
    <root>/<dataset_id>/<sample_id>.safetensors    one sample (`attribution.sample_file`)

What is kept of a sample is what cannot be recomputed cheaply, in the model's dtype: `resid` [L + 1, pos, d_model], the
stream entering each layer and the final one; `z` [L, pos, heads, d_head], each head before the output projection;
`mlp_out` [L, pos, d_model]. Everything else, attention patterns above all, is computed from these when it is asked for.

Methods may be called from any thread, and several processes may use one folder: files appear by renaming, and what is
known of a file is forgotten when another one took its name.
"""

import json
import logging
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from attribution.errors import DatasetNotFound, SampleMismatch, SampleNotFound, StorageFailed
from attribution.kept import KeptTensors
from attribution.sample_file import FileKey, is_left_over, read_layout, temporary_name, write_file
from attribution.stored import (
    Identity,
    StoredSample,
    created_and_versions,
    metadata_of,
    same_model,
    shown_ids,
    stored_sample,
)

log = logging.getLogger("sightline.store")

_MANIFEST, _SUFFIX = "manifest.json", ".safetensors"
_SAMPLE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,299}")
_CANONICAL = re.compile(r"0|[1-9][0-9]*")
_KNOWN_HEADERS = 4096

SampleName = int | str


class ActivationStore:
    """The samples below `root`; those written last stay in memory as well, `ram_bytes` of them at most.

    Raises:
        StorageFailed: the folder cannot be made or read.
    """

    def __init__(self, root: Path, ram_bytes: int) -> None:
        self.root, self.ram_bytes = root, ram_bytes
        self._lock = threading.Lock()
        self._manifests: dict[str, tuple[FileKey, Identity]] = {}
        self._headers: OrderedDict[Path, StoredSample] = OrderedDict()
        self._kept = KeptTensors(ram_bytes)
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._remove_left_over()
        except OSError as error:
            raise StorageFailed(f"the folder of stored samples {root} cannot be used: {error}") from error

    # --- samples

    def sample(self, dataset_id: str, sample_id: SampleName, identity: Identity) -> StoredSample:
        """A stored sample of the model `identity`.

        Raises:
            DatasetNotFound, SampleNotFound: naming what there is.
            SampleMismatch: it was computed by another model.
            StorageFailed: its file is damaged, or no sample.
        """
        self._require(dataset_id, identity)
        found = self._find(dataset_id, sample_id, identity)
        if found is None:
            ids = shown_ids(self.sample_ids(dataset_id, identity))
            raise SampleNotFound(f"no sample {sample_id!r} in {dataset_id!r} (it has {ids})", param="sample_id")
        return found

    def find(
        self, dataset_id: str, sample_id: SampleName, identity: Identity, token_ids: list[int]
    ) -> StoredSample | None:
        """The sample of these tokens, or None when nothing is stored under these names.

        Raises:
            SampleMismatch: something else is stored there: other tokens, or another model's.
            StorageFailed: its file is damaged, or no sample.
        """
        if self._owner(dataset_id, identity) is None:
            return None
        found = self._find(dataset_id, sample_id, identity)
        if found is not None and found.token_ids != token_ids:
            raise SampleMismatch(
                f"sample {sample_id!r} of {dataset_id!r} is stored with {found.seq_len} other tokens than the "
                f"{len(token_ids)} given now; take another sample_id, or clear_cache({dataset_id!r}) first",
                param="sample_id",
            )
        return found

    def sample_ids(self, dataset_id: str, identity: Identity) -> list[SampleName]:
        """The samples of a dataset, integers first, in order.

        Raises:
            DatasetNotFound, SampleMismatch, StorageFailed: as `sample`.
        """
        self._require(dataset_id, identity)
        return sorted(self._listed(dataset_id), key=lambda one: (isinstance(one, str), one))

    def datasets(self, identity: Identity) -> dict[str, int]:
        """The datasets of a model, with their number of samples. One whose manifest is damaged is logged."""
        return {name: len(self._listed(name)) for name in self._folders() if self._is_of(name, identity)}

    def write(
        self,
        dataset_id: str,
        sample_id: SampleName,
        identity: Identity,
        token_ids: list[int],
        tensors: Mapping[str, Tensor],
    ) -> StoredSample:
        """Store a sample: when this returns it is on disk, when it raises nothing of it is.

        Args:
            tensors: `resid`, `z` and `mlp_out` on the CPU; views are fine.

        Raises:
            SampleMismatch: the dataset is another model's, or the sample is there with other tokens.
            StorageFailed: it could not be written, and why.
        """
        self.find(dataset_id, sample_id, identity, token_ids)
        path, metadata = self._path(dataset_id, sample_id), metadata_of(identity, token_ids, tensors)
        if fits := self._kept.has_room_for(tensors):  # a view would hold on to its whole batch
            tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        try:
            self._tie(dataset_id, identity)
            key = write_file(path, tensors, metadata)
        except FileNotFoundError:  # the dataset was cleared in this moment
            self._tie(dataset_id, identity)
            key = write_file(path, tensors, metadata)
        if fits:
            self._kept.put(path, key, tensors)
        return self.sample(dataset_id, sample_id, identity)

    def clear(self, dataset_id: str) -> tuple[int, int]:
        """Delete a dataset, whichever model it is of: how many samples, how many bytes.

        Raises:
            DatasetNotFound: there is none of this name.
            StorageFailed: the folder holds other things too, or cannot be deleted.
        """
        if dataset_id not in self._folders():
            raise self._no_dataset(dataset_id, self._folders())
        folder = self.root / dataset_id
        foreign = [name for name in os.listdir(folder) if not (name.endswith((_SUFFIX, ".tmp")) or name == _MANIFEST)]
        if foreign:
            raise StorageFailed(f"{folder} holds what is no sample ({foreign[0]}); move it away, then clear again")
        hidden = self.root / temporary_name()
        try:
            folder.rename(hidden)  # out of sight in one step
            sizes = [os.lstat(hidden / name).st_size for name in os.listdir(hidden) if name.endswith(_SUFFIX)]
            shutil.rmtree(hidden)
        except OSError as error:
            raise StorageFailed(f"{folder} could not be deleted: {error}") from error
        self._kept.forget(folder)
        return len(sizes), sum(sizes)

    def clear_all(self, identity: Identity) -> tuple[int, int]:
        """Delete the datasets of a model and leave those of others: how many samples, how many bytes."""
        cleared = [self.clear(name) for name in self._folders() if self._is_of(name, identity)]
        return sum(samples for samples, _ in cleared), sum(size for _, size in cleared)

    # --- room

    @property
    def ram_used(self) -> int:
        """The bytes of the samples that are in memory too."""
        return self._kept.used

    def disk_used(self) -> int:
        """The bytes of all samples on disk, whichever model's."""
        folders = [self.root / name for name in self._folders()]
        return sum(
            entry.stat().st_size for folder in folders for entry in os.scandir(folder) if entry.name.endswith(_SUFFIX)
        )

    def disk_free(self) -> int:
        """The bytes that the disk below `root` has left."""
        return shutil.disk_usage(self.root).free

    # --- files

    def _path(self, dataset_id: str, sample_id: SampleName) -> Path:
        return self.root / dataset_id / f"{sample_id}{_SUFFIX}"

    def _find(self, dataset_id: str, sample_id: SampleName, identity: Identity) -> StoredSample | None:
        path = self._path(dataset_id, sample_id)
        try:
            key = FileKey.of(path.stat())
            with self._lock:
                known = self._headers.get(path)
            if known is None or known.layout.key != key:
                known = stored_sample(dataset_id, sample_id, read_layout(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageFailed(f"{path} cannot be read: {error}") from error
        same_model(known.identity, identity, f"sample {sample_id!r} of {dataset_id!r}", dataset_id)
        with self._lock:
            self._headers[path] = known
            self._headers.move_to_end(path)
            while len(self._headers) > _KNOWN_HEADERS:
                self._headers.popitem(last=False)
        tensors = self._kept.get(path, known.layout.key)
        return known if tensors is None else known.with_tensors(tensors)

    def _listed(self, dataset_id: str) -> list[SampleName]:
        try:
            names = os.listdir(self.root / dataset_id)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageFailed(f"{self.root / dataset_id} cannot be read: {error}") from error
        stems = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
        return [int(stem) if _CANONICAL.fullmatch(stem) else stem for stem in stems if _SAMPLE.fullmatch(stem)]

    def _folders(self) -> list[str]:
        """The datasets, whichever model's."""
        return sorted(
            entry.name
            for entry in os.scandir(self.root)
            if not entry.name.startswith(".") and os.path.isfile(os.path.join(entry.path, _MANIFEST))
        )

    def _remove_left_over(self) -> None:
        for folder in (self.root, *(self.root / name for name in self._folders())):
            for path in folder.glob(".*.tmp"):
                if is_left_over(path):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    # --- manifests

    def _owner(self, dataset_id: str, identity: Identity) -> Identity | None:
        """The model of a dataset, which must be `identity`; None when there is no such dataset."""
        path = self.root / dataset_id / _MANIFEST
        try:
            key = FileKey.of(path.stat())
            known = self._manifests.get(dataset_id)
            owner = known[1] if known and known[0] == key else Identity.read(json.loads(path.read_bytes())["model"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageFailed(f"{path} cannot be read ({error}); clear_cache({dataset_id!r}) deletes it") from error
        self._manifests[dataset_id] = (key, owner)
        same_model(owner, identity, f"the dataset {dataset_id!r}", dataset_id)
        return owner

    def _require(self, dataset_id: str, identity: Identity) -> None:
        if self._owner(dataset_id, identity) is None:
            raise self._no_dataset(dataset_id, list(self.datasets(identity)))

    def _no_dataset(self, dataset_id: str, there: list[str]) -> DatasetNotFound:
        return DatasetNotFound(f"no dataset {dataset_id!r}; there is {', '.join(there) or 'none'}", param="dataset_id")

    def _is_of(self, dataset_id: str, identity: Identity) -> bool:
        try:
            return self._owner(dataset_id, identity) is not None
        except SampleMismatch:
            return False
        except StorageFailed as error:
            log.warning("a dataset is damaged", extra={"dataset": dataset_id, "reason": error.message})
            return False

    def _tie(self, dataset_id: str, identity: Identity) -> None:
        """See to it that the dataset is there and that of `identity`. Every sample says so too: races do no harm."""
        if self._owner(dataset_id, identity) is not None:
            return
        folder = self.root / dataset_id
        hidden = folder / temporary_name()
        try:
            folder.mkdir(exist_ok=True)
            record = {"dataset_id": dataset_id, "model": identity.record(), **created_and_versions()}
            hidden.write_text(json.dumps(record, indent=1))
            hidden.rename(folder / _MANIFEST)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            raise StorageFailed(f"{folder / _MANIFEST} could not be written: {error}") from error
