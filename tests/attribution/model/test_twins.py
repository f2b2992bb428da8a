"""Twins of quantised layers: gradients are those of the dense weights, whatever the kernels do, and in either order."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from attribution.errors import GradientsRefused
from attribution.model.block import Block
from attribution.model.capture import forward
from attribution.model.load import LoadSpec, _wrap, trace_model
from attribution.model.probe import probe_batch
from attribution.model.resolve import resolve
from attribution.model.traced import TracedModel
from attribution.model.traced_backward import traced_input_gradient
from attribution.model.twins import DenseLinear
from attribution.operations.gradients import compute_node_gradient
from attribution.operations.samples import forward as store_forward
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import reference_gradient
from tests.attribution.plain import distance, prompts_of
from tests.gptq import SIZES, save_gptq, with_kernels
from tests.models import N_HEADS, N_LAYERS, tiny_tokenizer

WIDTH, INNER = SIZES["hidden_size"], SIZES["intermediate_size"]
PROMPT = prompts_of([9])[0]
POSITIONS = [8, 5]
NODES = ("lm_head", "attn_q", "attn_k", "attn_v", "attn_a", "mlp_i", "mlp_g")
DIED = r"gives no gradients: .*"


class Pair(NamedTuple):
    dense: Any
    module: Any
    folder: Path

    def traced(self) -> TracedModel:
        return trace_model(str(self.folder), self.module, tiny_tokenizer())


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(family: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("gptq")
        return save_gptq(folder, family, symmetric=False, act_order=True), folder

    def fresh(family: str = "qwen2") -> Pair:
        dense, folder = make(family)
        return Pair(dense, with_kernels(dense, folder), folder)

    return fresh


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma2"])
def test_every_node_gradient_is_that_of_the_dense_model_before_and_after_another_forward(
    family: str, pair_of: Any, tmp_path: Path
) -> None:
    pair = pair_of(family)
    model = pair.traced()
    assert (model.quantization, model.note, model.gradients_refused) == ("gptq", None, None)
    session = LocalSession(model, store=tmp_path)
    session.run(store_forward, {"dataset_id": "d", "sample_id": 0, "token_ids": PROMPT})
    for node in NODES:
        given: dict[str, Any] = {"node_type": node, "layer": 1, "pos_ids": POSITIONS}
        given["head"] = 4 if node.startswith("attn") else N_HEADS
        given["output_grad"] = noise(1, len(POSITIONS), WIDTH, seed=2)
        if node == "lm_head":
            given = {"node_type": node, "layer": N_LAYERS, "head": 0, "pos_ids": POSITIONS}
            given |= {"labels": [17, 200], "candidate_ids": [200, 17, 3]}
        expected = reference_gradient(pair.dense, PROMPT, **given)["gradient"]
        for _ in range(2):
            found = session.run(compute_node_gradient, {"dataset_id": "d", "sample_id": 0, **given})
            assert distance(found, expected) < 3e-5, node  # both in float32
            forward(model, probe_batch(model, 1), [])


def test_the_kernel_of_these_tests_has_a_wrong_gradient_and_its_twin_a_right_one(pair_of: Any) -> None:
    pair = pair_of()
    model, x, grad = pair.traced(), noise(5, WIDTH), noise(5, WIDTH, seed=1)
    own, dense = model.module.model.layers[1].mlp, pair.dense.model.layers[1].mlp
    (expected,) = torch.autograd.grad((dense(x.requires_grad_()) * grad).sum(), x)
    (wrong,) = torch.autograd.grad((own(x) * grad).sum(), x)
    assert distance(wrong, expected) > 0.9
    found = traced_input_gradient(Block(model, 1).module("mlp"), x, lambda out: (out * grad).sum())
    assert distance(found, expected) < 1e-6
    # and the model is what it was
    ids = probe_batch(model, 1).ids
    assert distance(forward(model, probe_batch(model, 1), [])[0], pair.dense(ids).logits[:, -3:]) < 1e-5


def test_weights_and_biases_of_a_block_are_the_dense_ones(pair_of: Any) -> None:
    pair = pair_of()
    block = Block(pair.traced(), 2)
    attention = pair.dense.model.layers[2].self_attn
    assert torch.equal(block.weight("q").flatten(0, 1), attention.q_proj.weight)
    assert torch.equal(block.weight("k").flatten(0, 1), attention.k_proj.weight)
    assert torch.equal(block.weight("o").flatten(0, 1), attention.o_proj.weight.T)
    assert block.o_bias is None
    assert torch.equal(block.module("self_attn.q_proj")._module.bias, attention.q_proj.bias)
    assert block.weight_dtype == torch.float32


def test_only_what_is_needed_is_dequantised_and_no_more_is_kept_than_allowed(pair_of: Any) -> None:
    pair = pair_of()
    most = 4 * (WIDTH * WIDTH + INNER * WIDTH)  # one of q and o, and one of the MLP's
    model = _wrap(LoadSpec(str(pair.folder), twin_bytes=most), str(pair.folder), pair.module, tiny_tokenizer())
    twins = model.twins
    assert twins is not None
    assert twins.kept_bytes == 0  # what the guard needed is gone
    blocks = [Block(model, layer) for layer in range(N_LAYERS)]
    assert all(block.envoy is model.layer(block.layer) for block in blocks)
    assert twins.kept_bytes == 0
    first = blocks[0].module("self_attn.o_proj")._module.weight
    assert twins.kept_bytes == 4 * WIDTH * WIDTH
    up = blocks[0].module("mlp.up_proj")._module.weight
    assert blocks[0].module("self_attn.o_proj")._module.weight is first
    assert blocks[0].module("mlp.up_proj")._module.weight is up
    assert twins.kept_bytes == most
    assert blocks[0].module("self_attn.o_proj")._module.weight is first  # used last, so the other one goes
    gate = blocks[0].module("mlp.gate_proj")._module.weight
    assert twins.kept_bytes == most
    assert blocks[0].module("self_attn.o_proj")._module.weight is first
    assert blocks[0].module("mlp.gate_proj")._module.weight is gate
    assert blocks[0].module("mlp.up_proj")._module.weight is not up


def test_a_weight_that_is_larger_than_all_room_is_used_and_not_kept(pair_of: Any) -> None:
    pair = pair_of()
    model = _wrap(LoadSpec(str(pair.folder), twin_bytes=10), str(pair.folder), pair.module, tiny_tokenizer())
    assert model.gradients_refused is None
    assert torch.equal(Block(model, 0).weight("o").flatten(0, 1), pair.dense.model.layers[0].self_attn.o_proj.weight.T)
    assert model.twins is not None
    assert model.twins.kept_bytes == 0


def test_a_twin_shares_norms_and_copies_no_module_of_the_model(pair_of: Any) -> None:
    model = pair_of("qwen3").traced()
    own, twin = model.module.model.layers[1], model.layer(1)._module
    assert twin.input_layernorm.weight is own.input_layernorm.weight
    assert twin.self_attn.q_norm.weight is own.self_attn.q_norm.weight
    assert not set(map(id, own.modules())) & set(map(id, twin.modules()))
    assert sum(isinstance(part, DenseLinear) for part in twin.modules()) == 7
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_linear_layers_that_were_left_dense_meet_the_others_in_one_dtype(pair_of: Any) -> None:
    pair = pair_of()
    mlp = pair.module.model.layers[1].mlp
    mlp.down_proj = torch.nn.Linear(INNER, WIDTH, bias=False)
    pair.module.bfloat16()
    model = pair.traced()
    assert (model.dtype, model.gradients_refused) == (torch.bfloat16, None)
    twin = model.layer(1)._module.mlp
    assert {part.weight.dtype for part in (twin.down_proj, twin.up_proj)} == {torch.float32}
    assert torch.equal(twin.down_proj.weight, mlp.down_proj.weight.float())


# refusals: the model chats and is captured, and says why it gives no gradients


def still_captures(model: TracedModel) -> None:
    assert model.note is None
    stream = resolve(model, "z[*]").streams[0]
    assert forward(model, probe_batch(model, 1), [stream])[1][stream].shape == (N_LAYERS, 1, 7, N_HEADS, 16)


def refusal(model: TracedModel) -> str:
    still_captures(model)
    with pytest.raises(GradientsRefused, match=DIED) as refused:
        Block(model, 0).weight("o")
    assert refused.value.param == "model"
    assert str(model.gradients_refused) in refused.value.message
    return refused.value.message


def test_a_kernel_that_computes_something_else_than_its_weights_is_refused_by_name(pair_of: Any) -> None:
    pair = pair_of()
    kernel = pair.module.model.layers[1].mlp.up_proj
    kernel._weight = kernel._weight + 0.05
    assert "model.layers.1.mlp.up_proj differs from its dequantised weights by " in refusal(pair.traced())


def test_a_label_of_the_wrong_version_is_seen_where_zeros_cannot_tell(pair_of: Any) -> None:
    pair = pair_of()
    pair.module.config.quantization_config |= {"checkpoint_format": "gptq_v2"}
    assert "differs from its dequantised weights" in refusal(pair.traced())


def test_three_bits_give_no_gradients(pair_of: Any) -> None:
    pair = pair_of()
    pair.module.config.quantization_config |= {"bits": 3}
    assert "its weights have 3 bits" in refusal(pair.traced())


def test_another_quantisation_gives_no_gradients_and_is_named(pair_of: Any) -> None:
    pair = pair_of()
    pair.module.config.quantization_config |= {"quant_method": "awq"}
    model = pair.traced()
    assert model.quantization == "awq"
    assert "RepackingKernel at model.layers.1.self_attn.q_proj is not dequantised here" in refusal(model)


def test_a_checkpoint_whose_files_are_gone_gives_no_gradients(pair_of: Any, tmp_path: Path) -> None:
    pair = pair_of()
    (tmp_path / "copy").mkdir()
    shutil.copy(pair.folder / "config.json", tmp_path / "copy")
    gone = Pair(pair.dense, pair.module, tmp_path / "copy")
    assert "the safetensors files of the checkpoint cannot be read" in refusal(gone.traced())


def test_a_wrong_traced_gradient_is_refused(pair_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: Any, **kwargs: Any) -> torch.Tensor:
        return traced_input_gradient(*args, **kwargs) / 2

    monkeypatch.setattr("attribution.model.guard.traced_input_gradient", halved)
    assert "is off by 1.0e+00 from what a step along it does" in refusal(pair_of().traced())
