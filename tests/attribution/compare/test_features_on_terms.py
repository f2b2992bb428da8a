"""The features that fire on terms, against plain hidden states and an encoder written in numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution.compare.measure import strongest
from attribution.features.places import parse_place
from attribution.features.writing import write_autoencoder
from attribution.session import LocalSession
from tests.autoencoders import N_FEATURES, numpy_features, random_autoencoder, save_random
from tests.comparing import tiny
from tests.models import tiny_model, tiny_tokenizer

SENTENCES = ["in the other, there", "they sing in the", "on"]


@pytest.fixture
def session(tmp_path: Path) -> LocalSession:
    made = LocalSession(tiny("tiny", "qwen3", add_bos=True), store=tmp_path / "store")
    (tmp_path / "said.jsonl").write_text("\n".join(f'{{"index": {at}, "description": "f{at}"}}' for at in range(60)))
    made.load_features(str(save_random(tmp_path / "one")), "one", descriptions=str(tmp_path / "said.jsonl"))
    made.load_features(str(save_random(tmp_path / "two", "mlp_out[2]", n_features=50, seed=1)), "two")
    return made


def activations(folder: Path, text: str) -> Any:
    """Of each token of a text, bos included, the features after layer 1."""
    ids = torch.tensor([tiny_tokenizer(add_bos=True).encode(text)])
    with torch.no_grad():
        states = tiny_model("qwen3")(input_ids=ids, output_hidden_states=True).hidden_states
    return numpy_features(folder, states[2][0])


def test_a_feature_has_its_largest_activation_at_each_occurrence_and_the_mean_over_them(
    session: LocalSession, tmp_path: Path
):
    found = session.measure_text(SENTENCES, ["the", "on", "nowhere"], top_features=N_FEATURES)
    the, on, nowhere = found["terms"]
    # in, the, o, t, he, r, ",", the, re and t, he, y, s, ing, blank, in, the
    tokens = [[1], [3, 4], [7], [0, 1], [7]]
    spans = [found["sentences"][row["sentence"]]["spans"] for row in the["occurrences"]]
    assert tokens == [
        [at for at, (first, end) in enumerate(own) if max(first, row["start"]) < min(end, row["end"])]
        for own, row in zip(spans, the["occurrences"], strict=True)
    ]
    largest = [
        activations(tmp_path / "one", SENTENCES[row["sentence"]])[1:][at].max(0)
        for row, at in zip(the["occurrences"], tokens, strict=True)
    ]
    mean, counts = np.mean(largest, 0), np.sum(np.array(largest) > 0, 0)
    own = [one for one in the["features"] if one["source"] == "one"]
    assert len(own) == int((mean > 0).sum()) > 3
    for one in own:
        assert one["activation"] == pytest.approx(mean[one["index"]], rel=1e-4, abs=1e-5)
        assert one["n_occurrences"] == counts[one["index"]]
        assert (one["layer"], one["description"]) == (1, f"f{one['index']}" if one["index"] < 60 else None)
    values = [one["activation"] for one in own]
    assert values == sorted(values, reverse=True)
    assert any(one["source"] == "two" for one in the["features"])
    assert on["features"]
    assert not nowhere["features"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_kept_in_16_bits_are_computed_with_in_the_dtype_of_the_attribution(dtype: torch.dtype, tmp_path: Path):
    session = LocalSession(tiny("tiny", "qwen3", add_bos=True), store=tmp_path / "store")
    place = parse_place("resid_post[1]")
    write_autoencoder(tmp_path / "half", random_autoencoder().to(dtype=dtype), reads=place)
    session.load_features(str(tmp_path / "half"), "half")
    (term,) = session.measure_text(["on"], ["on"], top_features=N_FEATURES)["terms"]
    expected = activations(tmp_path / "half", "on")[1:].max(0)
    assert {one["index"] for one in term["features"]} == set(expected.nonzero()[0].tolist())
    for one in term["features"]:
        assert one["activation"] == pytest.approx(expected[one["index"]], rel=1e-4, abs=1e-5)


def test_as_many_as_are_asked_for_of_each_autoencoder_and_none_is_not_computed(
    session: LocalSession, monkeypatch: pytest.MonkeyPatch
):
    (term,) = session.measure_text(SENTENCES, ["the"], top_features=2, include_descriptions=False)["terms"]
    assert [one["source"] for one in term["features"]] == ["one", "one", "two", "two"]
    assert all("description" not in one for one in term["features"])
    monkeypatch.setattr(session.features, "of", None)
    found = session.measure_text(SENTENCES, ["the"], top_features=0)
    assert (found["sources"], found["terms"][0]["features"]) == ([], [])


def test_groups_of_occurrences_change_nothing(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    text = ["the " * 9]
    whole = session.measure_text(text, ["the"])["terms"]
    monkeypatch.setattr("attribution.compare.measure._SPANS", 2)
    (parts,) = session.measure_text(text, ["the"])["terms"]
    for one, other in zip(whole[0]["features"], parts["features"], strict=True):
        assert one["activation"] == pytest.approx(other.pop("activation"), rel=1e-5)
        assert {name: one[name] for name in other} == other


def test_the_strongest_by_hand():
    fired = [
        (torch.tensor([2, 5]), torch.tensor([1.0, 4.0])),
        (torch.tensor([5, 9]), torch.tensor([2.0, 1.0])),
        (torch.tensor([], dtype=torch.long), torch.tensor([])),
    ]
    # of three occurrences: feature 5 has (4 + 2) / 3, 2 and 9 have 1/3
    found = strongest(fired, 2)
    assert found.indices == [5, 2]
    assert found.activations == pytest.approx([2.0, 1 / 3])
    assert found.counts == [2, 1]
    assert strongest([], 3).indices == strongest(fired, 0).indices == []
