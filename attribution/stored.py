"""What a stored sample is: whose it is, its tokens, and its tensors to be read in slices."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attribution import checks
from attribution.errors import SampleMismatch, SampleNotFound
from attribution.sample_file import Layout, damaged, read_rows

if TYPE_CHECKING:
    from attribution.model.traced import TracedModel

_FORMAT = 1
_SHOWN = 12
_PACKAGES = ("sightline", "nnsight", "transformers", "torch")


@dataclass(frozen=True)
class Identity:
    """A model, as far as activations depend on it. `fingerprint` and `dtype` decide; the rest is for people.

    Attributes:
        id: the name under which the model was asked for.
        source: the hub id or folder that it was loaded from, with `revision` the commit where known.
        dtype: of the activations, as "bfloat16".
        fingerprint: of the weights (`TracedModel.fingerprint`).
    """

    id: str
    source: str
    revision: str | None
    dtype: str
    fingerprint: str

    @classmethod
    def of(cls, model: "TracedModel") -> "Identity":
        """The identity of a loaded model."""
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(model.id, model.source, model.revision, dtype, model.fingerprint)

    @classmethod
    def read(cls, record: Any) -> "Identity":
        """What `record` gave.

        Raises:
            TypeError, ValueError: it is something else.
        """
        found = cls(**record)
        if not (isinstance(found.dtype, str) and isinstance(found.fingerprint, str)):
            raise ValueError("the model's dtype and fingerprint are no texts")
        return found

    def record(self) -> dict[str, str | None]:
        """As it is written into files."""
        return asdict(self)

    def matches(self, other: "Identity") -> bool:
        """Whether activations of one are those of the other."""
        return (self.fingerprint, self.dtype) == (other.fingerprint, other.dtype)

    def __str__(self) -> str:
        return f"{self.id!r} ({self.dtype}, weights {self.fingerprint[:12]})"


def same_model(stored: Identity, asked: Identity, what: str, dataset_id: str) -> None:
    """Refuse activations of another model.

    Raises:
        SampleMismatch: saying what is stored, what was asked for, and what helps.
    """
    if not stored.matches(asked):
        raise SampleMismatch(
            f"{what} is of the model {stored}, and this is {asked}; take another dataset_id, or "
            f"clear_cache({dataset_id!r}) to delete what is stored",
            param="dataset_id",
        )


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def created_and_versions() -> dict[str, Any]:
    """When something is written (seconds since 1970), and by which versions of the packages that numbers depend on."""
    return {"created": int(time.time()), "versions": _versions()}


def metadata_of(identity: Identity, token_ids: list[int], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The metadata of a sample's file. NaN and inf never leave the stream that they entered: its end tells of all."""
    return metadata_record(identity, token_ids, finite=bool(torch.isfinite(tensors["resid"][-1]).all()))


def metadata_record(identity: Identity, token_ids: list[int], *, finite: bool) -> dict[str, Any]:
    """The metadata of a sample's file, as `stored_sample` reads it."""
    return {
        "format": _FORMAT,
        "token_ids": token_ids,
        "token_ids_sha256": _sha256(token_ids),
        "finite": finite,
        "model": identity.record(),
        **created_and_versions(),
    }


def _sha256(token_ids: list[int]) -> str:
    return hashlib.sha256(repr(token_ids).encode()).hexdigest()


@dataclass(frozen=True)
class StoredSample:
    """One sample: its tokens, and its tensors, which are read when they are asked for.

    Attributes:
        finite: whether the model computed neither NaN nor inf for it.
        identity: the model that computed it.
        layout: of its file.
    """

    dataset_id: str
    sample_id: int | str
    token_ids: list[int] = field(repr=False)
    finite: bool
    identity: Identity = field(repr=False)
    layout: Layout = field(repr=False)
    _tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @property
    def seq_len(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "StoredSample":
        """The same, its tensors being in memory."""
        return replace(self, _tensors=tensors)

    def read(self, name: str, layers: int | range, positions: list[int] | None = None) -> Tensor:
        """Some layers and positions of `resid`, `z` or `mlp_out`, on the CPU in the model's dtype.

        Args:
            layers: one layer, or several; of `resid` the last is the final stream.
            positions: None is all of them.

        Returns:
            [pos, …] for one layer, [layers, pos, …] for a range; a copy, to be changed at will.

        Raises:
            OutOfRange: a layer or a position that the sample does not have.
            SampleNotFound: the sample was deleted meanwhile.
            StorageFailed: its file cannot be read.
        """
        chosen = [layers] if isinstance(layers, int) else list(layers)
        for layer in chosen:
            checks.in_range("layer", layer, self.layout.slots[name].shape[0], f"the layers of {name}")
        wanted = range(self.seq_len) if positions is None else positions
        for position in wanted if positions is not None else ():
            checks.in_range("pos_ids", position, self.seq_len, "the positions of this sample")
        if self._tensors is not None:
            at = torch.tensor(chosen, dtype=torch.long)
            tensor = self._tensors[name]
            rows = tensor[at] if positions is None else tensor[at[:, None], torch.tensor(wanted, dtype=torch.long)]
        else:
            rows = self._from_file(name, chosen, wanted)
        return rows[0] if isinstance(layers, int) else rows

    def _from_file(self, name: str, layers: list[int], positions: range | list[int]) -> Tensor:
        try:
            return read_rows(self.layout, name, layers, positions)
        except FileNotFoundError as error:
            raise SampleNotFound(
                f"sample {self.sample_id!r} of {self.dataset_id!r} was deleted meanwhile", param="sample_id"
            ) from error


def stored_sample(dataset_id: str, sample_id: int | str, layout: Layout) -> StoredSample:
    """The sample that a file holds, once it is seen to hold one.

    Raises:
        StorageFailed: it holds something else.
    """
    try:
        found = layout.metadata
        if found["format"] != _FORMAT:
            raise ValueError(f"its format is {found['format']!r}, which this version does not read")
        token_ids, identity = found["token_ids"], Identity.read(found["model"])
        if not all(type(token) is int for token in token_ids) or _sha256(token_ids) != found["token_ids_sha256"]:
            raise ValueError("its token ids are not those that were written")
        _check_shapes(layout, len(token_ids), identity.dtype)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"its metadata is malformed ({error!r})"
        raise damaged(layout.path, reason) from error
    return StoredSample(dataset_id, sample_id, token_ids, bool(found["finite"]), identity, layout)


def _check_shapes(layout: Layout, tokens: int, dtype: str) -> None:
    shapes = {name: slot.shape for name, slot in layout.slots.items()}
    resid, z, mlp_out = shapes["resid"], shapes["z"], shapes["mlp_out"]
    layers = resid[0] - 1
    whole = len(z) == 4 and z[:2] == (layers, tokens) and mlp_out == (layers, tokens, *resid[2:]) and len(resid) == 3
    if len(shapes) != 3 or not whole or resid[1] != tokens or not tokens:
        raise ValueError(f"its tensors have the shapes {shapes}, which are not those of a sample of {tokens} tokens")
    if {str(slot.dtype).removeprefix("torch.") for slot in layout.slots.values()} != {dtype}:
        raise ValueError(f"its tensors are not all of {dtype}")


def shown_ids(ids: list[int | str]) -> str:
    """Sample ids for people, neighbours together: 0–4, 7, 'a'."""
    parts: list[list[int | str]] = []
    for one in ids:
        if parts and isinstance(one, int) and parts[-1][-1] == one - 1:
            parts[-1] = [parts[-1][0], one]
        else:
            parts.append([one])
    shown = ["–".join(repr(end) for end in part) for part in parts[:_SHOWN]]
    return ", ".join(shown + [f"… ({len(ids)} in all)"] * (len(parts) > _SHOWN)) or "none"
