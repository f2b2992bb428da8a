"""The training loop: what it minimises, how it steps, and what it leaves on disk."""

import json
import stat

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzles.corpus import STAGES, Batch, cached_encoder, puzzle_batch
from puzzles.optimizer import Muon, orthogonalize
from puzzles.tokenizer import build_tokenizer
from puzzles.train import Progress, build_model, loss_and_accuracy, rate_factor, replicate, train


def test_the_plain_attention_agrees_with_that_of_transformers():
    torch.manual_seed(0)
    model = build_model(build_tokenizer()).eval()
    ids = torch.randint(0, 700, (2, 230))  # three blocks of queries
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        reference = model(input_ids=ids).logits
    assert torch.allclose(plain, reference, atol=1e-5)
    assert not torch.allclose(plain, reference.flip(0), atol=1e-2)


def test_the_loss_is_the_weighted_mean_over_what_bears_weight():
    torch.manual_seed(0)
    model = build_model(build_tokenizer())
    ids = np.array([[5, 3, 4, 7]])
    weights = np.array([[9.0, 0.0, 1.0, 2.0]], dtype=np.float32)  # nothing predicts the first token
    answer = np.array([[False, False, False, True]])
    loss, accuracy = loss_and_accuracy(model, Batch("3x3", ids, weights, answer))
    logits = model(input_ids=torch.from_numpy(ids)).logits[0].log_softmax(-1)
    by_hand = -(logits[1, 4] + 2 * logits[2, 7]) / (9.0 * 0 + 0.0 + 1.0 + 2.0)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert accuracy == float(logits[2].argmax() == 7)


def test_orthogonalizing_keeps_the_singular_vectors_and_brings_the_values_near_one():
    torch.manual_seed(0)
    stack = torch.randn(3, 12, 20)
    result = orthogonalize(stack)
    assert torch.allclose(result.mT, orthogonalize(stack.mT), atol=1e-5)
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
    assert inner.diagonal(dim1=1, dim2=2).min() > 0.6
    assert inner.diagonal(dim1=1, dim2=2).max() < 1.3


def test_a_step_of_muon_has_the_size_of_its_rate_whatever_the_gradient():
    matrix = torch.nn.Parameter(torch.zeros(4, 8))
    optimizer = Muon([matrix], lr=0.1)
    for scale in (1e-6, 1e6):
        matrix.data.zero_()
        optimizer.state.clear()
        matrix.grad = scale * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert 0.06 < torch.linalg.matrix_norm(matrix.detach(), 2) < 0.13


def test_the_rate_warms_up_stays_and_decays_to_zero():
    assert rate_factor(0, 0.0) == pytest.approx(0.01)
    assert rate_factor(99, 0.01) == rate_factor(5000, 0.6) == 1.0
    assert rate_factor(5000, 0.8) == pytest.approx(0.5)  # half way through the decay
    assert rate_factor(5000, 1.0) == pytest.approx(0.0)


def test_a_stage_ends_when_every_shape_is_mastered_or_its_time_is_over():
    progress = Progress()
    for _ in range(40):
        progress.note("3x3", 0.1, 0.94)
    progress.advance(0.01)
    assert progress.stage == 1
    progress.advance(0.01)  # what was seen before counts no more
    assert progress.stage == 1
    for _ in range(40):
        progress.note("3x3", 0.1, 0.5)
    progress.advance(0.01)
    assert progress.stage == 1
    progress.advance(0.99)
    assert progress.stage == 2


def test_replicas_share_weights_but_not_gradients():
    first, second = replicate(build_model(build_tokenizer()), 2)
    batch = puzzle_batch(np.random.default_rng(0), cached_encoder(build_tokenizer()), STAGES[0])
    loss_and_accuracy(second, batch)[0].backward()
    assert all(weight.grad is None for weight in first.parameters())
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    assert torch.equal(next(first.parameters()), next(second.parameters()))


def test_a_short_run_leaves_a_folder_that_loads_and_trains_further(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        out = train(tmp_path / "model", minutes=0.03, seed=1, report_every=0.5)
        before = AutoModelForCausalLM.from_pretrained(out)
        train(tmp_path / "more", minutes=0.01, seed=2, start_from=out)
    finally:
        torch.set_num_threads(threads)
    assert "3x3 0." in capsys.readouterr().err
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o644
    assert not (out / "model.safetensors.partial").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert not any(name.startswith("_") or "attn_implementation" in name for name in config)
    assert len(AutoTokenizer.from_pretrained(out)) == before.config.vocab_size
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    moved = after.model.embed_tokens.weight - before.model.embed_tokens.weight
    assert 0 < moved.abs().max() < 0.1
