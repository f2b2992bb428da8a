"""Edges are what really intervening gives: the frozen model by hand, something added once more, the target read."""

from functools import cache
from typing import Any

import pytest
import torch

from attribution.features.autoencoder import Autoencoder
from attribution.features.circuits.replacement import Transcoder, replace_mlps
from attribution.features.circuits.trace import Circuit, Logits, trace
from attribution.model.linearised import logit_directions
from attribution.model.load import trace_model
from tests.attribution.features.circuits.frozen_oracle import ByHand, Frozen, by_hand
from tests.models import FAMILIES, tiny_model, tiny_tokenizer

IDS = [5, 9, 200, 7, 7]
TARGETS = [60, 3, 271]
# norms and softmax compute in float32 in all families but GPT-2, whatever the model's dtype
TOLERANCE = dict.fromkeys(FAMILIES, 1e-5) | {"gpt2": 1e-11}


def near(found: torch.Tensor, expected: torch.Tensor, family: str) -> bool:
    """Whether no entry is further off than the tolerance times the largest."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= TOLERANCE[family] * float(expected.abs().max())


def autoencoder(one: ByHand) -> Autoencoder:
    return Autoencoder(
        activation=one.activation,
        W_enc=one.W_enc,
        b_enc=one.b_enc,
        W_dec=one.W_dec,
        b_dec=one.b_dec,
        threshold=one.threshold if one.activation == "jumprelu" else None,
        k=one.k if one.activation == "topk" else None,
        W_skip=one.W_skip,
        restores=one.restores,
        normalisation="layer_norm" if one.normalised else "none",
    )


@cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return trace_model("tiny", tiny_model(family).to(dtype), tiny_tokenizer())


def circuit_of(model: Any, transcoders: dict[int, ByHand], **options: Any) -> Circuit:
    """The whole graph, every active feature in it."""
    chosen = {
        layer: Transcoder(f"t{layer}", one.point, autoencoder(one).to(dtype=model.work_dtype))
        for layer, one in transcoders.items()
    }
    replacement = replace_mlps(model, IDS, chosen, **options)
    logits = Logits(TARGETS, *logit_directions(model, TARGETS), probabilities=[0.5, 0.2, 0.1])
    steps = trace(replacement, logits, 10_000, 1 << 28)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value[0]


MIXED = {
    0: by_hand("mlp_in", "topk", 1),
    1: by_hand("mlp_normalised", "jumprelu", 2, skip=True),
    2: by_hand("resid_mid", "relu", 3, skip=True),
}
NORMALISED = {layer: by_hand("mlp_in", "topk", 4 + layer, skip=layer > 0, normalised=True) for layer in range(3)}
NORMALISED[2].restores = False
SOME = {1: by_hand("mlp_in", "topk", 8)}


def sources(circuit: Circuit) -> list[tuple[int, int]]:
    """Depth and position of every column."""
    features = circuit.replacement.features
    found = [(int(features.layer[i]) + 1, int(features.position[i])) for i in circuit.chosen]
    return (
        found + [(layer + 1, at) for layer in range(3) for at in range(len(IDS))] + [(0, at) for at in range(len(IDS))]
    )


def added(circuit: Circuit, frozen: Frozen, column: int) -> torch.Tensor:
    """What a source adds, by hand."""
    depth, position = sources(circuit)[column]
    if depth == 0:
        return frozen.embedding[position]
    one = frozen.transcoders.get(depth - 1)
    if one is None:
        return frozen.mlp_out[depth - 1][position]
    read = frozen.reads[depth - 1]
    active, scale = frozen.active[depth - 1][position], one.scale(read)[position]
    if column < len(circuit.chosen):
        index = int(circuit.replacement.features.index[circuit.chosen[column]])
        return active[index] * one.W_dec[index] * scale
    written = (active @ one.W_dec + one.b_dec) * scale + one.linear(read, read)[position]
    return frozen.mlp_out[depth - 1][position] - written


def values(circuit: Circuit, frozen: Frozen, reads: list[torch.Tensor], final: torch.Tensor) -> torch.Tensor:
    """Every target: the logits less the mean logit, then the pre-activations."""
    unembedding = frozen.model.get_output_embeddings().weight.double()
    logits = final[-1] @ unembedding.T
    found = [logits[token] - logits.mean() for token in TARGETS]
    features = circuit.replacement.features
    for layer, one in sorted(frozen.transcoders.items()):
        at = circuit.chosen[features.layer[circuit.chosen] == layer]
        found += one.pre(reads[layer], frozen.reads[layer])[features.position[at], features.index[at]]
    return torch.stack(found)


CASES = [(family, MIXED) for family in FAMILIES] + [(f, t) for f in ("gemma2", "gpt2") for t in (NORMALISED, SOME)]


@pytest.mark.parametrize(("family", "transcoders"), CASES)
def test_every_edge_is_what_adding_its_source_once_more_moves(family: str, transcoders: dict[int, ByHand]):
    model = model_of(family)
    circuit = circuit_of(model, transcoders)
    with torch.no_grad():
        frozen = Frozen(model.module, IDS, transcoders)
        base = values(circuit, frozen, frozen.reads, frozen.final)
        found = []
        for column, (depth, position) in enumerate(sources(circuit)):
            moved = frozen.run({(depth, position): added(circuit, frozen, column)})
            found.append(values(circuit, frozen, *moved) - base)
    expected = torch.stack(found, dim=1)
    assert near(circuit.effects.weights, expected, family)
    assert near(circuit.values, base, family)
    assert circuit.missed == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip_first", [False, True])
def test_the_effects_on_a_target_and_its_constant_add_up_to_it(family: str, skip_first: bool):
    model = model_of(family)
    circuit = circuit_of(model, MIXED, skip_first=skip_first)
    with torch.no_grad():
        frozen = Frozen(model.module, IDS, MIXED)
        base = values(circuit, frozen, frozen.reads, frozen.final)
        bare: dict[tuple[int, int], torch.Tensor] = {}
        for column, at in enumerate(sources(circuit)):
            if skip_first and at[1] == 0 and at[0] > 0:
                continue
            bare[at] = bare.get(at, torch.zeros(48).double()) - added(circuit, frozen, column)
        constants = values(circuit, frozen, *frozen.run(bare))
    assert near(circuit.constants, constants, family)
    assert near(circuit.effects.weights.sum(1) + constants, base, family)
    assert (circuit.replacement.features.position == 0).any() == (not skip_first)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_active_features_and_what_they_leave_out_are_those_of_the_formulas(family: str):
    model = model_of(family)
    circuit = circuit_of(model, MIXED)
    frozen = Frozen(model.module, IDS, MIXED)
    features = circuit.replacement.features
    for layer, one in MIXED.items():
        dense = torch.zeros(len(IDS), 40).double()
        at = features.of_layer(layer)
        dense[features.position[at], features.index[at]] = features.activation[at]
        assert near(dense, one.features(frozen.reads[layer]), family)
        assert (features.activation[at] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_edges_are_those_of_float64_up_to_rounding(family: str):
    exact, single = (circuit_of(model_of(family, dtype), SOME) for dtype in (torch.float64, torch.float32))
    assert single.effects.weights.dtype == torch.float32
    largest = float(exact.effects.weights.abs().max())
    assert torch.allclose(single.effects.weights.double(), exact.effects.weights, atol=1e-5 * largest, rtol=1e-3)
