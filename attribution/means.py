"""What heads and MLPs write on average over a dataset of stored samples: what mean ablation puts in their place.

"mean" averages over all positions of all samples. "position_mean" averages over the samples at each position, which
needs samples of one length; when they are aligned, as puzzles of one shape are, it takes away what a component says
about this sample, and leaves what it says about the position.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import CannotFit, ShapeMismatch
from attribution.operation import Progress, Steps

if TYPE_CHECKING:
    from attribution.session import LocalSession
    from attribution.stored import StoredSample


@dataclass(frozen=True)
class Means:
    """The means of all layers; the position axis has one entry unless they are per position.

    Attributes:
        z: of the heads, before the output projection.
        mlp_out: what the MLPs add to the stream.
    """

    z: Float[Tensor, "layer pos head d_head"]
    mlp_out: Float[Tensor, "layer pos d_model"]


class MeanCache:
    """The means that were computed last, so that a sweep over the samples of a dataset reads it once."""

    def __init__(self) -> None:
        self._key: Any = None
        self._means: Means | None = None

    def get(self, session: "LocalSession", dataset_id: str, *, per_position: bool) -> Steps[Means]:
        """The means over a dataset; progress counts its samples when they are computed.

        Raises:
            ShapeMismatch: means per position of samples of different lengths.
            CannotFit: there is no memory for them.
        """
        samples = [session.sample(dataset_id, one) for one in session.sample_ids(dataset_id)]
        key = (per_position, [(one.layout.path, one.layout.key) for one in samples])
        if self._means is None or key != self._key:
            self._key, self._means = None, None  # the room that these take is free for the others
            self._means = yield from _means(samples, per_position=per_position)
            self._key = key
        return self._means


def _means(samples: "list[StoredSample]", *, per_position: bool) -> Steps[Means]:
    lengths = sorted({one.seq_len for one in samples})
    if per_position and len(lengths) > 1:
        raise ShapeMismatch(
            f"the samples of this dataset have {lengths[0]} to {lengths[-1]} tokens; a mean at each position needs "
            "samples of one length (mode 'mean' averages over all positions)",
            param="mode",
        )
    _check_room(samples[0], lengths[0] if per_position else 1)
    totals: dict[str, Tensor] = {}
    tokens = 0
    for number, sample in enumerate(samples, start=1):
        for name in ("z", "mlp_out"):
            _add(totals, name, sample, per_position=per_position)
        tokens += 1 if per_position else sample.seq_len
        yield Progress(number, len(samples))
    double = samples[0].layout.slots["z"].dtype == torch.float64
    z, mlp_out = (total / tokens if double else (total / tokens).float() for total in (totals["z"], totals["mlp_out"]))
    return Means(z, mlp_out)


def _add(totals: dict[str, Tensor], name: str, sample: "StoredSample", *, per_position: bool) -> None:
    """Add the sums of a sample, layer by layer, so that no more than one layer is there in float64 twice."""
    slot = sample.layout.slots[name].shape
    layers, positions = slot[0], slot[1] if per_position else 1
    total = totals.setdefault(name, torch.zeros(layers, positions, *slot[2:], dtype=torch.float64))
    for layer in range(layers):
        rows = sample.read(name, layer).double()
        total[layer] += rows if per_position else rows.sum(0, keepdim=True)


def _check_room(sample: "StoredSample", positions: int) -> None:
    shapes = [sample.layout.slots[name].shape for name in ("z", "mlp_out")]
    needed = sum(12 * shape[0] * positions * torch.Size(shape[2:]).numel() for shape in shapes)  # float64, then float32
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotFit(
            f"the means of this dataset take {needed:,} bytes and {free:,} are free; mode 'mean' takes less than "
            "means per position, and mode 'zero' none",
            param="mode",
        )
