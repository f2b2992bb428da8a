"""Without transcoders: gradient × activation at one layer, against plain transformers with hooks that add to it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution.model.load import trace_model
from attribution.session import LocalSession
from tests.attribution.plain_layers import final_norm
from tests.autoencoders import random_autoencoder, save_random
from tests.models import FAMILIES, tiny_model, tiny_tokenizer

IDS = [5, 9, 200, 33, 7, 7, 150]
WHOLE: Any = {"node": 1.0, "edge": 1.0}


def session_of(family: str, home: Path, point: str, **changes: Any) -> LocalSession:
    """A float64 model with an autoencoder of the stream whose features are small beside it."""
    model = trace_model("tiny", tiny_model(family).double(), tiny_tokenizer())
    session = LocalSession(model, store=home / "store")
    made = random_autoencoder(seed=4)
    save_random(home / "res", point, seed=4, W_dec=made.W_dec / 10, **changes)
    session.load_features(str(home / "res"), "res")
    return session


def moved(model: Any, module: Any, side: str, position: int, vector: torch.Tensor, token: int) -> float:
    """A logit less the mean logit, before a softcap, with a vector added at a place of the plain model."""

    def add(value: Any) -> Any:
        value = value.clone()
        value[0, position] += vector
        return value

    seen = []
    handles = [final_norm(model).register_forward_hook(lambda module, args, output: seen.append(output))]
    if side == "input":
        handles.append(module.register_forward_pre_hook(lambda module, args: (add(args[0]), *args[1:])))
    else:
        handles.append(module.register_forward_hook(lambda module, args, output: add(output)))
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    logits = model.get_output_embeddings()(seen[0][0, -1])
    return float(logits[token] - logits.mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("point", "layer", "side"), [("resid_post[1]", 1, "output"), ("resid_pre[1]", 1, "input")])
def test_an_edge_is_the_first_order_change_of_the_logit(family: str, point: str, layer: int, side: str, tmp_path: Path):
    session = session_of(family, tmp_path, point)
    graph = session.trace_circuit(token_ids=IDS, targets=[60, 3], thresholds=WHOLE, checks=12)
    assert graph["method"] == "gradient_x_activation"
    assert graph["self_check"]["passed"]
    model: Any = session.model.module
    decoder: Any = model.get_decoder()
    module = (decoder.h if hasattr(decoder, "h") else decoder.layers)[layer]
    directions = session.features.source(session.model, "res").autoencoder(dtype=torch.float64).W_dec
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    links = [link for link in graph["links"] if nodes[link["source"]]["feature_type"] == "cross layer transcoder"]
    expected, small, ablated = [], [], []
    for link in sorted(links, key=lambda link: -abs(link["weight"]))[:25]:
        node, token = nodes[link["source"]], nodes[link["target"]]["feature"]
        vector = node["activation"] * directions[node["index"]]
        at = (model, module, side, node["ctx_idx"])
        step = 0.01
        up, down = moved(*at, step * vector, token), moved(*at, -step * vector, token)
        small.append((up - down) / (2 * step))
        ablated.append(moved(*at, 0 * vector, token) - moved(*at, -vector, token))
        expected.append(link["weight"])
    assert np.allclose(expected, small, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert np.corrcoef(expected, ablated)[0, 1] > 0.8


def test_the_reply_says_that_it_is_another_method(tmp_path: Path):
    graph = session_of("qwen3", tmp_path, "resid_post[1]").trace_circuit(token_ids=IDS)
    assert "no transcoders: gradient times activation at resid_post[1]" in graph["notes"][0]
    assert graph["layers_without_transcoder"] == [0, 1, 2]
    assert graph["scores"]["replacement"] is None
    assert 0 < graph["scores"]["completeness"] < 1
    assert {node["layer"] for node in graph["nodes"] if node["feature_type"] != "embedding"} == {"1", "4"}
    targets = {link["target"] for link in graph["links"]}
    assert all(target.startswith("4_") for target in targets)


def test_edges_and_the_error_are_the_gradient_times_the_stream_together(tmp_path: Path):
    # features and errors add up to what the autoencoder reads less b_dec: with b_dec 0, Σ edges = ⟨gradient, stream⟩,
    # which by hooks is the change per unit when the whole stream grows
    session = session_of("gpt2", tmp_path, "resid_post[1]", b_dec=torch.zeros(48))
    graph = session.trace_circuit(token_ids=IDS, targets=[60], thresholds=WHOLE, max_feature_nodes=10_000)
    model: Any = session.model.module
    with torch.no_grad():
        stream = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[2][0]
    module, step = model.get_decoder().h[1], 1e-4
    total = sum(
        (moved(model, module, "output", at, step * row, 60) - moved(model, module, "output", at, -step * row, 60))
        / (2 * step)
        for at, row in enumerate(stream)
    )
    assert sum(link["weight"] for link in graph["links"]) == pytest.approx(total, rel=1e-5)


def test_the_strongest_features_are_kept_and_the_first_position_can_be_left_out(tmp_path: Path):
    session = session_of("llama", tmp_path, "resid_post[1]")
    whole = session.trace_circuit(token_ids=IDS, thresholds=WHOLE, targets=[60])
    few = session.trace_circuit(token_ids=IDS, thresholds=WHOLE, targets=[60], max_feature_nodes=9)
    features = [link for link in whole["links"] if "_-1_" not in link["source"]]
    features.sort(key=lambda link: -abs(link["weight"]))
    assert {link["source"] for link in features[:9]} == {
        link["source"] for link in few["links"] if "_-1_" not in link["source"]
    }
    later = session.trace_circuit(token_ids=IDS, thresholds=WHOLE, targets=[60], ignore_first=True)
    assert not [link for link in later["links"] if link["source"].endswith("_0")]


def test_in_16_bits_the_check_says_that_it_cannot_tell(tmp_path: Path):
    session = session_of("qwen3", tmp_path, "resid_post[1]")
    half = dataclasses.replace(trace_model("tiny", tiny_model("qwen3").bfloat16(), tiny_tokenizer()), id="half")
    coarse = LocalSession(half, store=tmp_path / "half")
    coarse.load_features(str(tmp_path / "res"), "res")
    check = coarse.trace_circuit(token_ids=IDS)["self_check"]
    assert (check["tolerance"], check["passed"]) == (None, None)
    assert session.trace_circuit(token_ids=IDS)["self_check"]["passed"] is True
