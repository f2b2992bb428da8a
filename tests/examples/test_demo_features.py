"""The autoencoders that are shipped for the embedded model: what their card says is so."""

import json
import os
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from attribution.features.streaming import Sample, captured_rows
from attribution.session import LocalSession
from examples.demo_card import card
from examples.demo_clamps import MEASURED, answers, effect, trials
from examples.demo_features import MEASURED_ON, PER_RULE, PLACES, cells_right, name_of, read_descriptions, read_pieces
from puzzles import COLOURS, demo_model_path
from puzzles.corpus import cached_encoder
from puzzles.labels import held_out_conversations

FOLDER = demo_model_path().with_name("demo_features")
NAMES = [name_of(*places) for places in PLACES]
FIGURES = json.loads((FOLDER / "figures.json").read_text())
FRESH = 11
"""A seed of held-out conversations that nothing was chosen on."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return LocalSession("demo", store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pieces():
    return read_pieces(FOLDER)


@pytest.fixture(scope="module")
def encode(session):
    return cached_encoder(session.model.tokenizer)


@pytest.fixture(scope="module")
def fresh(encode):
    return list(held_out_conversations(encode, FRESH, PER_RULE))


def rows_of(model, conversations):
    """What every place holds, [token, width] in float64, over all tokens in order."""
    places = list({place for both in PLACES for place in both})
    found = dict(captured_rows(model, places, [Sample(one.token_ids) for one in conversations]))
    return {
        place: torch.cat([found[index][place] for index in range(len(conversations))]).double().numpy()
        for place in places
    }


@pytest.fixture(scope="module")
def rows(session, fresh):
    return rows_of(session.model, fresh)


@pytest.fixture(scope="module")
def measured(session, encode):
    """The rows that the figures of the card are of."""
    return rows_of(session.model, list(held_out_conversations(encode, MEASURED_ON, PER_RULE)))


@cache
def weights(name):
    stored = load_file(FOLDER / name / "sae_weights.safetensors")
    return {key: value.astype(np.float64) for key, value in stored.items()}


def active(name, x):
    """The activations, by the formula of jumprelu alone."""
    one = weights(name)
    pre = x @ one["W_enc"] + one["b_enc"]
    return np.where(pre > one["threshold"], np.maximum(pre, 0), 0)


def described(name):
    return [json.loads(line) for line in (FOLDER / name / "descriptions.jsonl").read_text().splitlines()]


def test_the_folder_is_small_readable_and_its_card_is_made_of_its_figures(pieces):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert all(os.stat(path).st_mode & 0o004 for path in files)
    assert (FOLDER / "README.md").read_text() == card(FIGURES, read_descriptions(FOLDER, pieces))
    assert set(FIGURES["sources"]) == set(NAMES)


def test_a_session_finds_them_by_itself_and_they_fit_the_model(session):
    sources = {one["name"]: one for one in session.list_features()["sources"]}
    assert set(sources) == set(NAMES)
    for (reads, writes), name in zip(PLACES, NAMES, strict=True):
        one = sources[name]
        assert (one["status"], one["reads"], one["writes"]) == ("ready", str(reads), str(writes))
        assert one["n_features"] == FIGURES["sources"][name]["n_features"] == 512
        said = one["descriptions"]
        assert (said["n_described"], said["n_problems"]) == (FIGURES["sources"][name]["described"], 0)


@pytest.mark.parametrize("places", PLACES, ids=NAMES)
def test_explained_variance_l0_and_dead_features_are_those_of_the_card(measured, places):
    name, (reads, writes) = name_of(*places), places
    features, y = active(name, measured[reads]), measured[writes]
    error = y - (features @ weights(name)["W_dec"] + weights(name)["b_dec"])
    explained = 1 - (error**2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    said = FIGURES["sources"][name]
    assert explained == pytest.approx(said["explained_variance"], abs=1e-4)
    assert (features > 0).sum(axis=1).mean() == pytest.approx(said["l0"], abs=0.01)
    assert len(y) == said["rows"]
    # one that fires on a single token may do so by a rounding
    assert (features == 0).all(axis=0).sum() == pytest.approx(said["dead"], abs=1)
    assert said["explained_variance"] > 0.9


def test_nearly_all_cells_stay_right_with_reconstructions_in_place(session, pieces, fresh):
    stream = [one for one in pieces.values() if one.reads == one.writes]
    transcoders = [one for one in pieces.values() if one.reads != one.writes]
    fresh = fresh[::6]
    whole = cells_right(session.model, fresh, [])
    assert whole == pytest.approx(FIGURES["cells_right"], abs=0.01)
    assert cells_right(session.model, fresh, stream) > whole - 0.02
    assert cells_right(session.model, fresh, transcoders) > whole - 0.02


def test_the_features_of_colours_fire_on_their_tokens_and_on_no_others(rows, fresh, encode):
    ids = np.array([token for one in fresh for token in one.token_ids])
    name = "2-resid_post"
    features = active(name, rows[PLACES[0][0]])
    seen = set()
    for line in described(name):
        if [group for group, _ in line["labels"]] == ["colour"] and line["f1"] > 0.95:
            colour = line["labels"][0][1]
            fires, holds = features[:, line["index"]] > line["level"], ids == encode(f" {colour}")[0]
            assert 2 * (fires & holds).sum() / (fires.sum() + holds.sum()) == pytest.approx(line["f1"], abs=0.05)
            assert f"({colour}) cell" in line["description"]
            seen.add(colour)
    assert seen == set(COLOURS) - {"K"}


@pytest.mark.parametrize("places", PLACES, ids=NAMES)
def test_the_best_descriptions_are_true_of_other_puzzles(rows, fresh, places):
    tokens = [set(one.items()) for conversation in fresh for one in conversation.labels]
    features, name = active(name_of(*places), rows[places[0]]), name_of(*places)
    checked = 0
    for line in described(name)[:12]:
        holds = np.array([set(map(tuple, line["labels"])) <= labels for labels in tokens])
        fires = features[:, line["index"]] > line["level"]
        if holds.sum() >= 60:  # of rare words there are too few here
            assert 2 * (fires & holds).sum() / (fires.sum() + holds.sum()) == pytest.approx(line["f1"], abs=0.15)
            assert float(line["description"].split("F1 ")[1].split(")")[0].split()[0]) == pytest.approx(
                line["f1"], abs=0.006
            )
            assert ("above" in line["description"]) is (line["level"] > 0)
            checked += 1
    assert checked >= 3


def test_clamping_the_feature_of_a_colour_changes_the_cells_that_the_rule_says_and_no_others(session, pieces, encode):
    said = FIGURES["clamps"][0]
    tried = trials(encode, said["colour"], MEASURED, each=1)
    piece = pieces["2-resid_post"]
    before = answers(session.model, encode, piece, tried, said["index"], None)
    after = answers(session.model, encode, piece, tried, said["index"], said["value"])
    assert effect(tried, before, before).changed == 0
    found = effect(tried, before, after)
    assert found.changed > 0.6
    assert found.stayed > 0.98
    other = answers(session.model, encode, piece, tried, said["random"], said["value"])
    assert effect(tried, before, other).changed < found.changed / 2


def test_what_a_feature_promotes_is_what_its_direction_adds_to_the_logits(session, pieces, encode):
    model, line = session.model, described("3-transcoder")[0]
    weight = model.module.get_output_embeddings().weight.detach().double().numpy()
    scale = model.module.get_submodule("model.norm").weight.detach().double().numpy()
    ids = [encode(f" {colour}")[0] for colour in COLOURS]
    effects = weight[ids] @ (scale * weights("3-transcoder")["W_dec"][line["index"]])
    expected = dict(zip(COLOURS, effects - effects.mean(), strict=True))
    assert line["promotes"] == pytest.approx(expected, abs=1e-3)
