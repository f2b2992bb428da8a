"""What is collected and stored of a sample, against plain transformers; what it takes, before it runs."""

import dataclasses
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from attribution import activations
from attribution.activations import batches, collect, stored_streams
from attribution.errors import CannotFit, ContextLengthExceeded, InvalidArgument, OutOfRange, UnsupportedModel
from attribution.estimate import check_room, estimate
from attribution.model.load import trace_model
from attribution.prompts import check_tokens
from attribution.store import ActivationStore
from attribution.stored import Identity
from tests.attribution.plain import distance, prompts_of, watch
from tests.models import (
    D_HEAD,
    D_MODEL,
    FAMILIES,
    N_HEADS,
    N_LAYERS,
    VOCAB,
    WINDOW,
    tiny_model,
    tiny_tokenizer,
    traced,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_a_plain_model_computes_for_each_prompt_alone(family: str):
    prompts, plain = prompts_of([13, 4, 9, 1]), tiny_model(family)
    for prompt, found in zip(prompts, collect(traced(family), prompts), strict=True):
        expected = watch(plain, prompt)
        assert sorted(found) == ["mlp_out", "resid", "z"]
        assert distance(found["resid"][:-1], expected["resid_pre"][:, 0]) < 1e-5
        assert distance(found["resid"][-1], expected["resid_post"][-1, 0]) < 1e-5
        assert distance(found["z"], expected["z"][:, 0]) < 1e-5
        assert distance(found["mlp_out"], expected["mlp_out"][:, 0]) < 2e-5


def test_a_bfloat16_model_is_stored_bit_for_bit_in_bfloat16(tmp_path: Path):
    model = trace_model("tiny-16", tiny_model("qwen3").bfloat16(), tiny_tokenizer())
    (prompt,) = prompts_of([12])
    (found,) = collect(model, [prompt])
    ActivationStore(tmp_path, 0).write("set", 0, Identity.of(model), prompt, found)
    sample = ActivationStore(tmp_path, 0).sample("set", 0, Identity.of(model))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(sample.read(name, range(len(tensor))), tensor)
    with torch.no_grad():
        hidden = tiny_model("qwen3").bfloat16()(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    assert torch.equal(sample.read("resid", range(N_LAYERS)), torch.cat(hidden[:-1]))


def test_batches_hold_every_sample_once_longest_first_within_their_bounds():
    lengths = [(37 * i) % 500 + 1 for i in range(200)] + [5000, 4096, 2048, 2048]
    found = batches(lengths)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    flat = [lengths[index] for batch in found for index in batch]
    assert flat == sorted(lengths, reverse=True)
    assert [len(batch) for batch in found[:3]] == [1, 1, 2]  # 5000, 4096, 2 × 2048
    for batch in found[1:]:
        assert len(batch) <= activations.BATCH_ROWS
        assert len(batch) * lengths[batch[0]] <= activations.BATCH_TOKENS
    assert batches([3] * 33) == [list(range(16)), list(range(16, 32)), [32]]
    assert batches([]) == []


def test_tokens_that_a_model_cannot_run_are_refused_with_the_numbers():
    model = traced("llama")
    with pytest.raises(InvalidArgument, match="prompt has no token"):
        check_tokens(model, [], "prompt")
    with pytest.raises(ContextLengthExceeded, match=f"{WINDOW + 1} tokens .* takes {WINDOW}"):
        check_tokens(model, [1] * (WINDOW + 1), "prompt")
    for token in (VOCAB, -1):
        with pytest.raises(OutOfRange, match=f"prompt is {token}; the token ids .* 0 to {VOCAB - 1}"):
            check_tokens(model, [1, token, 2], "prompt")
    check_tokens(model, [VOCAB - 1] * WINDOW, "prompt")


def test_a_model_without_points_is_refused():
    model = dataclasses.replace(traced("llama"), family=None, note="its family is 'odd'")
    for wrong in (lambda: stored_streams(model), lambda: estimate(model, [3])):
        with pytest.raises(UnsupportedModel, match="its family is 'odd'"):
            wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [13, 4, 9, 1], [200, 256, 30]])
def test_the_estimate_is_the_bytes_on_disk_within_a_hundredth(tmp_path: Path, lengths: list[int], dtype: Any):
    model = traced("qwen3")
    if dtype == torch.bfloat16:
        model = trace_model("tiny-16", tiny_model("qwen3").to(dtype), tiny_tokenizer())
    store, prompts = ActivationStore(tmp_path, 0), prompts_of(lengths)
    for number, (prompt, found) in enumerate(zip(prompts, collect(model, prompts), strict=True)):
        store.write("set", number, Identity.of(model), prompt, found)
    needed = estimate(model, lengths)
    assert store.disk_used() == pytest.approx(needed.disk_bytes, rel=0.01)
    assert (needed.samples, needed.tokens) == (len(lengths), sum(lengths))


def test_the_peak_is_that_of_the_largest_batch():
    one = estimate(traced("qwen3"), [100]).peak_bytes
    # a token: 4 streams, 3 × z and 3 × mlp_out, once captured and once stacked; the inputs of 3 MLPs and what 3
    # attentions write come along
    z = N_HEADS * D_HEAD
    assert one == 100 * 4 * (2 * (4 * D_MODEL + 3 * z + 3 * D_MODEL) + 6 * D_MODEL)
    assert estimate(traced("qwen3"), [100] * 1000).peak_bytes == 16 * one
    assert estimate(traced("qwen3"), []).peak_bytes == 0


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_what_cannot_fit_is_refused_with_what_it_needs_and_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    model, store = traced("qwen3"), ActivationStore(tmp_path, 10**6)
    needed = estimate(model, [200] * 10)
    check_room(model, store, needed)
    free = needed.disk_bytes - 1 if what == "disk" else needed.peak_bytes + 10**6 - 1
    if what == "disk":
        monkeypatch.setattr(store, "disk_free", lambda: free)
    else:
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(CannotFit, match=rf"10 samples of 2,000 tokens needs \S+ [KM]iB of {what} .*[KM]iB are free"):
        check_room(model, store, needed)


def test_the_estimate_knows_what_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, needed = traced("qwen3"), estimate(traced("qwen3"), [200] * 10)
    memory = psutil.virtual_memory()._replace(available=needed.peak_bytes + 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    check_room(model, ActivationStore(tmp_path, 1000), needed)
    with pytest.raises(CannotFit, match="stay in memory"):
        check_room(model, ActivationStore(tmp_path, 10**9), needed)
