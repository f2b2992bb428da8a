"""Where an autoencoder sits in a model: a point of a layer, by Sightline's names, by those of TransformerLens and by
the modules of transformers."""

import re
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from attribution import checks
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
    "attn.hook_out": "attn_out",
    "mlp.hook_out": "mlp_out",
}
_MODULES = {
    ".input": "resid_pre",
    ".output": "resid_post",
    "ln_2.input": "resid_mid",
    "ln_2.output": "mlp_in",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
    "mlp.input": "mlp_in",
    "mlp.output": "mlp_out",
    "mlp.down_proj.input": "mlp_hidden",
    "mlp.down_proj.output": "mlp_out",
    "mlp.c_proj.input": "mlp_hidden",
    "mlp.c_proj.output": "mlp_out",
    "self_attn.output": "attn_out",
    "self_attn.o_proj.input": "z",
    "self_attn.o_proj.output": "attn_out",
    "attn.output": "attn_out",
    "attn.c_proj.input": "z",
    "attn.c_proj.output": "attn_out",
}
"""Of a layer; without post_attention_layernorm, which is before the MLP in Llama and after attention in Gemma."""

_BEFORE_A_NORM = re.compile(r"(mlp|attn)\.hook_out|(mlp|self_attn|attn)(\.\w+)?\.output")
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.(.+?))??(?:\.(input|output))?")
_HOOK_OF_MODULE = {"attn_out": "attn.hook_out", "mlp_out": "mlp.hook_out"}
_POINT = re.compile(r"(\w+)\[(\d+)\]")


@dataclass(frozen=True)
class Place:
    """A point of one layer.

    Attributes:
        of_module: named by a module of attention or MLP, which some models norm before it is added to the stream; there
            it is not the point, and refused.
    """

    point: str
    layer: int
    of_module: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.point}[{self.layer}]"


def parse_place(text: str, param: str = "point") -> Place:
    """The place that a text names: "resid_post[2]", "blocks.2.hook_resid_post" or "model.layers.2" (its output).

    Raises:
        InvalidArgument: it names none; the message says which there are.
    """
    if (point := _POINT.fullmatch(text)) and point[1] in PLACES:
        return Place(point[1], int(point[2]))
    if (hook := _HOOK.fullmatch(text)) and hook[2] in _HOOKS:
        return Place(_HOOKS[hook[2]], int(hook[1]), bool(_BEFORE_A_NORM.fullmatch(hook[2])))
    if module := _MODULE.fullmatch(text):
        name = f"{module[2] or ''}.{module[3] or 'output'}"
        if name in _MODULES:
            return Place(_MODULES[name], int(module[1]), bool(_BEFORE_A_NORM.fullmatch(name)))
    raise InvalidArgument(
        f"{text!r} is no place of an autoencoder that is known; it is a point and a layer, as 'resid_post[2]', with "
        f"one of {', '.join(PLACES)}, or a hook of TransformerLens, as 'blocks.2.hook_resid_post', or a module, as "
        "'model.layers.2.output'",
        param=param,
    )


def hook_name(place: Place) -> str:
    """The hook of TransformerLens that a place is."""
    hook = next(hook for hook, point in _HOOKS.items() if point == place.point)
    return f"blocks.{place.layer}.{_HOOK_OF_MODULE[place.point] if place.of_module else hook}"


def place_stream(model: TracedModel, place: Place) -> Stream:
    """What is to be captured for a place.

    Raises:
        UnsupportedModel: the points of the model are not proved.
        OutOfRange: the model has no such layer.
        InvalidArgument: the place is a module whose output this model norms before it is added to the stream.
    """
    family = family_of(model)
    checks.in_range("layer", place.layer, model.dimensions.n_layers, f"the layers of {model.id!r}")
    norm = {"mlp_out": family.mlp_post_norm, "attn_out": family.attn_post_norm}.get(place.point)
    if place.of_module and norm is not None:
        raise InvalidArgument(
            f"{place} was named by its module, whose output {model.id!r} norms before it is added to the stream; if "
            f"the autoencoder was trained on what is added, say so by the point {str(place)!r}",
            param="point",
        )
    if place.point == "mlp_in":
        return Stream((Site(f"{family.layers}.{place.layer}.{family.mlp}", "input"),))
    if place.point == "mlp_hidden":
        return Stream((Site(f"{family.layers}.{place.layer}.{family.down}", "input"),))
    return stream_of(model, "resid_mid" if place.point == "mlp_normalised" else place.point, [place.layer])


def place_rows(model: TracedModel, place: Place, captured: Float[Tensor, "..."]) -> Float[Tensor, "*rows d_in"]:
    """What an autoencoder at this place reads, given what `place_stream` captured, without its axis of layers:
    [*rows, width], or of z [*rows, head, d_head].
    """
    if place.point == "z":
        return captured.flatten(-2)
    if place.point != "mlp_normalised":
        return captured
    norm = Block(model, place.layer).mlp_norm
    x = captured.to(norm.weight)
    return norm.at(x).scaled(x).to(captured.dtype)
