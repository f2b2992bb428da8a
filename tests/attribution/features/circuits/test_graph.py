"""A graph as a session gives it: what viewers need, the self-check, limits, and what is refused."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution.errors import (
    ContextLengthExceeded,
    GradientsRefused,
    InvalidArgument,
    OutOfRange,
    SourceNotFound,
    StorageFailed,
)
from attribution.features.circuits.nodes import cantor
from attribution.features.circuits.written import load_circuit, save_circuit, slug_of
from attribution.session import LocalSession
from tests.autoencoders import save_random
from tests.models import FAMILIES, tiny_tokenizer, traced

IDS = [5, 9, 200, 33, 7, 7, 150]
REQUIRED = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp")
"""Of a node, by Neuronpedia's schema; types below are its as well."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoders")
    for layer in range(3):
        save_random(folder / f"t{layer}", f"mlp_in[{layer}]", f"mlp_out[{layer}]", n_features=60, seed=layer)
    save_random(folder / "other", "mlp_in[1]", "mlp_out[1]", n_features=50, seed=8)
    save_random(folder / "res", "resid_post[1]", seed=9)
    save_random(folder / "z", "z[1]", d_in=60, d_dec=60)
    lines = [json.dumps({"index": index, "description": f"feature {index}"}) for index in range(0, 60, 2)]
    (folder / "said.jsonl").write_text("\n".join(lines))
    return folder


def session_of(family: str, folder: Path, home: Path, *names: str) -> LocalSession:
    session = LocalSession(traced(family), store=home / "store")
    for name in names:
        described = str(folder / "said.jsonl") if name in ("t0", "t1") else None
        session.load_features(str(folder / name), name, descriptions=described)
    return session


@pytest.fixture
def session(folder: Path, tmp_path: Path) -> LocalSession:
    return session_of("qwen3", folder, tmp_path, "t0", "t1", "t2")


def check_schema(graph: dict[str, Any]) -> None:
    """What Neuronpedia's graph-schema.json demands."""
    assert {"metadata", "qParams", "nodes", "links"} <= set(graph)
    metadata = graph["metadata"]
    assert all(isinstance(metadata[name], str) for name in ("slug", "scan", "prompt"))
    assert all(isinstance(token, str) for token in metadata["prompt_tokens"])
    assert isinstance(metadata["node_threshold"], float)
    assert isinstance(graph["qParams"]["pinnedIds"], list)
    for node in graph["nodes"]:
        assert set(REQUIRED) <= set(node)
        assert isinstance(node["feature"], int)
        assert isinstance(node["ctx_idx"], int)
        assert all(isinstance(node[name], str) for name in ("node_id", "layer", "feature_type", "jsNodeId", "clerp"))
        assert all(node[name] is None or isinstance(node[name], float) for name in ("influence", "activation"))
    for link in graph["links"]:
        assert isinstance(link["weight"], float)
        assert isinstance(link["source"], str)
        assert isinstance(link["target"], str)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_what_viewers_read_and_passes_its_own_check(family: str, folder: Path, tmp_path: Path):
    graph = session_of(family, folder, tmp_path, "t0", "t1", "t2").trace_circuit(token_ids=IDS, checks=20)
    check_schema(graph)
    assert json.loads(json.dumps(graph)) == graph
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == graph["counts"]["nodes"]
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(ids)
    kinds = Counter(node["feature_type"] for node in graph["nodes"])
    assert kinds["embedding"] == len(IDS)
    assert kinds["logit"] == len(graph["targets"])
    assert kinds["cross layer transcoder"] == graph["counts"]["features"] > 0
    assert kinds["mlp reconstruction error"] == graph["counts"]["errors"]
    check = graph["self_check"]
    assert len(check["edges"]) == 20
    assert check["passed"]
    assert check["relative_error"] < 5e-4
    assert check["constant_error"] < 1e-5
    assert ("softcap" in str(graph["notes"])) == (family == "gemma2")


def test_nodes_have_the_names_and_numbers_of_circuit_tracer(session: LocalSession):
    graph = session.trace_circuit(token_ids=IDS, targets=[60, 3])
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    token, first, second = nodes["E_33_3"], nodes["4_60_6"], nodes["4_3_6"]
    assert (token["layer"], token["ctx_idx"], token["jsNodeId"]) == ("E", 3, "E_33-3")
    assert (first["layer"], first["feature"], first["jsNodeId"]) == ("4", 60, "L_60-6")
    assert (first["is_target_logit"], second["is_target_logit"]) == (True, False)
    assert first["token_prob"] == graph["targets"][0]["probability"]
    for node in graph["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, index = int(node["layer"]), node["index"]
            assert node["node_id"] == f"{layer}_{index}_{node['ctx_idx']}"
            assert node["jsNodeId"] == f"{layer}_{index}-0"
            assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index == cantor(layer, index)
            assert node["clerp"] == (f"feature {index}" if layer < 2 and index % 2 == 0 else "")
            assert node["source"] == f"t{layer}"
        if node["feature_type"] == "mlp reconstruction error":
            assert node["node_id"] == f"{node['layer']}_-1_{node['ctx_idx']}"
            assert node["feature"] == -1
    assert graph["metadata"]["scan"] == "tiny-qwen3"
    assert graph["metadata"]["transcoder_list"] == ["t0", "t1", "t2"]


def test_the_links_into_a_node_and_its_constant_are_its_value_when_nothing_is_left_out(session: LocalSession):
    keep: Any = {"node": 1.0, "edge": 1.0}
    graph = session.trace_circuit(token_ids=IDS[:4], targets=[60], thresholds=keep, max_feature_nodes=10_000)
    assert graph["scores"]["missed"] == pytest.approx(0, abs=1e-6)
    sums: Counter[str] = Counter()
    for link in graph["links"]:
        sums[link["target"]] += link["weight"]
    logit = graph["nodes"][-1]
    assert sums[logit["node_id"]] + logit["constant"] == pytest.approx(logit["value"], rel=1e-4)
    ends = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(ends) > 50
    for node in ends:
        total = sums[node["node_id"]] + node["constant"]
        assert total == pytest.approx(node["activation"], rel=1e-3, abs=1e-3)


def test_the_targets_are_the_most_likely_tokens_until_they_hold_the_probability(session: LocalSession):
    with torch.no_grad():
        probabilities = traced("qwen3").module(torch.tensor([IDS])).logits[0, -1].double().softmax(-1)
    top = probabilities.topk(5)
    graph = session.trace_circuit(token_ids=IDS, max_logits=5)
    assert [one["token_id"] for one in graph["targets"]] == top.indices.tolist()
    assert [one["probability"] for one in graph["targets"]] == pytest.approx(top.values.tolist(), rel=1e-5)
    share = float(top.values[:3].sum()) - 1e-4
    assert len(session.trace_circuit(token_ids=IDS, logit_probability=share)["targets"]) == 3


def test_what_comes_after_the_position_is_left_out(session: LocalSession):
    cut, whole = session.trace_circuit(token_ids=IDS[:5]), session.trace_circuit(token_ids=IDS, position=-3)
    assert cut == whole
    assert whole["position"] == 4


def test_fewer_feature_nodes_are_the_most_influential_ones(session: LocalSession):
    whole = session.trace_circuit(token_ids=IDS, max_feature_nodes=10_000, thresholds={"node": 1.0, "edge": 1.0})
    few = session.trace_circuit(token_ids=IDS, max_feature_nodes=25, thresholds={"node": 1.0, "edge": 1.0})
    assert few["counts"]["traced_features"] == 25
    assert "25 of" in few["notes"][0]
    assert 0 < few["scores"]["missed"] < 0.7
    weights = {(link["source"], link["target"]): link["weight"] for link in whole["links"]}
    assert all(weights[link["source"], link["target"]] == pytest.approx(link["weight"]) for link in few["links"])
    features = [node for node in whole["nodes"] if node["feature_type"] == "cross layer transcoder"]
    best = sorted(features, key=lambda node: node["influence"])[:5]
    assert {node["node_id"] for node in best} <= {node["node_id"] for node in few["nodes"]}


def test_a_layer_without_a_transcoder_is_all_error_and_said_to_be(folder: Path, tmp_path: Path):
    graph = session_of("gemma2", folder, tmp_path, "t1").trace_circuit(token_ids=IDS, checks=10)
    assert graph["layers_without_transcoder"] == [0, 2]
    assert "layers [0, 2] have no transcoder" in graph["notes"][0]
    assert graph["self_check"]["passed"]
    assert {node["layer"] for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"} == {"1"}


def test_the_first_position_can_be_left_a_constant(session: LocalSession):
    graph = session.trace_circuit(token_ids=IDS, ignore_first=True, thresholds={"node": 1.0}, checks=16)
    at_first = {node["feature_type"] for node in graph["nodes"] if node["ctx_idx"] == 0}
    assert at_first == {"embedding"}
    assert graph["self_check"]["passed"]
    assert any("first position" in note for note in graph["notes"])


def test_the_live_check_takes_features_out_of_the_plain_model(session: LocalSession, folder: Path):
    graph = session.trace_circuit(token_ids=IDS, targets=[60], checks=5, max_feature_nodes=10_000)
    model, source = traced("qwen3").module, session.features.source(traced("qwen3"), "t1")
    found = {one["node_id"]: one["found"] for one in graph["live_check"]["features"]}
    name, moved = next((name, value) for name, value in found.items() if name.startswith("1_"))
    node = next(node for node in graph["nodes"] if node["node_id"] == name)
    vector = node["activation"] * source.autoencoder().W_dec[node["index"]]

    def without(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[0, node["ctx_idx"]] -= vector
        return output

    def value() -> float:
        with torch.no_grad():
            logits = model(torch.tensor([IDS])).logits[0, -1].double()
        return float(logits[60] - logits.mean())

    before = value()
    handle = model.model.layers[1].mlp.register_forward_hook(without)
    after = value()
    handle.remove()
    assert moved == pytest.approx(after - before, abs=1e-4)


def test_of_the_last_layer_the_final_norm_alone_parts_the_graph_from_the_running_model(session: LocalSession):
    graph = session.trace_circuit(token_ids=IDS, checks=30, max_feature_nodes=10_000, thresholds={"node": 1.0})
    last = [one for one in graph["live_check"]["features"] if one["node_id"].startswith("2_")]
    assert len(last) > 2
    for one in last:
        assert one["found_at_fixed_scale"] == pytest.approx(one["expected"], abs=1e-4)
        assert one["found"] != pytest.approx(one["expected"], abs=1e-4)
    said, found = (
        [one[name] for one in graph["live_check"]["features"]] for name in ("expected", "found_at_fixed_scale")
    )
    assert graph["live_check"]["at_fixed_scale"]["correlation"] == pytest.approx(np.corrcoef(said, found)[0, 1])


def test_one_token_is_enough(session: LocalSession):
    graph = session.trace_circuit(token_ids=[5])
    assert graph["self_check"]["passed"]
    assert [node["node_id"] for node in graph["nodes"] if node["layer"] == "E"] == ["E_5_0"]


def test_a_text_begins_with_the_special_token_that_its_transcoders_were_trained_with(folder: Path, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"  # which it has, and puts before no text by itself
    session = LocalSession(dataclasses.replace(traced("qwen3"), tokenizer=tokenizer), store=tmp_path)
    save_random(tmp_path / "bos", "mlp_in[0]", "mlp_out[0]", prepend_bos=True)
    session.load_features(str(tmp_path / "bos"), "bos")
    plain = session.trace_circuit("the rest", add_special_tokens=False)["metadata"]["prompt_tokens"]
    assert session.trace_circuit("the rest")["metadata"]["prompt_tokens"] == ["<|endoftext|>", *plain]
    given = session.trace_circuit(token_ids=IDS)["metadata"]["prompt_tokens"]
    assert len(given) == len(IDS)


def test_a_text_begins_with_no_special_token_where_its_transcoders_were_trained_without(tmp_path: Path):
    session = LocalSession(
        dataclasses.replace(traced("qwen3"), tokenizer=tiny_tokenizer(add_bos=True)), store=tmp_path / "store"
    )
    session.load_features(str(save_random(tmp_path / "not", "mlp_in[0]", "mlp_out[0]", prepend_bos=False)), "not")
    tokens = session.trace_circuit("the rest")["metadata"]["prompt_tokens"]
    assert tokens == [one["token"] for one in session.features_topk("the rest")["tokens"]]
    assert tokens[0] != "<|endoftext|>"


def test_a_text_that_fills_the_window_is_refused_before_a_special_token_is_put_before_it(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    session = LocalSession(dataclasses.replace(traced("gpt2"), tokenizer=tokenizer), store=tmp_path / "store")
    session.load_features(str(save_random(tmp_path / "bos", "mlp_in[0]", "mlp_out[0]", prepend_bos=True)), "bos")
    with pytest.raises(ContextLengthExceeded, match="prompt has 257 tokens"):
        session.trace_circuit("x" * 256)


def test_a_graph_is_saved_and_read_again(session: LocalSession, tmp_path: Path):
    graph = session.trace_circuit(token_ids=IDS, slug="mine")
    assert graph["metadata"]["slug"] == "mine"
    assert load_circuit(save_circuit(graph, tmp_path / "new" / "mine.json")) == graph
    with pytest.raises(InvalidArgument, match="has no metadata, qParams, links"):
        save_circuit({"nodes": []}, tmp_path / "x.json")
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(StorageFailed, match=name):
            load_circuit(tmp_path / name)
    assert slug_of("org/Model-2B", " The cat's … ") == "model-2b-the-cat-s"


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"targets": ["two words"]}, InvalidArgument, "tokens"),
        ({"targets": [281]}, OutOfRange, "281"),
        ({"targets": []}, InvalidArgument, "targets names 0"),
        ({"targets": [3, 3]}, InvalidArgument, "twice"),
        ({"thresholds": {"node": 1.01}}, OutOfRange, "thresholds.node is 1.01"),
        ({"thresholds": {"edge": -0.1}}, OutOfRange, "thresholds.edge is -0.1"),
        ({"thresholds": {"both": 0.1}}, InvalidArgument, "both"),
        ({"max_feature_nodes": 0}, OutOfRange, "max_feature_nodes is 0"),
        ({"max_logits": 101}, OutOfRange, "max_logits is 101"),
        ({"logit_probability": 1.5}, OutOfRange, "logit_probability is 1.5"),
        ({"position": 7}, OutOfRange, "position is 7"),
        ({"checks": 65}, OutOfRange, "checks is 65"),
        ({"max_bytes": 100_000}, InvalidArgument, "needs at least"),
        ({"token_ids": [5] * 257}, ContextLengthExceeded, "257"),
        ({"token_ids": []}, InvalidArgument, "no token"),
        ({"sources": []}, InvalidArgument, "sources is empty"),
        ({"sources": ["absent"]}, SourceNotFound, "absent"),
        ({"sources": ["t1", "other"]}, InvalidArgument, "same MLP"),
        ({"sources": ["t1", "res"]}, InvalidArgument, "'res' reads"),
        ({"sources": ["z"]}, InvalidArgument, "'z' reads"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(
    changed: dict[str, Any], error: type[Exception], said: str, folder: Path, tmp_path: Path
):
    session = session_of("qwen3", folder, tmp_path, "t0", "t1", "other", "res", "z")
    with pytest.raises(error, match=said):
        session.trace_circuit(**({"token_ids": IDS, "sources": ["t0", "t1"]} | changed))


def test_two_transcoders_of_a_layer_are_not_chosen_between(folder: Path, tmp_path: Path):
    session = session_of("qwen3", folder, tmp_path, "t1", "other")
    with pytest.raises(InvalidArgument, match="'other', 't1' stand for the same MLP"):
        session.trace_circuit(token_ids=IDS)


def test_without_any_source_nothing_is_traced(folder: Path, tmp_path: Path):
    with pytest.raises(SourceNotFound, match="it has none"):
        session_of("qwen3", folder, tmp_path).trace_circuit(token_ids=IDS)
    with pytest.raises(SourceNotFound, match="it has 'z'"):
        session_of("qwen3", folder, tmp_path, "z").trace_circuit(token_ids=IDS)


def test_a_quantised_model_is_refused(session: LocalSession, folder: Path, tmp_path: Path):
    quantised = LocalSession(dataclasses.replace(traced("qwen3"), quantization="nf4"), store=tmp_path)
    quantised.load_features(str(folder / "t0"), "t0")
    quantised.load_features(str(folder / "res"), "res")
    for source in ("t0", "res"):
        with pytest.raises(GradientsRefused, match="nf4"):
            quantised.trace_circuit(token_ids=IDS, sources=[source])
