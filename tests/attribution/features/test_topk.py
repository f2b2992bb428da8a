"""The strongest features of each token, against plain transformers' hidden states and an encoder written in numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution.errors import BadPositions, InvalidArgument, OutOfRange, SightlineError, SourceNotFound
from attribution.session import LocalSession
from tests.attribution.features.folders import sparsify_config, sparsify_tensors, write_folder
from tests.autoencoders import N_FEATURES, numpy_features, random_autoencoder, save_random
from tests.models import FAMILIES, tiny_model, tiny_tokenizer, traced

TEXTS = ["the rest in a while", "or", "<|im_start|>user\nHello there<|im_end|>"]


def session_of(home: Path, family: str = "qwen3") -> LocalSession:
    return LocalSession(traced(family), store=home / "store", runs_dir=home / "runs")


@pytest.fixture
def session(tmp_path: Path) -> LocalSession:
    """A tiny model with an autoencoder after layer 1, with descriptions, and one that is read before layer 0."""
    made = session_of(tmp_path)
    lines = ['{"index": 3, "description": "three"}', '{"index": "11", "description": "eleven"}']
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    made.load_features(str(save_random(tmp_path / "one")), "one", descriptions=str(tmp_path / "said.jsonl"))
    made.load_features(str(save_random(tmp_path / "zero", "resid_pre[0]", n_features=50, seed=1)), "zero")
    return made


def hidden_states(family: str, ids: list[int]) -> Any:
    """What enters each layer, from plain transformers."""
    with torch.no_grad():
        return tiny_model(family)(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def expected(folder: Path, rows: Any, k: int) -> list[list[tuple[int, float]]]:
    """For each row the k strongest active features, strongest first."""
    found = []
    for row in numpy_features(folder, rows):
        order = np.argsort(-row, kind="stable")[:k]
        found.append([(int(index), float(row[index])) for index in order if row[index] > 0])
    return found


def listed(tokens: list[dict[str, Any]]) -> list[list[tuple[int, float]]]:
    return [[(one["index"], one["activation"]) for one in token["features"]] for token in tokens]


def close(found: list[list[tuple[int, float]]], wanted: list[list[tuple[int, float]]]) -> bool:
    assert any(len(row) for row in wanted)
    assert [[index for index, _ in row] for row in found] == [[index for index, _ in row] for row in wanted]
    return all(
        value == pytest.approx(other, rel=1e-4, abs=1e-5)
        for row, same in zip(found, wanted, strict=True)
        for (_, value), (_, other) in zip(row, same, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_strongest_features_are_those_of_plain_hidden_states_and_numpy(family: str, tmp_path: Path):
    session = session_of(tmp_path, family)
    folder = save_random(tmp_path / "one")
    session.load_features(str(folder))
    ids = tiny_tokenizer().encode(TEXTS[0], add_special_tokens=False)
    reply = session.features_topk(TEXTS[0], k=4)
    assert [token["token_id"] for token in reply["tokens"]] == ids
    assert [token["position"] for token in reply["tokens"]] == list(range(len(ids)))
    # layer 1's output is what enters layer 2
    assert close(listed(reply["tokens"]), expected(folder, hidden_states(family, ids)[2][0], 4))
    assert (reply["layer"], reply["source"], reply["k"], reply["activations"]) == (1, "1-resid_post", 4, "computed")


def test_texts_in_padded_batches_give_what_each_gives_alone(session: LocalSession):
    texts = [TEXTS[number % 3] + " in" * number for number in range(20)]
    reply = session.features_topk(texts, layer=1, k=3, show_progress=False)
    assert reply["model_id"] == "tiny-qwen3"
    for text, one in zip(texts, reply["results"], strict=True):
        alone = session.features_topk(text, layer=1, k=3)
        assert [token["token_id"] for token in one["tokens"]] == [token["token_id"] for token in alone["tokens"]]
        assert close(listed(one["tokens"]), listed(alone["tokens"]))


def test_without_a_layer_every_autoencoder_gives_its_k_strongest(session: LocalSession, tmp_path: Path):
    ids = [5, 80, 12, 7]
    reply = session.features_topk(token_ids=ids, k=2)
    assert (reply["layer"], reply["source"]) == (None, None)
    assert [(one["name"], one["layer"]) for one in reply["sources"]] == [("zero", 0), ("one", 1)]
    states = hidden_states("qwen3", ids)
    for folder, state, layer in (("zero", states[0], 0), ("one", states[2], 1)):
        mine = [
            {**token, "features": [one for one in token["features"] if one["source"] == folder]}
            for token in reply["tokens"]
        ]
        assert close(listed(mine), expected(tmp_path / folder, state[0], 2))
        assert {one["layer"] for token in mine for one in token["features"]} == {layer}
    orders = [[one["source"] for one in token["features"]] for token in reply["tokens"]]
    assert all(order == sorted(order, reverse=True) for order in orders)  # "zero" first


def test_only_active_features_are_listed(session: LocalSession, tmp_path: Path):
    reply = session.features_topk(TEXTS[0], source="one", k=N_FEATURES)
    ids = [token["token_id"] for token in reply["tokens"]]
    active = (numpy_features(tmp_path / "one", hidden_states("qwen3", ids)[2][0]) > 0).sum(-1)
    assert [len(token["features"]) for token in reply["tokens"]] == active.tolist()
    assert max(active) < N_FEATURES


def test_descriptions_are_there_when_asked_for(session: LocalSession):
    reply = session.features_topk(TEXTS[0], source="one", k=N_FEATURES)
    said = {one["index"]: one["description"] for token in reply["tokens"] for one in token["features"]}
    assert {text for text in said.values() if text} <= {"three", "eleven"}
    assert (said.get(3, "three"), said.get(11, "eleven")) == ("three", "eleven")
    assert {3, 11} & set(said)
    bare = session.features_topk(TEXTS[0], source="one", include_descriptions=False)
    assert all(set(one) == {"index", "activation", "layer", "source"} for t in bare["tokens"] for one in t["features"])


def test_special_tokens_are_marked(session: LocalSession):
    tokens = session.features_topk(TEXTS[2], layer=1)["tokens"]
    assert [token["token"] for token in tokens if token["is_special"]] == ["<|im_start|>", "<|im_end|>"]
    messages = [{"role": "user", "content": "Hello there"}]
    assert session.features_topk(messages=messages, layer=1)["tokens"][: len(tokens)] != []
    demo = LocalSession("demo")  # its tokenizer gives no name to the first one, as that of Llama 3
    tokens = demo.features_topk(messages=[{"role": "user", "content": "Hello"}], layer=2, k=1)["tokens"]
    assert [token["token_id"] for token in tokens if token["is_special"]] == [1, 2, 1]


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        ("all", [0, 1, 2, 3, 4]),
        (None, [0, 1, 2, 3, 4]),
        ("last", [4]),
        ({"start": 1, "step": 2}, [1, 3]),
        ([3, -1, 0], [3, 4, 0]),
        (range(1, 3), [1, 2]),
        (np.array([2]), [2]),
    ],
)
def test_positions_are_a_window_or_a_list(session: LocalSession, positions: Any, kept: list[int]):
    ids = [5, 80, 12, 7, 9]
    every = session.features_topk(token_ids=ids, layer=1)["tokens"]
    found = session.features_topk(token_ids=ids, layer=1, positions=positions)["tokens"]
    assert [token["position"] for token in found] == kept
    assert close(listed(found), [listed(every)[position] for position in kept])


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"k": N_FEATURES + 1}, OutOfRange, "k"),
        ({"k": 0}, OutOfRange, "k"),
        ({"layer": 2}, SourceNotFound, "layer"),
        ({"layer": 3}, OutOfRange, "layer"),
        ({"layer": None, "source": "two"}, SourceNotFound, "source"),
        ({"layer": 0, "source": "one"}, SourceNotFound, "source"),
        ({"text": ""}, InvalidArgument, "text"),
        ({"text": []}, InvalidArgument, "text"),
        ({"text": ["a", ""]}, InvalidArgument, "text.1"),
        ({"text": None}, InvalidArgument, "text"),
        ({"token_ids": [1]}, InvalidArgument, "text"),
        ({"text": None, "token_ids": []}, InvalidArgument, "token_ids"),
        ({"sample_id": 1}, InvalidArgument, "sample_id"),
        ({"positions": [99]}, OutOfRange, "positions"),
        ({"positions": [0, 0]}, InvalidArgument, "positions"),
        ({"positions": []}, InvalidArgument, "positions"),
        ({"positions": "generated"}, BadPositions, "positions"),
        ({"positions": {"start": 50}}, BadPositions, "positions"),
        ({"positions": {"stop": 50}}, BadPositions, "positions"),
        ({"positions": "middle"}, BadPositions, "positions"),
        ({"text": ["the" * 100] * 80, "k": N_FEATURES}, InvalidArgument, "k"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    session: LocalSession, wrong: dict[str, Any], error: type[SightlineError], param: str
):
    with pytest.raises(error) as raised:
        session.features_topk(**({"text": TEXTS[0], "layer": 1} | wrong))
    assert raised.value.param == param


def test_a_stored_sample_gives_what_it_holds_and_the_rest_is_computed(
    session: LocalSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session.load_features(str(save_random(tmp_path / "head", "z[1]", d_in=60, d_dec=60)), "head")
    session.load_features(str(save_random(tmp_path / "mlp", "mlp_out[2]")), "mlp")
    session.load_features(str(save_random(tmp_path / "last", "resid_post[2]")), "last")
    session.load_features(str(save_random(tmp_path / "mid", "resid_mid[1]")), "mid")
    ids = [5, 80, 12, 7, 9, 100]
    session.forward("set", 0, token_ids=ids)
    computed = {name: session.features_topk(token_ids=ids, source=name, k=3)["tokens"] for name in STORED}
    mid = session.features_topk(dataset_id="set", sample_id=0, source="mid")
    assert mid["activations"] == "computed"
    every = session.features_topk(dataset_id="set", sample_id=0)
    assert (every["activations"], every["source"]) == ("mixed", None)
    monkeypatch.delattr("attribution.features.topk.forward")  # nothing is run again
    for name in STORED:
        found = session.features_topk(dataset_id="set", sample_id=0, source=name, k=3)
        assert found["activations"] == "recorded"
        assert close(listed(found["tokens"]), listed(computed[name]))
    part = session.features_topk(dataset_id="set", sample_id=0, source="head", k=3, positions=[-1, 2])["tokens"]
    assert close(listed(part), [listed(computed["head"])[position] for position in (5, 2)])


STORED = ("zero", "one", "head", "mlp", "last")


@pytest.mark.parametrize(
    ("trained", "adds", "given", "begins"),
    [
        (True, False, {}, True),
        (True, True, {}, True),
        (False, True, {}, False),
        (None, True, {}, True),
        (None, True, {"add_special_tokens": False}, False),
        (None, False, {"prepend_bos": True}, True),
        (True, True, {"prepend_bos": False}, False),
    ],
)
def test_a_text_begins_as_the_texts_did_that_the_autoencoder_was_trained_on(
    tmp_path: Path, trained: bool | None, adds: bool, given: dict[str, bool], begins: bool
):
    from attribution.model.load import trace_model

    tokenizer = tiny_tokenizer(add_bos=adds)
    tokenizer.bos_token = "<|endoftext|>"
    session = LocalSession(trace_model("tiny", tiny_model("llama"), tokenizer), store=tmp_path / "store")
    session.load_features(str(save_random(tmp_path / "one", prepend_bos=trained)))
    reply = session.features_topk("the rest", k=1, **given)
    texts = [token["token"] for token in reply["tokens"]]
    assert "".join(texts) == "<|endoftext|>" * begins + "the rest"
    assert reply["tokens"][0]["is_special"] == begins
    assert reply["sources"][0]["prepend_bos"] is trained
    assert len(session.features_topk(token_ids=[5], **given)["tokens"]) == 1  # token ids are taken as they are


def test_a_tokenizer_without_that_token_leaves_a_text_as_it_is(tmp_path: Path):
    session = session_of(tmp_path)
    session.load_features(str(save_random(tmp_path / "one", prepend_bos=True)))
    reply = session.features_topk("the rest", k=1)
    assert "".join(token["token"] for token in reply["tokens"]) == "the rest"
    assert reply["sources"][0]["prepend_bos"] is True


def test_autoencoders_that_were_trained_differently_are_asked_one_by_one(tmp_path: Path):
    session = session_of(tmp_path)
    session.load_features(str(save_random(tmp_path / "with", prepend_bos=True)), "with")
    session.load_features(str(save_random(tmp_path / "without", prepend_bos=False)), "without")
    with pytest.raises(InvalidArgument, match="'with' True, 'without' False") as raised:
        session.features_topk("the rest")
    assert raised.value.param == "prepend_bos"
    for chosen in ({"source": "with"}, {"prepend_bos": False}):
        assert session.features_topk("the rest", **chosen)["tokens"]
    assert session.features_topk(token_ids=[1, 2])["tokens"]


def test_activations_that_are_not_finite_are_an_error(tmp_path: Path):
    from attribution.errors import NotFinite
    from attribution.model.load import trace_model

    broken = tiny_model("llama")
    session = LocalSession(trace_model("broken", broken, tiny_tokenizer()), store=tmp_path / "store")
    session.load_features(str(save_random(tmp_path / "one")))
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match=r"resid_post\[1\]"):
        session.features_topk("the rest")


def test_a_transcoder_of_sparsify_is_known_by_its_folder_and_encodes_as_loops_do(tmp_path: Path):
    made = random_autoencoder(activation="topk", k=5, threshold=None, subtracts_b_dec=False)
    folder = tmp_path / "layers.1.mlp"
    config = sparsify_config(made, transcode=True)
    write_folder(folder, config, sparsify_tensors(made), weights="sae")
    session = session_of(tmp_path)
    said = session.load_features(str(folder))
    assert (said["name"], said["reads"], said["writes"], said["k"]) == ("1-mlp_in", "mlp_in[1]", "mlp_out[1]", 5)
    ids, seen = [5, 80, 12], []
    plain = tiny_model("qwen3")
    plain.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double().numpy()))
    with torch.no_grad():
        plain(input_ids=torch.tensor([ids]))
    assert made.b_enc is not None
    found = session.features_topk(token_ids=ids, k=20)["tokens"]
    for token, row in zip(found, seen[0], strict=True):
        pre = [
            sum(float(x) * float(w) for x, w in zip(row, column, strict=True)) + float(b)
            for column, b in zip(made.W_enc.T, made.b_enc, strict=True)
        ]
        order = sorted(range(N_FEATURES), key=lambda index: -pre[index])[:5]
        assert [one["index"] for one in token["features"]] == [index for index in order if pre[index] > 0]
        assert [one["activation"] for one in token["features"]] == pytest.approx(
            [pre[index] for index in order if pre[index] > 0], rel=1e-4
        )
