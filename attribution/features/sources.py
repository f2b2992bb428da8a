"""The autoencoders at hand: sources, each an autoencoder at a place of a model, with descriptions of its features.

1. A source is declared, by a registry file (`attribution.features.registry`) or by `load_features`; one of a model that
   is not loaded waits.
2. When its model is asked for its sources, those that wait are read and checked against it. What does not fit is said,
   logged and not used; the others are.
3. When the model is unloaded, weights are let go and its sources wait again: another model may take its name.

The embedded model finds the sources that come with it by itself.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import puzzles
from attribution.errors import InvalidArgument, SightlineError, SourceNotFound
from attribution.features.declared import Declaration, check_source, read_source
from attribution.features.reading import read_autoencoder
from attribution.features.registry import REGISTRY_FILE, Refused, read_registry
from attribution.features.source import Source
from attribution.features.weights import DEFAULT_BYTES, KeptWeights
from attribution.model.hub import DEMO
from attribution.model.traced import TracedModel

log = logging.getLogger("sightline.features")

__all__ = ["FeatureStore", "Source", "check_source"]


@dataclass(frozen=True, eq=False)
class _Entry:
    """What is known of a source: how it was declared, and what became of it.

    Attributes:
        declared: None of a source that was handed over as it is.
        source: when it fits its model, whose weights have this `fingerprint`.
        reason: why it cannot be used.
        model_id: of the model that it was held against.
    """

    declared: Declaration | None
    source: Source | None = None
    fingerprint: str | None = None
    reason: str | None = None
    model_id: str | None = None

    def status(self) -> dict[str, Any]:
        """A row of the list of all sources."""
        if self.source is not None:
            return self.source.describe() | {"status": "ready", "reason": None}
        declared = self.declared
        assert declared is not None
        status = "waiting" if self.reason is None else "failed"
        said = {"name": declared.name, "model_id": declared.model, "folder": str(declared.folder)}
        return said | {"status": status, "reason": self.reason}


class FeatureStore:
    """The sources of all models of a process. Safe to use from several threads.

    Args:
        registry: a features.toml, or a folder that has one.
        most_bytes: of weights that are kept in memory.

    Raises:
        InvalidArgument: the registry cannot be read; an entry of it that is wrong is reported by `status`.
    """

    def __init__(self, registry: Path | str | None = None, most_bytes: int = DEFAULT_BYTES) -> None:
        self.weights = KeptWeights(most_bytes)
        self._entries: list[_Entry] = []
        self._refused: list[Refused] = []
        self._lock = threading.RLock()
        self._embedded = False
        if registry is not None:
            self._declare(Path(registry))

    # --- declare

    def _declare(self, path: Path) -> None:
        declared, refused = read_registry(path)
        self._entries += [_Entry(one) for one in declared]
        self._refuse(refused)

    def _refuse(self, refused: list[Refused]) -> None:
        self._refused += refused
        for one in refused:
            log.error("an autoencoder cannot be used", extra={"reason": one.reason})

    def _declare_embedded(self, model: TracedModel) -> None:
        if self._embedded or model.id != DEMO:
            return
        self._embedded = True
        path = embedded_registry()
        try:
            if path.is_file():
                self._declare(path)
        except InvalidArgument as error:  # the model is of use without them
            self._refuse([Refused(None, DEMO, error.message)])

    def load(self, model: TracedModel, declared: Declaration, *, overwrite: bool = False) -> Source:
        """Read a source, check it and take it; the same one again is read anew.

        Args:
            overwrite: take it in place of another one of its name, or without the descriptions that it had.

        Raises:
            InvalidArgument: there is another source of this name, or this one with descriptions; or as `read_source`.
            SourceMismatch, StorageFailed, UnsupportedModel: as `read_source`.
        """
        with self._lock:
            self.of(model)
            found = read_source(model, declared, self.weights)
            read_autoencoder(found.folder)  # a value that is not finite is told now, not at the first question
            there = self._find(model, found.name)
            if there is not None and there.declared is not None and not overwrite:
                _check_same(there, found)
            self.weights.drop(found.folder)
            self._put(_Entry(replace(declared, name=found.name), found, model.fingerprint))
            return found

    def add(self, source: Source) -> None:
        """Take a source as it is; one of the same name and model is replaced."""
        with self._lock:
            self._put(_Entry(None, source))

    def _put(self, entry: _Entry) -> None:
        source = entry.source
        assert source is not None
        kept = [
            one
            for one in self._entries
            if one.source is None or (one.source.model_id, one.source.name) != (source.model_id, source.name)
        ]
        self._entries = [*kept, entry]

    # --- look up

    def all(self) -> list[Source]:
        """Every source that is ready, by model, layer and name."""
        with self._lock:
            found = [entry.source for entry in self._entries if entry.source is not None]
        return sorted(found, key=lambda one: (one.model_id, one.layer, one.name))

    def status(self) -> list[dict[str, Any]]:
        """Every source that was declared: what it is when it is ready, else that it waits for its model, or failed."""
        with self._lock:
            waiting = [entry.status() for entry in self._entries if entry.source is None]
            refused = [one.status() for one in self._refused]
            ready = [one.describe() | {"status": "ready", "reason": None} for one in self.all()]
        return [*ready, *waiting, *refused]

    def of(self, model: TracedModel) -> list[Source]:
        """The sources of a model that fit it, by layer and name."""
        with self._lock:
            self._declare_embedded(model)
            names: set[str] = set()
            for index, entry in enumerate(self._entries):
                if _concerns(entry, model):
                    self._entries[index] = entry = self._checked(entry, model, names)
                    names |= {entry.source.name} if entry.source is not None else set()
        return [one for one in self.all() if one.model_id == model.id]

    def _checked(self, entry: _Entry, model: TracedModel, taken: Iterable[str]) -> _Entry:
        """The entry, read and checked against the model when that has not been done."""
        declared = entry.declared
        if declared is None or _is_checked(entry, model):
            return entry
        fresh = _Entry(declared, fingerprint=model.fingerprint, model_id=model.id)
        try:
            source = read_source(model, declared, self.weights)
            if source.name in taken:
                raise InvalidArgument(f"{model.id!r} has a source {source.name!r} already; give another name")
        except SightlineError as error:
            reason = f"{declared.origin}: {error.message}"
            log.error("an autoencoder cannot be used", extra={"model": model.id, "reason": reason})
            return replace(fresh, reason=reason)
        return replace(fresh, source=source)

    def choose(self, model: TracedModel, name: str | None = None, layer: int | None = None) -> list[Source]:
        """The sources of a model of this name and at this layer, at least one; None is any.

        Raises:
            SourceNotFound: there is none; says what there is.
        """
        has = self.of(model)
        fits = [one for one in has if name in (None, one.name) and layer in (None, one.layer)]
        if fits:
            return fits
        names = ", ".join(f"{one.name!r} (layer {one.layer})" for one in has) or "none"
        asked = " and ".join([f"named {name!r}"] * (name is not None) + [f"at layer {layer}"] * (layer is not None))
        failed = "".join(f"; not used: {reason}" for reason in self._failures(model, name))
        raise SourceNotFound(
            f"no autoencoder {asked or 'is loaded'} for {model.id!r}; it has {names}. POST /features/load, or "
            f"load_features(folder), adds one{failed}",
            param="layer" if name is None and layer is not None else "source",
        )

    def source(self, model: TracedModel, name: str | None = None, layer: int | None = None) -> Source:
        """The source of a model that has this name, or the only one at this layer, or the only one.

        Raises:
            SourceNotFound: the model has none, or none of this name or layer.
            InvalidArgument: several fit.
        """
        fits = self.choose(model, name, layer)
        if len(fits) > 1:
            raise InvalidArgument(
                f"several autoencoders of {model.id!r} fit: {', '.join(repr(one.name) for one in fits)}; name one",
                param="source",
            )
        return fits[0]

    def _failures(self, model: TracedModel, name: str | None) -> list[str]:
        with self._lock:
            return [
                entry.reason
                for entry in self._entries
                if entry.reason is not None
                and _concerns(entry, model)
                and name in (None, entry.declared and entry.declared.name)
            ]

    def _find(self, model: TracedModel, name: str) -> _Entry | None:
        for entry in self._entries:
            if entry.source is not None and (entry.source.model_id, entry.source.name) == (model.id, name):
                return entry
        return None

    # --- let go

    def drop(self, model_id: str) -> None:
        """The model was unloaded: let go of the weights of its sources, which wait until it is loaded again."""
        with self._lock:
            for index, entry in enumerate(self._entries):
                if entry.source is not None and entry.source.model_id == model_id:
                    entry.source.weights.drop(entry.source.folder)
                    if entry.declared is not None:
                        self._entries[index] = _Entry(entry.declared)
                elif entry.reason is not None and entry.declared is not None and entry.model_id == model_id:
                    self._entries[index] = _Entry(entry.declared)

    def remove(self, model_id: str, name: str) -> None:
        """Forget a source, whatever became of it, and let go of its weights; its files stay.

        Raises:
            SourceNotFound: there is none of this name; says what there is.
        """
        with self._lock:
            names = {entry: (entry.status()["model_id"], entry.status()["name"]) for entry in self._entries}
            found = [entry for entry, key in names.items() if key == (model_id, name)]
            if not found:
                there = ", ".join(repr(one) for model, one in names.values() if model == model_id and one) or "none"
                raise SourceNotFound(f"{model_id!r} has no autoencoder {name!r}; it has {there}", param="source")
            self._entries = [entry for entry in self._entries if entry not in found]
            for entry in found:
                if entry.source is not None:
                    entry.source.weights.drop(entry.source.folder)


def embedded_registry() -> Path:
    """The registry of the sources that come with the embedded model."""
    return Path(puzzles.__file__).parent / "demo_features" / REGISTRY_FILE


def _concerns(entry: _Entry, model: TracedModel) -> bool:
    if entry.declared is None:
        return entry.source is not None and entry.source.model_id == model.id
    return entry.declared.is_for(model)


def _is_checked(entry: _Entry, model: TracedModel) -> bool:
    """Whether an entry was held against this very model."""
    if entry.fingerprint != model.fingerprint:
        return False
    return entry.reason is not None if entry.source is None else entry.source.model_id == model.id


def _check_same(entry: _Entry, source: Source) -> None:
    """See that a source that is there is of the same folder and places as one that comes, and loses no descriptions."""
    there = entry.source
    assert there is not None
    if (there.folder, there.reads, there.writes) != (source.folder, source.reads, source.writes):
        raise InvalidArgument(
            f"{source.model_id!r} has a source {source.name!r} already, from {there.folder}; take another name, "
            "overwrite=True, or unload it first",
            param="name",
        )
    if len(there.descriptions) and not len(source.descriptions):
        raise InvalidArgument(
            f"the source {source.name!r} of {source.model_id!r} has descriptions, which it would lose; "
            "give descriptions, another name, or overwrite=True",
            param="descriptions",
        )
