"""What is put in place of what a model writes: nothing, the mean over a dataset, or what another sample has there.

Each is a function of a point and a layer: [pos, width], of "z" [pos, head, d_head]; one position stands for all.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from attribution import checks
from attribution.errors import ShapeMismatch
from attribution.means import Means
from attribution.model.block import Block
from attribution.model.replaced import Replacement
from attribution.model.traced import TracedModel
from attribution.stored import StoredSample

Written = Callable[[str, int], Tensor]


def nothing(model: TracedModel) -> Written:
    """Zeros."""
    dims = model.dimensions
    width = {"z": (dims.n_heads, dims.d_head)}

    return lambda point, layer: torch.zeros(1, *width.get(point, (dims.d_model,)))


def average(means: Means) -> Written:
    """The means of a dataset."""
    return lambda point, layer: getattr(means, point)[layer]


def of_sample(model: TracedModel, sample: StoredSample) -> Written:
    """What a stored sample has; a layer of a point that was asked for once is kept."""

    @cache
    def read(point: str, layer: int) -> Tensor:
        if point in ("z", "mlp_out"):
            return sample.read(point, layer)
        if point in ("resid_pre", "resid_post"):
            return sample.read("resid", layer + (point == "resid_post"))
        added = Block(model, layer).attn_out(sample.read("z", layer)).cpu()
        return added if point == "attn_out" else sample.read("resid", layer) + added

    return read


def replacement(
    written: Written, point: str, layer: int, head: int | None = None, positions: tuple[int, ...] | None = None
) -> Replacement:
    """What is written at a point put there, at some positions or (None) at all of them."""
    value = written(point, layer)
    if head is not None:
        value = value[:, head]
    if positions is not None and len(value) > 1:
        value = value[list(positions)]
    return Replacement(point, layer, value, head, positions)


def check_positions(name: str, positions: list[int] | None, source: StoredSample, sample: StoredSample) -> None:
    """See that a sample has every position at which something of a source is put into it.

    Args:
        name: the argument that the positions came from.

    Raises:
        ShapeMismatch: all positions, of samples of different lengths.
        OutOfRange: a position that one of them does not have.
    """
    lengths = (source.seq_len, sample.seq_len)
    if positions is not None:
        for position in positions:
            checks.in_range(name, position, min(lengths), "the positions that both samples have")
    elif lengths[0] != lengths[1]:
        raise ShapeMismatch(
            f"sample {source.sample_id!r} of {source.dataset_id!r} has {lengths[0]} tokens and sample "
            f"{sample.sample_id!r} of {sample.dataset_id!r} has {lengths[1]}; name the positions that correspond "
            f"(0 to {min(lengths) - 1} are in both)",
            param=name,
        )
