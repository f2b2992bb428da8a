"""A steering vector: a direction in the activations of a model, or one for each of several layers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument, VectorMismatch
from attribution.stored import Identity


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction at a site of a model, or one for each of several layers.

    Attributes:
        name: under which it is kept.
        vector: [*width], or [layer, *width] when it is `stacked`; on the CPU. The width is that of the site: `d_model`
            in the stream, (heads, d_head) at q, k, v and z.
        selector: the site that it was computed at.
        layers: those of the selector; () when it is a module's path without a list of layers.
        stacked: whether the first axis of `vector` counts `layers`.
        statistics: one dict of numbers per layer, as JSON.
        provenance: where it came from, as JSON; under "model" the record of the model's `Identity`.
    """

    name: str
    vector: Tensor = field(repr=False)
    selector: str
    layers: tuple[int, ...]
    stacked: bool
    provenance: dict[str, Any] = field(repr=False)
    statistics: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    @property
    def identity(self) -> Identity:
        """The model that it was computed with.

        Raises:
            TypeError, ValueError, KeyError: the provenance names none.
        """
        return Identity.read(self.provenance["model"])

    @property
    def width(self) -> tuple[int, ...]:
        """The shape of one layer's direction."""
        return tuple(self.vector.shape[1:] if self.stacked else self.vector.shape)

    def rows(self) -> Tensor:
        """One row per layer, [layer, *width], whether it is stacked or not."""
        return self.vector if self.stacked else self.vector[None]

    def at(self, layer: int) -> Tensor:
        """The direction for a layer, [*width]. A vector of one layer may be used in every other.

        Raises:
            OutOfRange: it has a direction for each of several layers, and none for this one.
        """
        if not self.stacked:
            return self.vector
        if layer not in self.layers:
            raise checks.out_of_range("layer", layer, f"the steering vector {self.name!r} has {list(self.layers)}")
        return self.vector[self.layers.index(layer)]

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON; `norms` has one entry per layer."""
        return {
            "name": self.name,
            "selector": self.selector,
            "layers": list(self.layers),
            "shape": list(self.vector.shape),
            "dtype": str(self.vector.dtype).removeprefix("torch."),
            "norms": [float(row.double().norm()) for row in self.rows()],
            "statistics": list(self.statistics),
            "provenance": self.provenance,
        }

    def check_model(self, identity: Identity) -> None:
        """See that it was computed with the weights of `identity`.

        Raises:
            VectorMismatch: it was not.
        """
        if self.identity.fingerprint != identity.fingerprint:
            raise VectorMismatch(
                f"the steering vector {self.name!r} was computed with the model {self.identity}, and this is "
                f"{identity}; compute it again with this model, or name one of its own",
                param="name",
            )

    def check_width(self, width: Sequence[int], where: str) -> None:
        """See that it can be used at a site of this width; `where` names the site.

        Raises:
            VectorMismatch: it cannot.
        """
        if self.width != tuple(width):
            raise VectorMismatch(
                f"the steering vector {self.name!r} was computed at {self.selector} and has the width "
                f"{list(self.width)}; {where} has {list(width)}",
                param="name",
            )


def check_vector(vector: SteeringVector, tensor: Tensor) -> None:
    """See that a vector with the numbers of `tensor` can be kept.

    Raises:
        InvalidArgument, ShapeMismatch: it cannot, naming the field.
    """
    if not (tensor.is_floating_point() and tensor.numel() and tensor.dim()):
        raise InvalidArgument(
            f"a steering vector holds floating numbers; found {tensor.dtype} of shape {list(tensor.shape)}",
            param="vector",
        )
    if wrong := int((~tensor.isfinite()).sum()):
        raise InvalidArgument(f"the vector has {wrong} numbers that are not finite (NaN or inf)", param="vector")
    if vector.stacked and (not vector.layers or tensor.dim() < 2 or len(tensor) != len(vector.layers)):
        raise checks.mismatch("vector", f"the shape {list(tensor.shape)}", f"a row for each layer {vector.layers}")
    try:
        json.dumps([vector.provenance, vector.statistics], allow_nan=False)
        vector.identity  # noqa: B018  it raises where there is none
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidArgument(
            f"the provenance of a steering vector is JSON, with the record of the model's identity under 'model' "
            f"(`session.identity.record()`): {error!r}",
            param="provenance",
        ) from error
