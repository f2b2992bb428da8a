"""What a model is probed for when it is loaded, and that a table of points with a mistake in it is caught."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attribution.errors import BadSelector
from attribution.model.capture import forward
from attribution.model.families import FAMILIES, Place
from attribution.model.load import trace_model
from attribution.model.probe import probe_batch, prove
from attribution.model.resolve import resolve
from attribution.model.traced import TracedModel
from tests.models import FAMILIES as NAMES
from tests.models import tiny_model, tiny_tokenizer, traced


def first(value: Any) -> Tensor | None:
    if isinstance(value, tuple):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None


@pytest.mark.parametrize("family", NAMES)
def test_the_probe_sees_what_hooks_on_every_module_of_a_plain_model_see(family: str) -> None:
    plain, seen = tiny_model(family), {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = (*args, *kwargs.values())
            seen[name, "output"] = first(output)
            seen[name, "input"] = first(given[0]) if given else None

        return see

    for name, module in plain.named_modules():
        if name:
            module.register_forward_hook(hook(name), with_kwargs=True)
    batch = probe_batch(traced(family), 2)
    with torch.no_grad():
        plain(batch.ids, position_ids=batch.positions, logits_to_keep=3)
    expected = {
        site: (tuple(tensor.shape[2:]), tensor.dtype, tensor.shape[1] == 3)
        for site, tensor in seen.items()
        if tensor is not None and tensor.shape[0] == 2
    }
    found = {
        tuple(site): (one.shape, one.dtype, one.tail) for site, one in traced(family).sites.items() if one.tokenwise
    }
    assert found == expected
    assert {path for (path, _), (_, _, tail) in found.items() if tail} == {"lm_head"}


@pytest.mark.parametrize("family", NAMES)
def test_the_points_of_every_family_are_proved(family: str) -> None:
    assert prove(traced(family)) is None


def with_table(family: str, monkeypatch: pytest.MonkeyPatch, **places: Place) -> TracedModel:
    """The family's tiny model, loaded when the table has these places in it."""
    table = replace(FAMILIES[family], points=FAMILIES[family].points | places)
    monkeypatch.setitem(FAMILIES, family, table)
    return trace_model(f"tiny-{family}", tiny_model(family), tiny_tokenizer())


MID = r"resid_mid = resid_pre \+ attn_out does not hold"
POST = r"resid_post = resid_mid \+ mlp_out does not hold"
PATTERN = "z = pattern · v does not hold"


@pytest.mark.parametrize(
    ("family", "places", "says"),
    [
        # the wrong side, or the wrong place, in the stream
        ("qwen2", {"resid_mid": Place("post_attention_layernorm")}, MID),
        ("llama", {"resid_mid": Place("input_layernorm", "input")}, MID),
        ("gpt2", {"resid_mid": Place("ln_2")}, MID),
        ("gpt2", {"resid_pre": Place("ln_1")}, MID),
        ("qwen2", {"resid_pre": Place("")}, MID),
        ("qwen3", {"resid_post": Place("", "input")}, POST),
        ("llama", {"resid_post": Place("mlp")}, POST),
        ("qwen2", {"mlp_out": Place("mlp", "input")}, POST),
        ("gpt2", {"attn_out": Place("attn.c_proj", "input")}, MID),
        # Gemma 2 puts norms behind attention and MLP
        ("gemma2", {"attn_out": Place("self_attn.o_proj")}, MID),
        ("gemma2", {"resid_mid": Place("post_attention_layernorm", "input")}, MID),
        ("gemma2", {"mlp_out": Place("mlp")}, POST),
        # Qwen 3 puts norms behind q and k
        ("qwen3", {"q": Place("self_attn.q_proj", heads="query")}, PATTERN),
        ("qwen3", {"k": Place("self_attn.k_proj", heads="kv")}, PATTERN),
        # one projection for another
        ("llama", {"k": Place("self_attn.v_proj", heads="kv")}, PATTERN),
        ("llama", {"v": Place("self_attn.k_proj", heads="kv")}, PATTERN),
        ("qwen2", {"z": Place("self_attn.o_proj", heads="query")}, PATTERN),
        ("qwen2", {"z": Place("self_attn.q_proj", heads="query")}, PATTERN),
        ("gpt2", {"q": Place("attn.c_attn", heads="query", third=1)}, PATTERN),
        ("gpt2", {"v": Place("attn.c_attn", heads="query", third=0)}, PATTERN),
        # the wrong width
        ("qwen3", {"z": Place("self_attn.o_proj", heads="query")}, r"z has the shape .*, 8\], expected .*, 10\]"),
        ("llama", {"q": Place("self_attn.q_proj")}, r"q has the shape \[3, 7, 60\], expected \[3, 7, 6, 10\]"),
        ("llama", {"k": Place("self_attn.q_proj", heads="query")}, "k has the shape"),
        ("gpt2", {"q": Place("attn.c_attn", heads="query")}, "q has the shape"),
        ("gpt2", {"mlp_out": Place("mlp.c_fc")}, "mlp_out has the shape"),
        # no such place
        ("qwen2", {"q": Place("self_attn.q_norm")}, r"q is not at model\.layers\.0\.self_attn\.q_norm\.output"),
        ("qwen2", {"z": Place("self_attn.rope", "input")}, r"z is not at model\.layers\.0\.self_attn\.rope\.input"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_table_is_caught_and_leaves_the_model_with_paths_only(
    family: str, places: dict[str, Place], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_table(family, monkeypatch, **places)
    assert model.family is None
    assert model.note is not None
    assert model.note.startswith("its points failed their proof: ")
    with pytest.raises(BadSelector, match=f"{family} has no points .its points failed their proof: .*{says}"):
        resolve(model, f"{next(iter(places))}[0]")
    stream = resolve(model, "lm_head.output").streams[0]
    _, captured = forward(model, probe_batch(model, 1), [stream])
    assert captured[stream].shape[:3] == (1, 1, 3)


def test_the_right_places_under_other_names_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # the table is judged by what the places hold, not by what they are called
    model = with_table(
        "llama",
        monkeypatch,
        mlp_out=Place("mlp.down_proj"),
        resid_pre=Place("input_layernorm", "input"),
    )
    assert model.note is None


class Tapped(nn.Module):
    """An MLP with a module beside it that is given its output, and whose own output nobody uses."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.tap = mlp, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        self.tap(out)
        return out


def test_a_place_that_holds_the_right_numbers_beside_the_path_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = tiny_model("qwen2")
    for layer in plain.model.layers:
        layer.mlp = Tapped(layer.mlp)
    points = FAMILIES["qwen2"].points | {"mlp_out": Place("mlp.tap")}
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], points=points))
    model = trace_model("tapped", plain, tiny_tokenizer())
    assert model.note == "its points failed their proof: overwriting mlp_out does not change the logits"


def test_a_proof_that_cannot_be_carried_out_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    # an attention that has no `scaling`
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], attention="mlp"))
    model = trace_model("tiny-qwen2", tiny_model("qwen2"), tiny_tokenizer())
    assert model.family is None
    assert model.note is not None
    assert "AttributeError" in model.note
    assert "scaling" in model.note


@pytest.mark.parametrize("broken", ["weight", "bias"])
def test_a_model_that_computes_nan_has_no_proved_points(broken: str) -> None:
    plain = tiny_model("qwen2")
    with torch.no_grad():
        getattr(plain.model.layers[1].self_attn.v_proj, broken)[0] = float("nan")
    model = trace_model("nan", plain, tiny_tokenizer())
    assert model.family is None
    assert model.note is not None
    assert "does not hold (relative error nan)" in model.note


def test_a_family_member_that_adds_something_else_to_the_stream_has_no_proved_points() -> None:
    # as a checkpoint with its own code, or a later transformers, might
    plain = tiny_model("qwen2")
    layer = plain.model.layers[2]
    original = type(layer).forward
    layer.forward = lambda *args, **kwargs: original(layer, *args, **kwargs) * 1.01
    model = trace_model("scaled", plain, tiny_tokenizer())
    assert model.note is not None
    assert "resid_post = resid_mid + mlp_out does not hold" in model.note
