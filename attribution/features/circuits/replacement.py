"""One sequence with transcoders in place of the MLPs: what is active, what is left out, and the graph of the rest.

1. Run the model once (`attribution.model.linearised`): what each transcoder reads, and what each MLP adds.
2. Encode what is read: the active features, by layer, position and index. A feature's own part of what is written is
   its activation times its decoder direction.
3. Error: what the MLP adds, less all that the transcoder writes. A layer without a transcoder is all error.
4. What a transcoder writes that is linear in what it reads (a skip connection; the mean that is put back where rows are
   normalised) is a path of its own, as long as the scale of each row is held fixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.model.linearised import Linearised, Passes, Reader, linearise
from attribution.model.traced import TracedModel


@dataclass(frozen=True, eq=False)
class Transcoder:
    """What stands in for the MLP of a layer.

    Attributes:
        name: of its source.
        point: where it reads, one of `attribution.model.linearised.READ_AT`.
    """

    name: str
    point: str
    autoencoder: Autoencoder


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one sequence, by layer, position and index."""

    layer: Int[Tensor, "feature"]
    position: Int[Tensor, "feature"]
    index: Int[Tensor, "feature"]
    activation: Float[Tensor, "feature"]

    def __len__(self) -> int:
        return len(self.layer)

    @cached_property
    def starts(self) -> list[int]:
        """Where the features of each layer begin; the last entry is their number."""
        last = int(self.layer.max()) + 1 if len(self) else 0
        return [0, *self.layer.bincount(minlength=last).cumsum(0).tolist()]

    def of_layer(self, layer: int) -> slice:
        """The features of one layer."""
        return slice(self.starts[layer], self.starts[layer + 1]) if layer + 1 < len(self.starts) else slice(0, 0)


@dataclass(frozen=True, eq=False)
class Replacement:
    """A model with transcoders in place of MLPs, on one sequence.

    Attributes:
        transcoders: by layer.
        linear: what is linear, with its graph.
        reads: what each encoder multiplies, up to constants, with its graph.
        features: what is active.
        errors: what each MLP adds beyond what its transcoder writes.
        scales: what the decoder directions of a layer are multiplied with, per position; None is 1.
        skips_first: whether what the MLPs add at the first position is left a constant.
    """

    model: TracedModel
    token_ids: list[int]
    transcoders: Mapping[int, Transcoder]
    linear: Linearised
    reads: Mapping[int, Float[Tensor, "pos d_in"]]
    features: ActiveFeatures
    errors: tuple[Float[Tensor, "pos d_model"], ...]
    scales: Mapping[int, Float[Tensor, "pos 1"] | None]
    skips_first: bool = False

    @property
    def n_layers(self) -> int:
        """The number of layers of the model."""
        return self.model.dimensions.n_layers

    @property
    def n_positions(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)

    def writes(self, layer: int, chosen: slice | Tensor) -> Float[Tensor, "chosen d_model"]:
        """What some features of a layer add to the stream: activation × decoder direction."""
        features = self.features
        directions = self.transcoders[layer].autoencoder.directions(features.index[chosen])
        amounts = features.activation[chosen, None].to(directions)
        scale = self.scales[layer]
        return directions * (amounts if scale is None else amounts * scale[features.position[chosen]])


def replace_mlps(
    model: TracedModel,
    token_ids: list[int],
    transcoders: Mapping[int, Transcoder],
    *,
    skip_first: bool = False,
    most_encoded: int = 1 << 24,
) -> Replacement:
    """Put transcoders in place of MLPs, on one sequence.

    Args:
        skip_first: leave what the MLPs add at the first position a constant: neither features nor errors.
        most_encoded: how many activations are computed at once, positions × features.
    """
    readers = {layer: Reader(one.point, passes(one.autoencoder)) for layer, one in transcoders.items()}
    linear = linearise(model, token_ids, readers)
    found, errors, scales, reads = [], [], {}, {}
    for layer in range(model.dimensions.n_layers):
        added = linear.values(layer + 1).to(model.work_dtype)
        if (one := transcoders.get(layer)) is None:
            errors.append(added)
        else:
            read = linear.reads[layer]
            assert read is not None
            x = read.detach().to(one.autoencoder.W_enc)
            active, written = encoded(one.autoencoder, x, most_encoded)
            if skip_first:
                active = active[:, active[0] > 0]
            found.append(torch.cat([torch.full_like(active[:1], layer), active]))
            errors.append(added - written.to(added))
            scales[layer], reads[layer] = one.autoencoder.scale_of(x), what_is_multiplied(one.autoencoder, read, x)
        if skip_first:
            errors[-1][0] = 0
    features = features_of(found, model.work_dtype)
    return Replacement(model, token_ids, transcoders, linear, reads, features, tuple(errors), scales, skip_first)


def encoded(autoencoder: Autoencoder, x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Position, index and activation of what is active, as rows of a float64 tensor, and what is written."""
    rows = max(1, most // autoencoder.n_features)
    active, written = [], []
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        activations = autoencoder.encode(part)
        position, index = activations.nonzero(as_tuple=True)
        active.append(torch.stack([position.double() + start, index.double(), activations[position, index].double()]))
        written.append(autoencoder.decode(activations, part))
    return torch.cat(active, dim=1), torch.cat(written)


def features_of(found: Sequence[Tensor], dtype: torch.dtype) -> ActiveFeatures:
    """Layer, position, index and activation, as rows of float64 tensors in this order, as one."""
    layer, position, index, activation = torch.cat(list(found), dim=1) if found else torch.zeros(4, 0).double()
    return ActiveFeatures(layer.long(), position.long(), index.long(), activation.to(dtype))


def what_is_multiplied(
    autoencoder: Autoencoder, read: Float[Tensor, "*rows pos d_in"], at: Float[Tensor, "*rows pos d_in"]
) -> Float[Tensor, "*rows pos d_in"]:
    """What the encoder multiplies, up to constants, linear in what is read: the scale of each row is that of `at`."""
    if autoencoder.normalisation == "none":
        return autoencoder.given(read)
    x, at = autoencoder.given(read), autoencoder.given(at)
    if autoencoder.normalisation == "constant_norm":
        return x * (autoencoder.d_in**0.5 / at.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return (x - x.mean(-1, keepdim=True)) / ((at - at.mean(-1, keepdim=True)).std(-1, keepdim=True) + 1e-5)


def passes(autoencoder: Autoencoder) -> Passes | None:
    """What is written that is linear in what is read, the scale of each row held fixed; None when nothing is."""
    skip, shifts = autoencoder.W_skip, autoencoder.restores and autoencoder.normalisation == "layer_norm"
    if skip is None and not shifts:
        return None

    def passed(read: Tensor, at: Tensor) -> Tensor:
        x, scale = autoencoder.given(read), autoencoder.scale_of(at)
        written = x.new_zeros(*x.shape[:-1], autoencoder.d_out) if skip is None else x @ skip
        written = written if scale is None else written * scale
        return written + x.mean(-1, keepdim=True) if shifts else written

    return passed
