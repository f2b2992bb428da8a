"""The self-check passes for every kind of transcoder and sees a wrong edge; a graph is made between other work."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.features.autoencoder import Autoencoder, Gate
from attribution.features.circuits.check import check
from attribution.features.circuits.influence import prune
from attribution.features.circuits.replacement import Transcoder, replace_mlps
from attribution.features.circuits.trace import Circuit, Logits, trace
from attribution.model.linearised import logit_directions
from attribution.operations.circuits import trace_circuit
from attribution.session import LocalSession
from tests.attribution.features.circuits.test_edges import model_of
from tests.autoencoders import random_autoencoder, save_random
from tests.models import traced

IDS = [5, 9, 200, 33, 7]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "b_dec taken off": {"subtracts_b_dec": True},
    "topk, rescaled": {"activation": "topk", "k": 9, "threshold": None, "rescaled": True},
    "gated": {
        "activation": "gated",
        "threshold": None,
        "b_enc": None,
        "gate": Gate(draw(70) / 3, draw(70) / 4, draw(70) / 5),
    },
    "centred, with a skip": {"centred": True, "W_skip": draw(48, 48) / 10},
    "constant norm": {"normalisation": "constant_norm", "W_skip": draw(48, 48) / 10},
    "constant norm, not restored": {"normalisation": "constant_norm", "restores": False},
    "layer norm": {"normalisation": "layer_norm"},
}


def circuit_of(model: Any, kind: str) -> Circuit:
    made: Autoencoder = random_autoencoder(**({"subtracts_b_dec": False} | KINDS[kind])).to(dtype=model.work_dtype)
    replacement = replace_mlps(model, IDS, {layer: Transcoder(f"t{layer}", "mlp_in", made) for layer in range(3)})
    steps = trace(replacement, Logits([3, 60], *logit_directions(model, [3, 60]), [0.5, 0.25]), 10_000, 1 << 28)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edges_and_constants_of_every_kind_of_transcoder_are_what_interventions_find(family: str, kind: str):
    circuit = circuit_of(model_of(family), kind)
    assert len(circuit.chosen) > 20
    found = check(circuit, prune(circuit.effects, 1.0, 1.0), 40)
    assert len(found["edges"]) == 40
    assert found["passed"]
    assert max(found["relative_error"], found["constant_error"]) < (1e-9 if family == "gpt2" else 5e-4)


def test_a_wrong_edge_or_constant_does_not_pass():
    circuit = circuit_of(model_of("gpt2"), "jumprelu")
    pruned = prune(circuit.effects, 1.0, 1.0)
    weights = circuit.effects.weights * torch.where(torch.arange(len(circuit.values)) % 2 == 0, 1.01, 1.0)[:, None]
    wrong = dataclasses.replace(circuit, effects=dataclasses.replace(circuit.effects, weights=weights))
    found = check(wrong, pruned, 40)
    assert not found["passed"]
    assert found["relative_error"] == pytest.approx(0.01 / 1.01, rel=1e-6)
    reaches = circuit.effects.weights.abs().sum(1)
    found = check(dataclasses.replace(circuit, constants=circuit.constants + reaches / 50), pruned, 40)
    assert not found["passed"]
    assert found["constant_error"] == pytest.approx(0.02, rel=1e-6)


def test_checks_run_in_batches_of_a_bounded_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    session = LocalSession(traced("qwen3"), store=tmp_path)
    session.load_features(str(save_random(tmp_path / "t", "mlp_in[1]", "mlp_out[1]", n_features=60)), "t")
    session.load_features(str(save_random(tmp_path / "r", "resid_post[1]", n_features=60)), "r")
    # beside the sequence as it is: three edges and a row for constants; seven features; eight edges in three rows each
    for source, sizes in (("t", [1, 5, 5, 4, 4, 4, 2]), ("r", [1, 1, *[4] * 8])):
        whole = session.trace_circuit(token_ids=IDS, sources=[source], checks=8)
        monkeypatch.setattr("attribution.model.live.BATCH_TOKENS", 4 * len(IDS))  # a row as it is, and three others
        fed: list[int] = []
        hook = session.model.module.register_forward_pre_hook(
            lambda _, args, kwargs, fed=fed: fed.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        parts = session.trace_circuit(token_ids=IDS, sources=[source], checks=8)
        hook.remove()
        monkeypatch.undo()
        assert fed == sizes
        for name in ("self_check", "live_check"):
            assert near(parts[name], whole[name])


def near(one: Any, other: Any) -> bool:
    """Whether two parts of a reply are the same up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return one == other if not isinstance(one, float) else one == pytest.approx(other, rel=1e-2, abs=1e-4)


def test_others_may_use_the_model_while_a_graph_is_made(tmp_path: Path):
    session = LocalSession(traced("qwen3"), store=tmp_path)
    session.load_features(str(save_random(tmp_path / "t", "mlp_in[1]", "mlp_out[1]", n_features=60)), "t")
    arguments = trace_circuit.validate({"token_ids": IDS * 8, "max_bytes": 4_000_000})
    alone = session.run(trace_circuit, arguments)
    steps, pieces = trace_circuit.start(session, arguments), 0
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            found = end.value
            break
        pieces += 1
        assert progress.done <= progress.total
        session.lens(token_ids=IDS[::-1], show_progress=False)
    assert pieces > 5
    assert found == alone
