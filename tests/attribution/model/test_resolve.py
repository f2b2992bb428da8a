"""What selectors name in a given model, and what every refusal says."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from attribution.errors import BadSelector
from attribution.model.load import trace_model
from attribution.model.resolve import resolve
from attribution.model.traced import LOGITS, Site, TracedModel
from attribution.positions import Window, parse_window
from tests.models import D_MLP, D_MODEL, VOCAB, tiny_tokenizer, traced


def paths(selector: str, family: str = "qwen3") -> list[Site]:
    (stream,) = resolve(traced(family), selector).streams
    return list(stream.sites)


@pytest.mark.parametrize(
    ("selector", "layers", "stacked", "sites"),
    [
        ("model.layers[1].output", (), False, ["model.layers.1"]),
        ("model.layers.1.output", (), False, ["model.layers.1"]),
        ("model.layers[-1].output", (), False, ["model.layers.2"]),
        ("model.layers[*].output", (0, 1, 2), True, [f"model.layers.{i}" for i in range(3)]),
        ("model.layers[::2].mlp.output", (0, 2), True, ["model.layers.0.mlp", "model.layers.2.mlp"]),
        ("model.layers[1:2].output", (1,), True, ["model.layers.1"]),
        ("model.layers[::-2].output", (2, 0), True, ["model.layers.2", "model.layers.0"]),
        ("lm_head.output", (), False, ["lm_head"]),
        ("model.norm.output", (), False, ["model.norm"]),
    ],
)
def test_a_module_path_names_these_modules(
    selector: str, layers: tuple[int, ...], stacked: bool, sites: list[str]
) -> None:
    resolved = resolve(traced("qwen3"), selector)
    assert (resolved.layers, resolved.stacked) == (layers, stacked)
    assert [site.path for site in resolved.streams[0].sites] == sites


def test_a_slice_of_one_layer_keeps_its_axis_and_an_index_does_not() -> None:
    model = traced("qwen3")
    assert resolve(model, "z[1:2]").stacked
    assert not resolve(model, "z[1]").stacked
    assert resolve(model, "z[1]").layers == resolve(model, "z[1:2]").layers == (1,)


def test_a_pattern_is_read_as_q_and_k_of_its_layers() -> None:
    model = traced("qwen3")
    resolved = resolve(model, "pattern[1:]")
    assert resolved.is_pattern
    assert resolved.layers == (1, 2)
    assert resolved.streams == tuple(resolve(model, f"{name}[1:]").streams[0] for name in ("q", "k"))
    assert not resolve(model, "q[1:]").is_pattern


def test_selectors_of_one_place_share_their_stream() -> None:
    model = traced("qwen2")
    point, path = resolve(model, "resid_post[*]"), resolve(model, "model.layers[*].output")
    assert point.streams == path.streams


@pytest.mark.parametrize("selector", ["logits", "lm_head.output", "lm_head.input"])
def test_the_output_head_keeps_from_where_the_first_token_is_drawn_unless_told_otherwise(
    selector: str,
) -> None:
    resolved = resolve(traced("gemma2"), selector)
    assert resolved.tail
    # a prompt of 5 tokens and 3 generated ones
    assert resolved.span(Window("all"), 5, 7) == range(4, 7)
    assert resolved.span(Window("prompt"), 5, 7) == range(5)
    assert resolved.span(Window("generated"), 5, 7) == range(5, 7)
    assert resolved.span(parse_window({"start": 0}), 5, 7) == range(7)


def test_everything_else_keeps_all_positions_unless_told_otherwise() -> None:
    for selector in ("resid_post[*]", "pattern[0]", "model.norm.output", "model.embed_tokens.output"):
        assert resolve(traced("llama"), selector).span(Window("all"), 5, 7) == range(7)


@pytest.mark.parametrize(
    ("selector", "width", "dtype"),
    [
        ("model.layers[0].mlp.down_proj.input", (D_MLP,), torch.float32),
        ("model.layers[0].output", (D_MODEL,), torch.float32),
        ("model.layers[0].self_attn.q_norm.output", (6, 10), torch.float32),
        ("model.embed_tokens.input", (), torch.int64),
        ("lm_head.output", (VOCAB,), torch.float32),
    ],
)
def test_the_width_and_dtype_of_a_module_are_those_that_were_seen(
    selector: str, width: tuple[int, ...], dtype: torch.dtype
) -> None:
    resolved = resolve(traced("qwen3"), selector)
    assert (resolved.width, resolved.dtype) == (width, dtype)


@pytest.mark.parametrize(
    ("selector", "kept", "tokens", "dtype", "size"),
    [
        ("resid_post[1]", 5, 9, None, 5 * 48 * 4),
        ("resid_post[*]", 5, 9, torch.bfloat16, 3 * 5 * 48 * 2),
        ("z[0:2]", 4, 9, torch.float64, 2 * 4 * 6 * 10 * 8),
        ("k[0]", 4, 9, None, 4 * 2 * 10 * 4),
        ("pattern[*]", 5, 9, None, 3 * 5 * 6 * 9 * 4),  # layers · queries · heads · keys
        ("logits", 3, 9, None, 3 * 281 * 4),
        ("model.embed_tokens.input", 7, 9, None, 7 * 8),
        ("logits", 0, 9, None, 0),
    ],
)
def test_the_bytes_of_a_savepoint_are_its_numbers_times_their_size(
    selector: str, kept: int, tokens: int, dtype: torch.dtype | None, size: int
) -> None:
    assert resolve(traced("qwen3"), selector).bytes_for(kept, tokens, dtype) == size


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        ("resid_post[3]", "the list of layers of tiny-qwen3 has 3 members, 0 to 2; the index names none"),
        ("resid_post[-4]", "has 3 members"),
        ("z[3:]", "has 3 members"),
        ("pattern[1:1]", "has 3 members"),
        ("z[" + "9" * 200 + "]", "has 3 members"),
        ("model.layers[3].output", r"model\.layers has 3 members, 0 to 2; the index names none"),
        ("model.layers.3.output", r"model\.layers has 3 members, 0 to 2"),
        ("model.layers[2:2].output", r"model\.layers has 3 members, 0 to 2"),
        ("nope.output", "the model has no part 'nope'; it has lm_head, model$"),
        ("model.layers[0].mlp.up.output", r"model\.layers\.0\.mlp has no part 'up'; it has act_fn, down_"),
        ("model.layers[*].attn.output", r"model\.layers\.0 has no part 'attn'; it has input_layernorm"),
        ("lm_head.weight.output", "lm_head has no part 'weight'; it has none"),
        ("lm_head[0].output", "lm_head is not a list of modules"),
        ("model.layers[0][1].output", r"model\.layers\.0 is not a list of modules"),
        ("model[*].output", "model is not a list of modules"),
        ("0.output", "the model is not a list of modules"),
        # attributes that Python has and the model has not
        ("model.__class__.output", "model has no part '__class__'"),
        ("__class__.__mro__.output", "the model has no part '__class__'"),
        ("model.layers.__len__.output", r"model\.layers has no part '__len__'; it has 0, 1, 2"),
        ("model.forward.output", "model has no part 'forward'"),
        ("_modules.output", "the model has no part '_modules'"),
        ("model.config.output", "model has no part 'config'"),
        # modules without a tensor to keep
        ("model.layers.output", r"model\.layers has no tensor at its output .* its parts are 0, 1, 2"),
        ("model.output", "model has no tensor at its output when .* its parts are embed_tokens, layers"),
    ],
)  # fmt: skip
def test_a_selector_that_names_nothing_is_refused_with_what_exists_there(selector: str, says: str) -> None:
    with pytest.raises(BadSelector, match=says) as refused:
        resolve(traced("qwen3"), selector)
    assert repr(selector) in refused.value.message
    assert refused.value.param == "selector"


def test_a_long_list_of_what_exists_is_cut() -> None:
    names = frozenset(f"part{i}" for i in range(40))
    model = replace(traced("qwen3"))
    model.__dict__["module_names"] = names
    with pytest.raises(BadSelector) as refused:
        resolve(model, "nope.output")
    assert refused.value.message.endswith(", …")
    assert refused.value.message.count("part") == 1 + 12  # "has no part" and twelve names


@pytest.fixture(scope="module")
def experts() -> TracedModel:
    """A mixture of experts: its router sees tokens in one line, rows and positions together."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return trace_model("experts", MixtralForCausalLM(config), tiny_tokenizer())


def test_a_module_that_is_not_one_row_per_token_is_refused_with_the_shape_that_was_seen(
    experts: TracedModel,
) -> None:
    says = (
        r"the input of model\.layers\.0\.mlp\.gate is not one row per token "
        r"\(for 2 rows of 7 tokens its shape is \[14, 48\]\)"
    )
    with pytest.raises(BadSelector, match=says):
        resolve(experts, "model.layers[0].mlp.gate.input")


def test_a_model_without_points_says_so_and_names_a_path_that_works(experts: TracedModel) -> None:
    with pytest.raises(BadSelector, match=r"experts has no points .*'mixtral'") as refused:
        resolve(experts, "resid_post[0]")
    example = refused.value.message.rpartition("as in '")[2].removesuffix("'")
    assert resolve(experts, example).text == example


@pytest.mark.parametrize("selector", ["logits", "model.layers[*].output", "lm_head.output"])
def test_a_model_without_points_has_logits_and_module_paths(experts: TracedModel, selector: str) -> None:
    assert resolve(experts, selector).dtype == torch.float32


def test_logits_are_the_output_of_the_model() -> None:
    assert paths("logits") == [LOGITS]


@pytest.mark.parametrize(
    ("selector", "layers", "stacked", "sites"),
    [
        ("blocks[*].heads[1].output", (0, 1), True, ["blocks.0.heads.1", "blocks.1.heads.1"]),
        ("blocks[1].heads[*].output", (0, 1, 2), True, ["blocks.1.heads.0", "blocks.1.heads.1", "blocks.1.heads.2"]),
        ("blocks[-1].heads.0.output", (), False, ["blocks.1.heads.0"]),
    ],
)
def test_of_lists_within_lists_one_index_may_name_several(
    selector: str, layers: tuple[int, ...], stacked: bool, sites: list[str]
) -> None:
    heads = [f"blocks.{block}.heads.{head}" for block in range(2) for head in range(3)]
    lists = ["blocks", *(f"blocks.{block}{rest}" for block in range(2) for rest in ("", ".heads"))]
    seen = next(iter(traced("qwen2").sites.values()))
    model = replace(traced("qwen2"), sites={Site(head, "output"): seen for head in heads})
    model.__dict__["module_names"] = frozenset([*heads, *lists])
    resolved = resolve(model, selector)
    assert (resolved.layers, resolved.stacked) == (layers, stacked)
    assert [site.path for site in resolved.streams[0].sites] == sites


def test_modules_of_different_widths_are_not_stacked() -> None:
    model = traced("qwen2")
    site = Site("model.layers.1.mlp", "output")
    odd = replace(model, sites={**model.sites, site: replace(model.sites[site], shape=(D_MODEL + 1,))})
    with pytest.raises(BadSelector, match=r"have different shapes .* one by one"):
        resolve(odd, "model.layers[*].mlp.output")
    assert resolve(odd, "model.layers[1].mlp.output").width == (D_MODEL + 1,)
