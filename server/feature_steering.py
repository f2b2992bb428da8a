"""Steering by a feature of an autoencoder: what an intervention of type "feature" names, and what it does.

Its direction is added where the autoencoder writes; or the feature is clamped: its activation is computed from what the
autoencoder reads at each position, and what is missing to a value is added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attribution.errors import InvalidRequest
from attribution.features.places import Place, place_rows, place_stream
from attribution.features.source import Source
from attribution.features.sources import FeatureStore
from attribution.interventions.functions import Function, adding, clamping
from attribution.model.block import Block
from attribution.model.edits import Target, targets_of
from attribution.model.resolve import Resolved
from attribution.model.traced import TracedModel
from server.intervention_body import InterventionBody

Clamps = Callable[[Callable[[Tensor], None]], Callable[..., Tensor]]
"""Makes the function of a feature that is clamped, given whom it is to tell the activations it found."""

_IN_ORDER = (
    "resid_pre",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_normalised",
    "mlp_in",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
)
"""The places of a layer, as the model comes by."""


@dataclass(frozen=True)
class Feature:
    """A feature that an intervention names.

    Attributes:
        operation: "add" or "clamp".
        reads: for a clamp, where its activation is read, when that is not where it is changed.
    """

    source: Source
    index: int
    operation: str
    reads: Target | None

    @property
    def described(self) -> dict[str, Any]:
        """What it is, for its receipt."""
        return {
            "source": self.source.name,
            "index": self.index,
            "operation": self.operation,
            "description": self.source.descriptions.of(self.index),
        }

    def site(self, model: TracedModel) -> tuple[Resolved, tuple[Target, ...]]:
        """Where it is changed."""
        writes = self.source.writes
        stream = place_stream(model, writes)
        seen = model.sites[stream.sites[0]]
        width = tuple(stream.cut(torch.empty(seen.shape, device="meta")).shape)
        site = Resolved(str(writes), (stream,), (writes.layer,), False, width, seen.dtype)
        return site, tuple(targets_of(model, stream, point=writes.point))


def find_feature(model: TracedModel, body: InterventionBody, features: FeatureStore) -> Feature:
    """The feature that an intervention names.

    Raises:
        SourceNotFound, InvalidArgument, OutOfRange: no autoencoder of this model, or several, or no such feature.
        InvalidRequest: it cannot be changed where it writes, or is not known there before it writes.
    """
    source = features.source(model, body.source, body.layer)
    assert body.index is not None
    source.check_index(body.index)
    if source.writes.point == "mlp_normalised":
        raise InvalidRequest(
            f"the autoencoder {source.name!r} writes at {source.writes}, inside a norm, where nothing can be changed",
            param="source",
        )
    operation = body.operation or "add"
    reads = _reads(model, source) if operation == "clamp" and source.is_transcoder else None
    return Feature(source, body.index, operation, reads)


def _reads(model: TracedModel, source: Source) -> Target:
    if _order(source.reads) >= _order(source.writes):
        raise InvalidRequest(
            f"the autoencoder {source.name!r} reads at {source.reads}, which the model reaches after {source.writes}, "
            "where it writes: its features cannot be clamped",
            param="operation",
        )
    stream = place_stream(model, source.reads)
    return Target(stream.sites[0], stream.heads, stream.third)


def _order(place: Place) -> tuple[int, int]:
    return place.layer, _IN_ORDER.index(place.point)


def feature_functions(
    model: TracedModel, feature: Feature, body: InterventionBody
) -> tuple[tuple[Function, ...], Clamps | None]:
    """What an intervention by feature does with the rows of its site; reads the weights.

    Raises:
        CannotFit, StorageFailed: the weights cannot be read.
        InvalidRequest: the feature writes nothing, where a direction is needed.
    """
    source, index = feature.source, feature.index
    device = Block(model, source.writes.layer).device
    autoencoder = source.autoencoder(device, model.work_dtype)
    if feature.operation == "clamp":
        assert isinstance(body.value, float)
        rows_of = partial(place_rows, model, source.reads)
        return (), partial(clamping, autoencoder, index, body.value, rows_of)
    direction = autoencoder.directions([index])
    if body.normalise in ("relative", "both") and not bool(direction.ne(0).any()):
        raise InvalidRequest(
            f"the feature {index} of {source.name!r} writes nothing and has no direction", param="index"
        )
    strength = 1.0 if body.strength is None else body.strength
    return (adding(direction, strength, body.normalise, autoencoder.scale_of),), None
