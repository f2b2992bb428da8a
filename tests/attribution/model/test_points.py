"""Every point, in every family, against a plain transformers model."""

import pytest
import torch
from torch import Tensor

from attribution.model.block import Block
from attribution.model.capture import Batch, forward
from attribution.model.load import trace_model
from attribution.model.resolve import resolve
from attribution.model.traced import TracedModel
from tests.attribution.plain import POINTS, distance, prompts_of, watch
from tests.models import (
    D_HEAD,
    D_MODEL,
    FAMILIES,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    SLIDING_WINDOW,
    VOCAB,
    randomised,
    tiny_model,
    tiny_tokenizer,
    traced,
)

TOKENS = 13
STREAMED = [name for name in POINTS if name != "pattern"]


def batch_of(prompts: list[list[int]], keep: int = 1) -> Batch:
    """Rows of one length, no cache."""
    ids = torch.tensor(prompts)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, torch.ones_like(ids), positions, None, keep)


def read(model: TracedModel, selector: str, prompts: list[list[int]]) -> Tensor:
    """A selector of one stream, [layer, row, position, ...]."""
    (stream,) = resolve(model, selector).streams
    _, captured = forward(model, batch_of(prompts), [stream])
    return captured[stream]


def patterns(model: TracedModel, prompt: list[int], queries: range) -> Tensor:
    """The pattern of every layer, [layer, head, query, key]."""
    q, k = (read(model, f"{name}[*]", [prompt])[:, 0] for name in ("q", "k"))
    rows = torch.tensor(list(queries))
    return torch.stack([Block(model, i).pattern_of(q[i, rows], k[i], list(queries)) for i in range(len(q))])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STREAMED)
def test_a_point_holds_in_every_layer_and_row_what_a_plain_model_computes(family: str, name: str) -> None:
    prompts = prompts_of([TOKENS, TOKENS])
    expected = watch(tiny_model(family), prompts)[name]
    assert distance(read(traced(family), f"{name}[*]", prompts), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_all_points_can_be_captured_in_one_forward(family: str) -> None:
    model, prompts = traced(family), prompts_of([TOKENS])
    streams = {name: resolve(model, f"{name}[*]").streams[0] for name in STREAMED}
    _, captured = forward(model, batch_of(prompts), streams.values())
    expected = watch(tiny_model(family), prompts)
    assert {name: distance(captured[stream], expected[name]) < 1e-5 for name, stream in streams.items()} == (
        dict.fromkeys(STREAMED, True)
    )


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "d_head"),
    [
        ("qwen2", N_HEADS, N_KV_HEADS, D_MODEL // N_HEADS),
        ("qwen3", N_HEADS, N_KV_HEADS, D_HEAD),
        ("llama", N_HEADS, N_KV_HEADS, D_HEAD),
        ("gemma2", N_HEADS, N_KV_HEADS, D_HEAD),
        ("gpt2", N_HEADS, N_HEADS, D_MODEL // N_HEADS),
    ],
)
def test_the_declared_width_of_a_point_is_the_width_it_has(family: str, heads: int, kv_heads: int, d_head: int) -> None:
    model = traced(family)
    widths = dict.fromkeys(STREAMED, (D_MODEL,))
    widths |= {"q": (heads, d_head), "z": (heads, d_head), "k": (kv_heads, d_head), "v": (kv_heads, d_head)}
    for name, width in widths.items():
        resolved = resolve(model, f"{name}[1]")
        assert (name, resolved.width, resolved.dtype) == (name, width, torch.float32)
        assert read(model, f"{name}[1]", prompts_of([4])).shape == (1, 1, 4, *width)
    assert resolve(model, "pattern[1]").width == (heads, 0)
    assert resolve(model, "logits").width == (VOCAB,)


def test_one_layer_several_layers_and_layers_from_the_end_are_read_in_the_order_named() -> None:
    model, prompts = traced("qwen3"), prompts_of([5])
    expected = watch(tiny_model("qwen3"), prompts)["resid_post"]
    for selector, layers in (
        ("resid_post[1]", [1]),
        ("resid_post[-1]", [2]),
        ("resid_post[0:3:2]", [0, 2]),
        ("resid_post[::-1]", [2, 1, 0]),
        ("resid_post[-2:]", [1, 2]),
    ):
        assert resolve(model, selector).layers == tuple(layers)
        assert distance(read(model, selector, prompts), expected[layers]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_that_of_eager_attention(family: str) -> None:
    (prompt,) = prompts_of([TOKENS])
    expected = watch(tiny_model(family), prompt)["pattern"][:, 0]
    assert expected.shape == (N_LAYERS, N_HEADS, TOKENS, TOKENS)
    assert expected.max(dim=-1).values.median() < 0.9, "a pattern that is all ones and zeros shows nothing"
    assert distance(patterns(traced(family), prompt, range(TOKENS)), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_of_some_queries_is_the_rows_of_the_whole_pattern(family: str) -> None:
    (prompt,) = prompts_of([TOKENS])
    queries = range(3, 12, 4)  # 3, 7, 11
    expected = watch(tiny_model(family), prompt)["pattern"][:, 0, :, [3, 7, 11]]
    assert distance(patterns(traced(family), prompt, queries), expected) < 1e-5


def test_models_that_run_sdpa_have_a_pattern_too() -> None:
    assert {family: traced(family).attn_implementation for family in FAMILIES} == {
        "qwen2": "sdpa",
        "qwen3": "sdpa",
        "llama": "sdpa",
        "gemma2": "eager",  # the only attention that transformers has for it
        "gpt2": "sdpa",
    }


def test_gemma2_attends_within_its_window_in_every_other_layer() -> None:
    model, (prompt,) = traced("gemma2"), prompts_of([TOKENS])
    assert [Block(model, layer).window for layer in range(N_LAYERS)] == [
        SLIDING_WINDOW,
        None,
        SLIDING_WINDOW,
    ]
    found = patterns(model, prompt, range(TOKENS))
    # with a window of 5 the last query, 12, sees the keys 8 to 12
    assert (found[0, :, 12, :8] == 0).all()
    assert (found[0, :, 12, 8:] > 0).all()
    assert (found[1, :, 12] > 0).all()


def variant(family: str, **config_changes: object) -> tuple[object, TracedModel]:
    """A plain model and the same one traced, of a changed config."""
    plain = tiny_model(family, **config_changes)
    return plain, trace_model("variant", tiny_model(family, **config_changes), tiny_tokenizer())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma2", {"query_pre_attn_scalar": 77, "attn_logit_softcapping": None}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen3", {"num_key_value_heads": 6}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_variant_of_a_family_keeps_its_points(family: str, changes: dict[str, object]) -> None:
    plain, model = variant(family, **changes)
    (prompt,) = prompts_of([TOKENS])
    expected = watch(plain, prompt)
    assert model.note is None
    assert distance(read(model, "q[*]", [prompt]), expected["q"]) < 1e-5
    assert distance(read(model, "z[*]", [prompt]), expected["z"]) < 1e-5
    assert distance(patterns(model, prompt, range(TOKENS)), expected["pattern"][:, 0]) < 1e-5


def test_in_bfloat16_the_pattern_is_that_of_eager_attention_in_bfloat16() -> None:
    plain = tiny_model("qwen3").bfloat16()
    model = trace_model("half", tiny_model("qwen3").bfloat16(), tiny_tokenizer())
    (prompt,) = prompts_of([TOKENS])
    found = patterns(model, prompt, range(TOKENS))
    expected = watch(plain, prompt)["pattern"][:, 0]
    assert model.note is None
    assert found.dtype == torch.bfloat16
    # layers 1 and 2 start from streams that already differ by rounding
    assert distance(found[0], expected[0]) < 1e-2
    assert distance(found, expected) < 1e-1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_plain_model_for_the_last_positions_asked_for(family: str) -> None:
    prompts = prompts_of([TOKENS, TOKENS])
    logits, _ = forward(traced(family), batch_of(prompts, keep=4), [])
    assert distance(logits, watch(tiny_model(family), prompts)["logits"][:, -4:]) < 1e-5


def test_gemma2s_logits_are_capped_and_its_output_head_is_not() -> None:
    model, prompts = traced("gemma2"), prompts_of([TOKENS])
    head, logits = (resolve(model, name).streams[0] for name in ("lm_head.output", "logits"))
    _, captured = forward(model, batch_of(prompts, keep=TOKENS), [head, logits])
    # final_logit_softcapping is 6
    assert captured[logits].abs().max() < 6 < captured[head].abs().max()
    assert distance(captured[logits], 6 * torch.tanh(captured[head] / 6)) < 1e-6


def test_every_seed_is_another_model() -> None:
    # the oracle and the traced model share a seed; were weights constant, equality would show nothing
    one, other = tiny_model("llama"), randomised(tiny_model("llama"), seed=1)
    assert all(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
