"""One source: an autoencoder at a place of a model, with descriptions of its features."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attribution import checks
from attribution.features.autoencoder import Autoencoder
from attribution.features.descriptions import Descriptions
from attribution.features.places import Place
from attribution.features.weights import KeptWeights, check_unchanged


@dataclass(frozen=True, eq=False)
class Source:
    """An autoencoder at a place of a model. Its weights are read when they are first needed.

    Attributes:
        name: as "2-resid_post"; the model's other sources have other names.
        model_id: the model that it was checked against.
        folder: of its weights.
        reads: where it reads.
        writes: where what it decodes belongs: the same place, or for a transcoder another one.
        n_features, d_in, d_out: its sizes.
        architecture: as its config names it.
        dtype: of its file.
        k: how many features are active at a time, where that is fixed.
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
    dtype: torch.dtype = torch.float32
    k: int | None = None
    prepend_bos: bool | None = None
    descriptions: Descriptions = field(default_factory=Descriptions)
    weights: KeptWeights = field(default_factory=KeptWeights, repr=False)

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
            CannotFit: there is no memory for them.
            StorageFailed, InvalidArgument: the files cannot be read any more, or were replaced by others.
        """
        found = self.weights.get(self.folder, torch.device(device), dtype or self.dtype)
        check_unchanged(found, self.n_features, self.d_in, self.d_out, self.folder)
        return found

    def check_index(self, index: int, param: str = "index") -> int:
        """See that it has a feature.

        Raises:
            OutOfRange: it has none of this index.
        """
        return checks.in_range(param, index, self.n_features, f"the features of {self.name!r}")

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON."""
        said = self.descriptions
        return {
            "name": self.name,
            "model_id": self.model_id,
            "layer": self.layer,
            "reads": str(self.reads),
            "writes": str(self.writes),
            "architecture": self.architecture,
            "n_features": self.n_features,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "dtype": str(self.dtype).removeprefix("torch."),
            "k": self.k,
            "prepend_bos": self.prepend_bos,
            "folder": str(self.folder),
            "descriptions": {
                "source": said.source,
                "n_described": len(said),
                "n_problems": said.n_problems,
                "problems": list(said.problems),
            },
        }
