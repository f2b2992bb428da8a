"""The autoencoders at hand: sources, each an autoencoder at a place of a model, with descriptions of its features.

A source is declared by a registry file (`attribution.features.registry`) or loaded from a folder. It is checked against
its model when it is added; its weights are read when they are first needed, and kept.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attribution import checks
from attribution.errors import InvalidArgument, SourceNotFound
from attribution.features.autoencoder import Autoencoder
from attribution.features.descriptions import Descriptions
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from attribution.model.traced import TracedModel


@dataclass(frozen=True, eq=False)
class Source:
    """An autoencoder at a place of a model.

    Attributes:
        name: as "2-resid_post"; the model's other sources have other names.
        model_id: the model that it was declared for.
        folder: of its weights.
        reads: where it reads.
        writes: where what it decodes belongs: the same place, or for a transcoder another one.
        n_features, d_in, d_out: its sizes.
        prepend_bos: whether it was trained on texts that begin with the special token; None where that is not known.
        descriptions: of its features.
    """

    name: str
    model_id: str
    folder: Path
    reads: Place
    writes: Place
    n_features: int
    d_in: int
    d_out: int
    architecture: str
    prepend_bos: bool | None = None
    descriptions: Descriptions = field(default_factory=Descriptions)
    _kept: dict[tuple[torch.device, torch.dtype | None], Autoencoder] = field(default_factory=dict, repr=False)

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.reads != self.writes

    @property
    def layer(self) -> int:
        """The layer of what it reads."""
        return self.reads.layer

    def autoencoder(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Autoencoder:
        """Its weights, read once for each device and dtype; a dtype of None is that of the file.

        Raises:
            StorageFailed: the files cannot be read any more.
        """
        key = (torch.device(device), dtype)
        if key not in self._kept:
            self._kept[key] = read_autoencoder(self.folder).autoencoder.to(*key)
        return self._kept[key]

    def check_index(self, index: int, param: str = "index") -> int:
        """See that it has a feature.

        Raises:
            OutOfRange: it has none of this index.
        """
        return checks.in_range(param, index, self.n_features, f"the features of {self.name!r}")


class FeatureStore:
    """The sources of all models of a process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str], Source] = {}
        self._lock = threading.Lock()

    def add(self, source: Source) -> None:
        """Take a source; one of the same name and model is replaced."""
        with self._lock:
            self._sources[source.model_id, source.name] = source

    def all(self) -> list[Source]:
        """Every source, by model, layer and name."""
        with self._lock:
            return sorted(self._sources.values(), key=lambda one: (one.model_id, one.layer, one.name))

    def of(self, model: TracedModel) -> list[Source]:
        """The sources of a model, by layer and name."""
        return [one for one in self.all() if one.model_id == model.id]

    def source(self, model: TracedModel, name: str | None = None, layer: int | None = None) -> Source:
        """The source of a model that has this name, or the only one at this layer, or the only one.

        Raises:
            SourceNotFound: the model has none, or none of this name or layer.
            InvalidArgument: several fit.
        """
        has = self.of(model)
        fits = [one for one in has if name in (None, one.name) and layer in (None, one.layer)]
        if len(fits) == 1:
            return fits[0]
        names = ", ".join(f"{one.name!r} (layer {one.layer})" for one in has) or "none"
        asked = " and ".join([f"named {name!r}"] * (name is not None) + [f"at layer {layer}"] * (layer is not None))
        if not fits:
            raise SourceNotFound(
                f"no autoencoder {asked or 'is loaded'} for {model.id!r}; it has {names}. POST /features/load, or "
                "load_features(folder), adds one",
                param="layer" if name is None and layer is not None else "source",
            )
        raise InvalidArgument(
            f"several autoencoders of {model.id!r} fit: {', '.join(repr(one.name) for one in fits)}; name one",
            param="source",
        )


def check_source(model: TracedModel, source: Source) -> None:
    """See that an autoencoder fits a model.

    Raises:
        SourceMismatch: it is of another model, or its place or widths are not the model's.
        UnsupportedModel: the points of the model are not proved.
    """
    raise NotImplementedError
