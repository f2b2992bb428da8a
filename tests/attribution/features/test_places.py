"""Every place, by all its names, against hooks on a plain transformers model."""

from functools import cache

import pytest
import torch
from torch import Tensor

from attribution.errors import InvalidArgument, OutOfRange
from attribution.features.places import PLACES, Place, hook_name, parse_place, place_rows, place_stream
from attribution.model.capture import Batch, forward
from tests.attribution.plain import distance, module_value, prompts_of, watch
from tests.models import D_HEAD, D_MLP, D_MODEL, FAMILIES, N_HEADS, N_LAYERS, tiny_model, traced

PROMPT = prompts_of([11])[0]
NORMS = {"gemma2": "pre_feedforward_layernorm", "gpt2": "ln_2"}


plain = cache(tiny_model)


@cache
def seen(family: str) -> dict[str, Tensor]:
    return watch(tiny_model(family), PROMPT)


def layer_path(family: str, layer: int) -> str:
    return f"{'transformer.h' if family == 'gpt2' else 'model.layers'}.{layer}"


def read(family: str, *places: Place) -> list[Tensor]:
    model, ids = traced(family), torch.tensor([PROMPT])
    batch = Batch(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], None, 1)
    streams = [place_stream(model, place) for place in places]
    _, captured = forward(model, batch, streams)
    return [place_rows(model, place, captured[stream][0, 0]) for place, stream in zip(places, streams, strict=True)]


def normalised_by_hand(family: str, x: Tensor) -> Tensor:
    """The norm before the MLP of these models, without its weight and bias."""
    x = x.double()
    if family == "gpt2":
        x = x - x.mean(-1, keepdim=True)
    eps = {"gpt2": 1e-5}.get(family, 1e-6)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def expected(family: str, point: str, layer: int) -> Tensor:
    model = plain(family)
    down = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    if point == "mlp_in":
        return module_value(model, PROMPT, f"{layer_path(family, layer)}.mlp", "input")
    if point == "mlp_hidden":
        return module_value(model, PROMPT, f"{layer_path(family, layer)}.{down}", "input")
    if point == "mlp_normalised":
        return normalised_by_hand(family, seen(family)["resid_mid"][layer, 0])
    value = seen(family)[point][layer, 0]
    return value.flatten(-2) if point == "z" else value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_holds_what_a_plain_model_computes_there(family: str) -> None:
    places = [Place(point, layer) for point in PLACES for layer in range(N_LAYERS)]
    for place, found in zip(places, read(family, *places), strict=True):
        assert distance(found, expected(family, place.point, place.layer)) < 1e-5, place


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_those_of_the_place(family: str) -> None:
    z = N_HEADS * (8 if family in ("gpt2", "qwen2") else D_HEAD)
    widths = dict.fromkeys(PLACES, D_MODEL) | {"z": z, "mlp_hidden": D_MLP}
    found = read(family, *(Place(point, 1) for point in PLACES))
    assert dict(zip(PLACES, (rows.shape[-1] for rows in found), strict=True)) == widths


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_weight_makes_the_mlps_input_of_the_normalised_stream(family: str) -> None:
    norm = plain(family).get_submodule(f"{layer_path(family, 1)}.{NORMS.get(family, 'post_attention_layernorm')}")
    weight = 1 + norm.weight if family == "gemma2" else norm.weight
    bias = norm.bias if family == "gpt2" else 0.0
    normalised, given = read(family, Place("mlp_normalised", 1), Place("mlp_in", 1))
    assert distance((normalised * weight + bias).detach(), given) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "module",
    [
        "",
        ".input",
        ".output",
        ".mlp",
        ".mlp.input",
        ".mlp.output",
        ".mlp.down_proj.input",
        ".mlp.c_proj.input",
        ".self_attn",
        ".attn.output",
        ".self_attn.o_proj.input",
        ".attn.c_proj.input",
        ".attn.c_proj.output",
        ".self_attn.o_proj",
        ".ln_2.input",
        ".ln_2",
        ".pre_feedforward_layernorm.input",
        ".pre_feedforward_layernorm.output",
        ".post_feedforward_layernorm.output",
    ],
)
def test_a_module_is_the_place_where_that_module_is(family: str, module: str) -> None:
    path = f"{layer_path(family, 2)}{module}"
    model = plain(family)
    name, _, side = path.rpartition(".")
    if side not in ("input", "output"):
        name, side = path, "output"
    place = parse_place(path)
    try:
        model.get_submodule(name)
    except AttributeError:
        assert place.layer == 2  # a module of another family
        return
    if family == "gemma2" and place.of_module:
        with pytest.raises(InvalidArgument, match="norms before it is added to the stream"):
            place_stream(traced(family), place)
        return
    if name == layer_path(family, 2) and side == "input":
        value = seen(family)["resid_pre"][2, 0]
    else:
        value = module_value(model, PROMPT, name, side)
    assert distance(read(family, place)[0], value) < 1e-5


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("resid_post[2]", Place("resid_post", 2)),
        ("blocks.0.hook_resid_pre", Place("resid_pre", 0)),
        ("blocks.10.hook_resid_mid", Place("resid_mid", 10)),
        ("blocks.2.hook_resid_post", Place("resid_post", 2)),
        ("blocks.2.hook_attn_out", Place("attn_out", 2)),
        ("blocks.2.attn.hook_z", Place("z", 2)),
        ("blocks.2.mlp.hook_in", Place("mlp_in", 2)),
        ("blocks.2.ln2.hook_normalized", Place("mlp_normalised", 2)),
        ("blocks.2.mlp.hook_post", Place("mlp_hidden", 2)),
        ("blocks.2.hook_mlp_out", Place("mlp_out", 2)),
        ("blocks.2.mlp.hook_out", Place("mlp_out", 2)),
        ("model.layers.2", Place("resid_post", 2)),
        ("model.layers.2.output", Place("resid_post", 2)),
        ("model.language_model.layers.12.input", Place("resid_pre", 12)),
        ("layers.3.mlp", Place("mlp_out", 3)),
        ("h.3.mlp", Place("mlp_out", 3)),
        ("h.3", Place("resid_post", 3)),
    ],
)
def test_a_place_has_several_names(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("point", PLACES)
def test_a_place_and_its_texts_are_the_same(point: str) -> None:
    place = Place(point, 7)
    assert parse_place(str(place)) == place
    assert parse_place(hook_name(place)) == place
    assert not parse_place(hook_name(place)).of_module


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post[*]",
        "resid_post[-1]",
        "pattern[2]",
        "blocks.2.hook_q",
        "blocks.x.hook_resid_pre",
        "blocks.2.hook_mlp_in",
        "hook_embed",
        "model.layers.2.post_attention_layernorm",  # before the MLP in Llama, after attention in Gemma
        "model.layers.2.mlp.gate_proj.input",
        "layers.2x",
        "embed_tokens",
    ],
)
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"is no place of an autoencoder that is known; .*resid_post\[2\]"
    ) as caught:
        parse_place(text, param="reads")
    assert caught.value.param == "reads"


@pytest.mark.parametrize("point", PLACES)
def test_a_layer_that_a_model_does_not_have_is_refused(point: str) -> None:
    with pytest.raises(OutOfRange, match="layer is 3; the layers of 'tiny-llama' are 0 to 2"):
        place_stream(traced("llama"), Place(point, N_LAYERS))
