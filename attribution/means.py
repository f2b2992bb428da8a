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

from attribution import checks
from attribution.errors import CannotFit, InvalidArgument, ShapeMismatch
from attribution.model.block import Block
from attribution.operation import Progress, Steps

if TYPE_CHECKING:
    from attribution.model.traced import TracedModel
    from attribution.session import LocalSession
    from attribution.stored import StoredSample


@dataclass(frozen=True)
class Means:
    """The means of all layers; the position axis has one entry unless they are per position.

    Attributes:
        z: of the heads, before the output projection.
        mlp_out: what the MLPs add to the stream.
        attn_out: what attention adds to the stream; None unless it was asked for.
    """

    z: Float[Tensor, "layer pos head d_head"]
    mlp_out: Float[Tensor, "layer pos d_model"]
    attn_out: Float[Tensor, "layer pos d_model"] | None = None


class MeanCache:
    """The means that were computed last, so that a sweep over the samples of a dataset reads it once."""

    def __init__(self) -> None:
        self._key: Any = None
        self._means: Means | None = None

    def get(
        self, session: "LocalSession", dataset_id: str, *, per_position: bool, attention: bool = False
    ) -> Steps[Means]:
        """The means over a dataset; progress counts its samples when they are computed.

        Args:
            attention: with those of what attention adds, which whole layers need.

        Raises:
            ShapeMismatch: means per position of samples of different lengths.
            CannotFit: there is no memory for them.
        """
        samples = [session.sample(dataset_id, one) for one in session.sample_ids(dataset_id)]
        key = (per_position, [(one.layout.path, one.layout.key) for one in samples])
        known = self._means
        if known is None or key != self._key or (attention and known.attn_out is None):
            known = self._key = self._means = None  # the room that these take is free for the others
            known = yield from _means(session.model if attention else None, samples, per_position=per_position)
            self._key, self._means = key, known
        return known


def means_for(
    session: "LocalSession",
    sample: "StoredSample",
    mode: str,
    source_dataset_id: str | None,
    *,
    attention: bool = False,
) -> Steps[Means | None]:
    """The means that take the place of what a sample has; None of mode "zero", whose place is taken by nothing.

    Args:
        source_dataset_id: whose means; None is the sample's dataset.
        attention: as in `MeanCache.get`.

    Raises:
        InvalidArgument: a dataset, and no mean is asked for.
        ShapeMismatch: means at each position, of samples of another length than this one.
        CannotFit: as `MeanCache.get`.
    """
    if mode == "zero":
        if source_dataset_id is not None:
            raise InvalidArgument(
                "source_dataset_id names samples, and mode 'zero' takes none", param="source_dataset_id"
            )
        return None
    dataset_id, per_position = source_dataset_id or sample.dataset_id, mode == "position_mean"
    means = yield from session.means.get(session, dataset_id, per_position=per_position, attention=attention)
    if per_position and means.z.shape[1] != sample.seq_len:
        found, expected = f"{means.z.shape[1]} tokens a sample", f"{sample.seq_len}, as the sample has"
        raise checks.mismatch("source_dataset_id", found, expected)
    return means


def _means(model: "TracedModel | None", samples: "list[StoredSample]", *, per_position: bool) -> Steps[Means]:
    """The means; with those of attention when a model is given, whose projections compute them."""
    lengths = sorted({one.seq_len for one in samples})
    if per_position and len(lengths) > 1:
        raise ShapeMismatch(
            f"the samples of this dataset have {lengths[0]} to {lengths[-1]} tokens; a mean at each position needs "
            "samples of one length (mode 'mean' averages over all positions)",
            param="mode",
        )
    positions = lengths[0] if per_position else 1
    names = ("z", "mlp_out") if model is None else ("z", "mlp_out", "attn_out")
    _check_room(samples[0], names, positions)
    totals = {
        name: torch.zeros(shape[0], positions, *shape[2:], dtype=torch.float64)
        for name, shape in _shapes(samples[0], names).items()
    }
    tokens = 0
    for number, sample in enumerate(samples, start=1):
        _add(totals, sample, model, per_position=per_position)
        tokens += 1 if per_position else sample.seq_len
        yield Progress(number, len(samples))
    double = samples[0].layout.slots["z"].dtype == torch.float64
    return Means(**{name: total / tokens if double else (total / tokens).float() for name, total in totals.items()})


def _shapes(sample: "StoredSample", names: tuple[str, ...]) -> dict[str, torch.Size]:
    slots = sample.layout.slots
    return {name: torch.Size(slots["mlp_out" if name == "attn_out" else name].shape) for name in names}


def _add(totals: dict[str, Tensor], sample: "StoredSample", model: "TracedModel | None", *, per_position: bool) -> None:
    """Add the sums of a sample, layer by layer, so that no more than one layer is there in float64 twice."""
    for layer in range(len(totals["z"])):
        found = {name: sample.read(name, layer) for name in ("z", "mlp_out")}
        if model is not None:
            found["attn_out"] = Block(model, layer).attn_out(found["z"]).cpu()
        for name, rows in found.items():
            totals[name][layer] += rows.double() if per_position else rows.double().sum(0, keepdim=True)


def _check_room(sample: "StoredSample", names: tuple[str, ...], positions: int) -> None:
    shapes = _shapes(sample, names).values()
    needed = sum(12 * shape[0] * positions * torch.Size(shape[2:]).numel() for shape in shapes)  # float64, then float32
    free = psutil.virtual_memory().available
    if needed > free:
        raise CannotFit(
            f"the means of this dataset take {needed:,} bytes and {free:,} are free; mode 'mean' takes less than "
            "means per position, and mode 'zero' none",
            param="mode",
        )
