"""One traced forward over a left-padded batch, against plain single rows."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attribution.model.capture import Batch, Stream, forward
from attribution.model.resolve import resolve
from attribution.model.traced import LOGITS, Site, TracedModel
from tests.attribution.plain import POINTS, distance, module_value, prompts_of, watch
from tests.models import D_MLP, D_MODEL, FAMILIES, VOCAB, tiny_model, traced

LENGTHS = [13, 4, 9, 1]
LLAMA_LIKE = ("qwen2", "qwen3", "llama", "gemma2")


def padded(prompts: list[list[int]], keep: int, cache: object = None) -> Batch:
    """Left-padded rows; the padding is token 7 at position 3, which no real token is told of."""
    columns = max(len(prompt) for prompt in prompts)
    missing = [columns - len(prompt) for prompt in prompts]
    return Batch(
        ids=torch.tensor([[7] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]),
        mask=torch.tensor([[0] * n + [1] * (columns - n) for n in missing]),
        positions=torch.tensor([[3] * n + list(range(columns - n)) for n in missing]),
        cache=cache,
        keep=keep,
    )


def captured(model: TracedModel, selectors: list[str], batch: Batch) -> dict[str, Tensor]:
    streams = {selector: resolve(model, selector).streams[0] for selector in selectors}
    _, found = forward(model, batch, streams.values())
    return {selector: found[stream] for selector, stream in streams.items()}


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_gives_every_row_what_it_gets_alone(family: str, with_cache: bool) -> None:
    prompts = prompts_of(LENGTHS)
    names = [name for name in POINTS if name != "pattern"]
    batch = padded(prompts, keep=1, cache=DynamicCache() if with_cache else None)
    found = captured(traced(family), [*(f"{name}[*]" for name in names), "logits"], batch)
    plain = tiny_model(family)
    for row, prompt in enumerate(prompts):
        expected = watch(plain, prompt)
        for name in names:
            # its tokens are the last ones of its row
            value = found[f"{name}[*]"][:, row, -len(prompt) :]
            assert distance(value, expected[name][:, 0]) < 1e-5, (name, row)
        assert distance(found["logits"][0, row, 0], expected["logits"][0, -1]) < 1e-5


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize(
    ("path", "side", "width"),
    [
        ("model.embed_tokens", "output", D_MODEL),
        ("model.layers[*]", "input", D_MODEL),
        ("model.layers[*].input_layernorm", "output", D_MODEL),
        ("model.layers[*].self_attn", "input", D_MODEL),
        ("model.layers[*].self_attn", "output", D_MODEL),
        ("model.layers[*].mlp.down_proj", "input", D_MLP),
        ("model.layers[*].mlp.gate_proj", "output", D_MLP),
        ("model.layers[0:3:2].self_attn.v_proj", "output", None),
        ("model.layers[1].self_attn.o_proj", "input", None),
        ("model.layers.2.mlp.act_fn", "output", D_MLP),
        ("model.norm", "output", D_MODEL),
    ],
)
def test_a_module_path_holds_what_a_hook_on_a_plain_model_sees(
    family: str, path: str, side: str, width: int | None
) -> None:
    prompts, plain = prompts_of([6, 11]), tiny_model(family)
    selector = f"{path}.{side}"
    found = captured(traced(family), [selector], padded(prompts, keep=1))[selector]
    layers = [0, 1, 2] if "[*]" in path else [0, 2] if "[0:3:2]" in path else [1]
    assert len(found) == (len(layers) if "[*]" in path or ":" in path else 1)
    for index, layer in enumerate(layers):
        dotted = path.replace("[*]", f".{layer}").replace("[0:3:2]", f".{layer}").replace("[1]", ".1")
        for row, prompt in enumerate(prompts):
            expected = module_value(plain, prompt, dotted, side)
            assert width is None or expected.shape == (len(prompt), width)
            assert distance(found[index, row, -len(prompt) :], expected) < 1e-5


@pytest.mark.parametrize(
    ("path", "side", "width"),
    [
        ("transformer.wte", "output", D_MODEL),
        ("transformer.h[*]", "output", D_MODEL),
        ("transformer.h[*].attn", "output", D_MODEL),
        ("transformer.h[*].attn.c_attn", "output", 3 * D_MODEL),
        ("transformer.h[*].mlp.c_proj", "input", D_MLP),
        ("transformer.ln_f", "input", D_MODEL),
    ],
)
def test_gpt2s_module_paths_hold_what_a_hook_on_a_plain_model_sees(path: str, side: str, width: int) -> None:
    (prompt,) = prompts_of([6])
    selector = f"{path}.{side}"
    found = captured(traced("gpt2"), [selector], padded([prompt], keep=1))[selector]
    for layer in range(len(found)):
        expected = module_value(tiny_model("gpt2"), prompt, path.replace("[*]", f".{layer}"), side)
        assert expected.shape == (6, width)
        assert distance(found[layer, 0], expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [1, 3, 11])
def test_the_output_head_sees_only_the_last_columns_that_were_asked_for(family: str, keep: int) -> None:
    prompts = prompts_of([11, 11])
    found = captured(traced(family), ["lm_head.input", "lm_head.output", "logits"], padded(prompts, keep=keep))
    plain = tiny_model(family)
    for row, prompt in enumerate(prompts):
        head_in, head_out = (module_value(plain, prompt, "lm_head", side) for side in ("input", "output"))
        assert distance(found["lm_head.input"][0, row], head_in[-keep:]) < 1e-5
        assert distance(found["lm_head.output"][0, row], head_out[-keep:]) < 1e-5
        assert found["logits"].shape == (1, 2, keep, VOCAB)


def test_the_cache_given_from_outside_holds_the_keys_that_were_fed() -> None:
    model, prompts, cache = traced("llama"), prompts_of([5, 5]), DynamicCache()
    first = padded([prompt[:3] for prompt in prompts], keep=1, cache=cache)
    forward(model, first, [])
    second = Batch(
        torch.tensor([prompt[3:] for prompt in prompts]),
        torch.ones(2, 5, dtype=torch.long),
        torch.tensor([[3, 4], [3, 4]]),
        cache,
        keep=2,
    )
    stream = resolve(model, "resid_post[*]").streams[0]
    logits, found = forward(model, second, [stream])
    expected = watch(tiny_model("llama"), prompts)
    assert cache.get_seq_length() == 5
    assert found[stream].shape == (3, 2, 2, D_MODEL)
    assert distance(found[stream], expected["resid_post"][:, :, 3:]) < 1e-5
    assert distance(logits, expected["logits"][:, 3:]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_stand_at_the_positions_that_were_given(family: str) -> None:
    (prompt,), plain = prompts_of([6]), tiny_model(family)
    positions = torch.tensor([[0, 1, 2, 7, 8, 20]])
    batch = Batch(torch.tensor([prompt]), torch.ones(1, 6, dtype=torch.long), positions, None, 1)
    logits, _ = forward(traced(family), batch, [])
    with torch.no_grad():
        moved, plainly = (plain(batch.ids, position_ids=p).logits[:, -1:] for p in (positions, None))
    assert distance(logits, moved) < 1e-5
    assert distance(plainly, moved) > 1e-2, "positions that change nothing show nothing"


def test_a_forward_without_a_cache_leaves_none_and_one_without_streams_captures_nothing() -> None:
    logits, found = forward(traced("qwen2"), padded(prompts_of([5]), keep=2), [])
    assert logits.shape == (1, 2, VOCAB)
    assert found == {}


def test_one_stream_asked_for_twice_is_captured_once() -> None:
    model = traced("qwen2")
    stream, same = (resolve(model, "resid_mid[*]").streams[0] for _ in range(2))
    _, found = forward(model, padded(prompts_of([5]), keep=1), [stream, same])
    assert list(found) == [stream]


def test_logits_alone_need_no_module_and_equal_the_output_head() -> None:
    model = traced("qwen2")
    stream = Stream((LOGITS,), tail=True)
    logits, found = forward(model, padded(prompts_of([5]), keep=2), [stream])
    assert torch.equal(found[stream][0], logits)


def test_what_was_captured_keeps_the_models_dtype_and_is_not_part_of_a_graph() -> None:
    found = captured(traced("qwen2"), ["resid_post[*]", "lm_head.output"], padded(prompts_of([5]), keep=1))
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in found.values())


def test_capturing_does_not_change_the_logits() -> None:
    model = traced("gemma2")
    batch = padded(prompts_of(LENGTHS), keep=3)
    everything = [resolve(model, f"{name}[*]").streams[0] for name in POINTS if name != "pattern"]
    alone, _ = forward(model, batch, [])
    watched, _ = forward(model, batch, everything)
    assert torch.equal(alone, watched)


def test_a_site_that_no_longer_holds_a_tensor_is_an_error_and_not_an_empty_result() -> None:
    model = traced("qwen2")
    with pytest.raises(RuntimeError, match=r"model\.output held a tensor .* and holds none now"):
        forward(model, padded(prompts_of([5]), keep=1), [Stream((Site("model", "output"),))])
