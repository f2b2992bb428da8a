"""Where an autoencoder sits in a model: a point of a layer, by Sightline's names and by those of TransformerLens."""

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument
from attribution.model.block import Block, family_of
from attribution.model.capture import Stream
from attribution.model.resolve import stream_of
from attribution.model.traced import Site, TracedModel

PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "z", "mlp_in", "mlp_normalised", "mlp_hidden", "mlp_out")
"""The points that selectors know, and of the MLP: what it is given, the same before the norm's weight and bias, and
what its last projection is given."""

_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "z",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_normalized": "mlp_normalised",
    "mlp.hook_post": "mlp_hidden",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_POINT = re.compile(r"(\w+)\[(\d+)\]")


@dataclass(frozen=True)
class Place:
    """A point of one layer."""

    point: str
    layer: int

    def __str__(self) -> str:
        return f"{self.point}[{self.layer}]"


def parse_place(text: str, param: str = "point") -> Place:
    """The place that a text names: "resid_post[2]" or "blocks.2.hook_resid_post".

    Raises:
        InvalidArgument: it names none; the message says which there are.
    """
    if (hook := _HOOK.fullmatch(text)) and hook[2] in _HOOKS:
        return Place(_HOOKS[hook[2]], int(hook[1]))
    if (point := _POINT.fullmatch(text)) and point[1] in PLACES:
        return Place(point[1], int(point[2]))
    raise InvalidArgument(
        f"{text!r} is no place of an autoencoder; it is a point and a layer, as 'resid_post[2]', with one of "
        f"{', '.join(PLACES)}, or a hook of TransformerLens, as 'blocks.2.hook_resid_post'",
        param=param,
    )


def place_stream(model: TracedModel, place: Place) -> Stream:
    """What is to be captured for a place.

    Raises:
        UnsupportedModel: the points of the model are not proved.
    """
    family = family_of(model)
    if place.point == "mlp_in":
        return Stream((Site(f"{family.layers}.{place.layer}.{family.mlp}", "input"),))
    if place.point == "mlp_hidden":
        return Stream((Site(f"{family.layers}.{place.layer}.{family.down}", "input"),))
    return stream_of(model, "resid_mid" if place.point == "mlp_normalised" else place.point, [place.layer])


def place_rows(
    model: TracedModel, place: Place, captured: Float[Tensor, "*rows width"] | Float[Tensor, "*rows head d_head"]
) -> Float[Tensor, "*rows d_in"]:
    """What an autoencoder at this place reads, given what `place_stream` captured, without its axis of layers."""
    if place.point == "z":
        return captured.flatten(-2)
    if place.point != "mlp_normalised":
        return captured
    norm = Block(model, place.layer).mlp_norm
    x = captured.to(norm.weight)
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    return (x * norm.at(captured.to(norm.weight)).norm_scale).to(captured.dtype)
