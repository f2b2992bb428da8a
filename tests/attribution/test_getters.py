"""What is read of stored samples, against plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.errors import DatasetNotFound, InvalidArgument, OutOfRange, SampleMismatch, SampleNotFound
from attribution.model.load import trace_model
from attribution.operation import Operation
from attribution.operations import getters, samples
from attribution.session import LocalSession
from tests.attribution.plain import distance, prompts_of, watch
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_LAYERS, tiny_model, tiny_tokenizer, traced

LENGTHS = [13, 4, 9]
POSITIONS = [11, 2, 7]  # of sample 0, in an order of their own
LAYER_GETTERS = [getters.get_attn_weights, getters.get_attn_output, getters.get_mlp_output]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def session(tmp_path: Path, family: str) -> LocalSession:
    """Three samples, which come from the disk."""
    session = LocalSession(traced(family), store=tmp_path)
    session.run(samples.batch_forward, {"dataset_id": "set", "prompts": prompts_of(LENGTHS)})
    return LocalSession(traced(family), store=tmp_path)


@pytest.fixture
def expected(family: str) -> dict[str, Tensor]:
    """Every point of sample 0, [layer, position, ...] or [layer, head, query, key]."""
    found = watch(tiny_model(family), prompts_of(LENGTHS)[0])
    return {name: tensor[:, 0] for name, tensor in found.items() if name != "logits"}


def ask(session: LocalSession, operation: Operation[..., Any], **arguments: Any) -> Tensor:
    return session.run(operation, {"dataset_id": "set", "sample_id": 0} | arguments)


def test_the_streams_are_those_of_a_plain_model(session: LocalSession, expected: dict[str, Tensor]):
    for layer in range(N_LAYERS):
        for operation, name in (
            (getters.get_hidden_states, "resid_pre"),
            (getters.get_attn_output, "attn_out"),
            (getters.get_mlp_output, "mlp_out"),
        ):
            whole = ask(session, operation, layer=layer)
            assert whole.shape == (1, LENGTHS[0], D_MODEL)
            assert distance(whole[0], expected[name][layer]) < 2e-5
            some = ask(session, operation, layer=layer, pos_ids=POSITIONS)
            assert distance(some[0], expected[name][layer][POSITIONS]) < 2e-5
    final = ask(session, getters.get_hidden_states, layer=N_LAYERS, pos_ids=POSITIONS)
    assert distance(final[0], expected["resid_post"][-1][POSITIONS]) < 2e-5


def test_the_pattern_of_chosen_queries_reaches_over_all_keys(session: LocalSession, expected: dict[str, Tensor]):
    for layer in range(N_LAYERS):
        whole = ask(session, getters.get_attn_weights, layer=layer)
        assert distance(whole[0], expected["pattern"][layer]) < 1e-5
        some = ask(session, getters.get_attn_weights, layer=layer, pos_ids=POSITIONS)
        assert some.shape == (1, N_HEADS, 3, LENGTHS[0])
        assert distance(some[0], expected["pattern"][layer][:, POSITIONS]) < 1e-5
        head = ask(session, getters.get_attn_weights, layer=layer, head=4, pos_ids=POSITIONS)
        assert distance(head[0], expected["pattern"][layer][4, POSITIONS]) < 1e-5
        assert torch.allclose(some.sum(-1), torch.ones(1, N_HEADS, 3), atol=1e-6)


def test_the_patterns_of_a_batch_are_those_of_its_samples_padded(session: LocalSession):
    arguments = {"sample_ids": [2, 0, 1], "layer": 1, "head": 5, "pos_ids": [3, 0]}
    operation = getters.get_attn_weights_batch
    steps = operation.start(session, operation.validate({"dataset_id": "set"} | arguments))
    assert [next(steps).done for _ in range(3)] == [1, 2, 3]
    with pytest.raises(StopIteration) as end:
        next(steps)
    found = end.value.value
    assert found.shape == (3, 2, 13)
    for row, sample_id in enumerate([2, 0, 1]):
        alone = ask(session, getters.get_attn_weights, sample_id=sample_id, layer=1, head=5, pos_ids=[3, 0])[0]
        assert torch.equal(found[row, :, : LENGTHS[sample_id]], alone)
        assert not found[row, :, LENGTHS[sample_id] :].any()


def test_the_heads_and_the_bias_sum_to_what_attention_writes(session: LocalSession, family: str):
    model = tiny_model(family)
    for layer in range(N_LAYERS):
        heads = [ask(session, getters.get_head_output, layer=layer, head=head, pos_ids=POSITIONS) for head in range(6)]
        assert heads[0].shape == (3, D_MODEL)
        bias = model.transformer.h[layer].attn.c_proj.bias.detach() if family == "gpt2" else torch.zeros(D_MODEL)
        whole = ask(session, getters.get_attn_output, layer=layer, pos_ids=POSITIONS)[0]
        assert distance(torch.stack(heads).sum(0) + bias, whole) < 1e-5


@pytest.mark.parametrize("family", ["qwen3"])
def test_a_head_writes_what_removing_it_takes_away(session: LocalSession):
    model = tiny_model("qwen3")
    ids = prompts_of(LENGTHS)[0]
    before = watch(model, ids)["attn_out"][1, 0]
    model.model.layers[1].self_attn.o_proj.weight.data[:, 30:40] = 0  # the columns of head 3: 3 · 10 to 4 · 10
    taken = before - watch(model, ids)["attn_out"][1, 0]
    assert distance(ask(session, getters.get_head_output, layer=1, head=3), taken) < 1e-5


@pytest.mark.parametrize("family", ["llama"])
def test_what_is_out_of_range_is_refused_with_the_range(session: LocalSession):
    for operation in [*LAYER_GETTERS, getters.get_head_output]:
        head = {"head": 0} if operation is getters.get_head_output else {}
        for layer in (-1, N_LAYERS):
            with pytest.raises(OutOfRange, match=f"layer is {layer}; the layers are 0 to {N_LAYERS - 1}"):
                ask(session, operation, layer=layer, **head)
        for pos_ids in ([13], [-1], [0, 99]):
            with pytest.raises(OutOfRange, match="the positions of this sample are 0 to 12"):
                ask(session, operation, layer=0, pos_ids=pos_ids, **head)
        for pos_ids in ([], [1, 1]):
            with pytest.raises(InvalidArgument, match="pos_ids"):
                ask(session, operation, layer=0, pos_ids=pos_ids, **head)
    with pytest.raises(OutOfRange, match=f"layer is {N_LAYERS + 1}; .* are 0 to {N_LAYERS}"):
        ask(session, getters.get_hidden_states, layer=N_LAYERS + 1)
    for operation in (getters.get_attn_weights, getters.get_head_output):
        with pytest.raises(OutOfRange, match=f"head is {N_HEADS}; the heads are 0 to {N_HEADS - 1}"):
            ask(session, operation, layer=0, head=N_HEADS)
    with pytest.raises(OutOfRange, match="0 to 3"):
        session.run(
            getters.get_attn_weights_batch,
            {"dataset_id": "set", "sample_ids": [0, 1], "layer": 0, "head": 0, "pos_ids": [5]},
        )
    with pytest.raises(InvalidArgument, match="sample_ids is empty"):
        session.run(
            getters.get_attn_weights_batch,
            {"dataset_id": "set", "sample_ids": [], "layer": 0, "head": 0, "pos_ids": [0]},
        )


@pytest.mark.parametrize("family", ["llama"])
def test_a_sample_that_is_not_there_or_of_another_model_is_refused(session: LocalSession):
    other = LocalSession(traced("qwen2"), store=session.store)
    for operation in (*LAYER_GETTERS, getters.get_hidden_states):
        with pytest.raises(SampleNotFound, match=r"no sample 7 in 'set' \(it has 0–2\)"):
            ask(session, operation, sample_id=7, layer=0)
        with pytest.raises(DatasetNotFound, match="no dataset 'sett'; there is set"):
            ask(session, operation, dataset_id="sett", layer=0)
        with pytest.raises(SampleMismatch):
            ask(other, operation, layer=0)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_an_unknown_device_is_refused(session: LocalSession, device: str):
    with pytest.raises(InvalidArgument, match=device):
        ask(session, getters.get_hidden_states, layer=0, device=device)


def test_activations_keep_the_dtype_of_the_model_and_heads_are_wider(tmp_path: Path):
    model = trace_model("tiny-16", tiny_model("gemma2").bfloat16(), tiny_tokenizer())
    session = LocalSession(model, store=tmp_path)
    session.run(samples.forward, {"dataset_id": "set", "sample_id": 0, "token_ids": prompts_of([13])[0]})
    for operation in [*LAYER_GETTERS, getters.get_hidden_states]:
        found = ask(session, operation, layer=1)
        assert found.dtype == torch.bfloat16
        assert not found.requires_grad
    assert ask(session, getters.get_head_output, layer=1, head=2).dtype == torch.float32
