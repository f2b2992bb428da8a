"""Dequantisation against integer arithmetic, bit for bit."""

from itertools import product

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from attribution.errors import GradientsRefused
from attribution.model import dequantise
from attribution.model.dequantise import GPTQTensors, dense_weight, gptq_weight, is_dense, unpack
from tests.gptq import pack_weight, packed


def test_codes_lie_in_a_word_from_its_lowest_bits_on() -> None:
    # 0x87654321 holds 1, 2, … 8; its highest bit is the sign of the int32, and must not be smeared over the codes
    word = torch.tensor([[0x87654321 - 2**32]], dtype=torch.int32)
    assert unpack(word, 4).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert unpack(word, 8).flatten().tolist() == [0x21, 0x43, 0x65, 0x87]
    assert unpack(word, 2).flatten().tolist()[:4] == [1, 0, 2, 0]  # 0x21 = 0b00100001


@pytest.mark.parametrize(("version", "zero"), [(1, 8), (2, 7)])
def test_one_weight_by_hand(version: int, zero: int) -> None:
    # codes 0 … 7 for one output, zeros stored as 7, scales 0.5 and −2 in two groups of four
    tensors = GPTQTensors(
        torch.tensor([[0x76543210]], dtype=torch.int32),
        torch.tensor([[7], [7]], dtype=torch.int32),
        torch.tensor([[0.5], [-2.0]]).half(),
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    )
    expected = [0.5 * (code - zero) for code in range(4)] + [-2.0 * (code - zero) for code in range(4, 8)]
    assert gptq_weight(tensors, 4, version).tolist() == [expected]


COMBINATIONS = list(product((2, 4, 8), (1, 2), (True, False), (True, False)))


@pytest.mark.parametrize(("bits", "version", "symmetric", "act_order"), COMBINATIONS)
@pytest.mark.parametrize("at_once", [2**26, 1000])  # 1000: in pieces of 16 outputs and fewer
def test_every_layout_gives_the_weights_of_its_codes_to_the_bit(
    bits: int, version: int, symmetric: bool, act_order: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise, "_AT_ONCE", at_once)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(bits))
    found = pack_weight(weight, bits, version, symmetric=symmetric, act_order=act_order, group=16)
    dense = gptq_weight(GPTQTensors(**found.tensors), bits, version)
    assert dense.dtype == torch.float16
    assert torch.equal(dense, found.dense)
    assert (dense.float() - weight).norm() / weight.norm() < {2: 0.7, 4: 0.2, 8: 0.02}[bits]


def test_a_zero_of_version_1_wraps_around() -> None:
    # an asymmetric zero of 0 is stored as 15: (15 + 1) & 15 = 0
    tensors = GPTQTensors(
        packed(torch.full((8, 8), 5), 4),
        packed(torch.full((8, 1), 15), 4).T,
        torch.ones(1, 8).half(),
        torch.zeros(8, dtype=torch.int32),
    )
    assert (gptq_weight(tensors, 4, 1) == 5).all()
    assert (gptq_weight(tensors, 4, 2) == -10).all()


def test_three_bits_are_refused() -> None:
    tensors = GPTQTensors(**pack_weight(torch.randn(32, 32), 4).tensors)
    with pytest.raises(GradientsRefused, match="its weights have 3 bits"):
        gptq_weight(tensors, 3, 1)


def test_weights_of_dense_layers_come_as_out_by_in() -> None:
    linear, conv = torch.nn.Linear(3, 5), Conv1D(5, 3)
    assert torch.equal(dense_weight(linear), linear.weight)
    assert torch.equal(dense_weight(conv), conv.weight.T)
    assert dense_weight(conv).shape == (5, 3)
    assert not dense_weight(linear).requires_grad


def test_what_is_packed_in_an_unknown_way_is_refused_by_name() -> None:
    class FancyLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(3, 3, dtype=torch.int8))

    assert is_dense(torch.nn.LayerNorm(3))
    assert not is_dense(FancyLinear())
    with pytest.raises(GradientsRefused, match="FancyLinear is not dequantised here"):
        dense_weight(FancyLinear())
