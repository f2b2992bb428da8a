"""Sources: held against their model before they are used, kept in bounds, and let go with their model."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution.errors import (
    CannotFit,
    InvalidArgument,
    OutOfRange,
    SightlineError,
    SourceMismatch,
    SourceNotFound,
    StorageFailed,
    UnsupportedModel,
)
from attribution.features import weights as weights_module
from attribution.features.declared import Declaration, check_model, read_source, width_of
from attribution.features.places import PLACES, Place
from attribution.features.sources import FeatureStore, Source
from attribution.features.weights import KeptWeights
from attribution.session import LocalSession
from tests.autoencoders import N_FEATURES, random_autoencoder, save_random
from tests.models import D_HEAD, D_MLP, D_MODEL, FAMILIES, N_HEADS, N_LAYERS, save_tiny, traced


def declared(folder: Path, **more: Any) -> Declaration:
    return Declaration(**({"model": "tiny-qwen3", "folder": folder} | more))


def read(folder: Path, family: str = "qwen3", **more: Any) -> Source:
    return read_source(traced(family), declared(folder, **more), KeptWeights())


def test_weights_that_are_not_finite_are_told_when_they_are_loaded(tmp_path: Path):
    folder = save_random(tmp_path / "one")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][3, 2] = torch.nan
    save_file(tensors, folder / "sae_weights.safetensors")
    store = FeatureStore()
    with pytest.raises(InvalidArgument, match="W_dec holds a value that is not finite"):
        store.load(traced("qwen3"), declared(folder))
    assert not store.of(traced("qwen3"))


# --- the places and widths


@pytest.mark.parametrize("family", FAMILIES)
def test_the_width_of_every_place_is_that_of_the_model(family: str):
    d_head = {"qwen2": D_MODEL // N_HEADS, "gpt2": D_MODEL // N_HEADS}.get(family, D_HEAD)
    widths = {"z": N_HEADS * d_head, "mlp_hidden": D_MLP}
    for point in PLACES:
        assert width_of(traced(family), Place(point, 1)) == widths.get(point, D_MODEL)


def test_an_autoencoder_is_taken_with_what_its_folder_says(tmp_path: Path):
    found = read(save_random(tmp_path / "one", prepend_bos=True))
    assert (found.name, found.model_id, found.reads) == ("1-resid_post", "tiny-qwen3", Place("resid_post", 1))
    assert (found.writes, found.is_transcoder, found.layer) == (found.reads, False, 1)
    assert (found.n_features, found.d_in, found.d_out) == (N_FEATURES, D_MODEL, D_MODEL)
    assert (found.architecture, found.dtype, found.k, found.prepend_bos) == ("jumprelu", torch.float32, None, True)
    transcoder = read(save_random(tmp_path / "two", "mlp_in[2]", "mlp_out[2]"), name="t")
    assert (transcoder.name, transcoder.is_transcoder, str(transcoder.writes)) == ("t", True, "mlp_out[2]")
    with pytest.raises(OutOfRange, match=f"0 to {N_FEATURES - 1}"):
        found.check_index(N_FEATURES)


@pytest.mark.parametrize(
    ("made", "more", "error", "said"),
    [
        ({"d_in": 47, "d_dec": 47}, {}, SourceMismatch, f"width 47, and resid_post\\[1\\] .* has the width {D_MODEL}"),
        ({"point": "z[1]"}, {}, SourceMismatch, f"width {D_MODEL}, and z\\[1\\] .* {N_HEADS * D_HEAD}"),
        ({"point": "mlp_hidden[1]"}, {}, SourceMismatch, f"width {D_MODEL}, and mlp_hidden\\[1\\] .* {D_MLP}"),
        ({"point": f"resid_post[{N_LAYERS}]"}, {}, SourceMismatch, f"the layers 0 to {N_LAYERS - 1}"),
        ({"writes": "mlp_hidden[1]"}, {}, SourceMismatch, "writes rows of width"),
        (
            {},
            {"point": "resid_post[2]"},
            SourceMismatch,
            "is resid_post\\[2\\], and the autoencoder is of resid_post\\[1",
        ),
        ({}, {"writes": "resid_post[2]"}, SourceMismatch, "is no transcoder"),
        ({"point": "mlp_in[1]", "writes": "mlp_out[1]"}, {"writes": "mlp_out[2]"}, SourceMismatch, "is mlp_out\\[2\\]"),
        ({}, {"point": "middle"}, InvalidArgument, "'middle' is no place"),
        ({}, {"source_id": "5-res"}, InvalidArgument, "there are no descriptions"),
        ({"name": "gpt2-small"}, {}, SourceMismatch, "trained on 'gpt2-small', and this model is 'tiny-qwen3'"),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_sides(
    tmp_path: Path, made: dict[str, Any], more: dict[str, Any], error: type[SightlineError], said: str
):
    folder = save_random(tmp_path / "one", **made)
    with pytest.raises(error, match=said):
        read(folder, **more)


def test_what_the_config_says_may_be_said_again_in_other_words(tmp_path: Path):
    folder = save_random(tmp_path / "one")
    for point in ("resid_post[1]", "blocks.1.hook_resid_post"):
        assert read(folder, point=point).reads == Place("resid_post", 1)


def test_a_place_that_the_config_leaves_open_is_to_be_said(tmp_path: Path):
    folder = save_random(tmp_path / "one")
    config = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_text(
        config.replace("blocks.1.hook_resid_post", "model.middle").replace("layers.1", "x")
    )
    with pytest.raises(InvalidArgument, match="give point"):
        read(folder)
    assert read(folder, point="resid_mid[2]").reads == Place("resid_mid", 2)


def test_a_model_whose_points_are_not_proved_has_no_autoencoders(tmp_path: Path):
    bare = replace(traced("qwen3"), family=None, note="because")
    with pytest.raises(UnsupportedModel):
        read_source(bare, declared(save_random(tmp_path / "one")), KeptWeights())


# --- the model


@pytest.mark.parametrize(
    ("model_id", "source", "said", "fits"),
    [
        ("openai-community/gpt2", "openai-community/gpt2", "gpt2-small", True),
        ("openai-community/gpt2", "openai-community/gpt2", "gpt2", True),
        ("openai-community/gpt2", "openai-community/gpt2", "GPT2", True),
        ("openai-community/gpt2", "openai-community/gpt2", "gpt2-medium", False),
        ("google/gemma-2-2b", "google/gemma-2-2b", "gemma-2-2b", True),
        ("google/gemma-2-2b", "google/gemma-2-2b", "gemma-2-2b-it", False),
        ("google/gemma-2-2b", "google/gemma-2-2b", "other/gemma-2-2b", False),
        ("/data/gemma-2-2b", "/data/gemma-2-2b", "gemma-2-2b", True),
        ("/data/gemma-2-2b/", "/data/gemma-2-2b/", "google/gemma-2-2b", True),
        ("/c/models--google--gemma-2-2b/snapshots/0a1b", "/c", "google/gemma-2-2b", True),
        ("/c/models--google--gemma-2-2b/snapshots/0a1b", "/c", "google/gemma-2-9b", False),
        ("/data/mine", "/data/mine", "gemma-2-2b", False),
        ("anything", "anything", None, True),
    ],
)
def test_the_model_that_the_config_names_is_known_by_its_names(
    model_id: str, source: str, said: str | None, fits: bool
):
    model = replace(traced("qwen3"), id=model_id, source=source)
    if fits:
        check_model(model, said)
        return
    with pytest.raises(SourceMismatch, match="say so with model_name="):
        check_model(model, said)


def test_the_embedded_model_is_demo_under_its_folder_too():
    from attribution.model.hub import resolve_alias

    folder = resolve_alias("demo")
    for name in ("demo", folder):
        check_model(replace(traced("qwen3"), id=name, source=folder), "demo")


def test_another_spelling_is_taken_on_the_callers_word_for_exactly_that_spelling(tmp_path: Path):
    folder = save_random(tmp_path / "one", name="tiny-llm")
    assert read(folder, model_name="tiny-llm").d_in == D_MODEL
    for wrong in ("tiny", "tiny-qwen3"):
        with pytest.raises(SourceMismatch, match="the autoencoder's config says 'tiny-llm'"):
            read(folder, model_name=wrong)
    with pytest.raises(SourceMismatch, match="the autoencoder's config says None"):
        read(save_random(tmp_path / "two"), model_name="tiny-llm")


# --- the store


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    made = FeatureStore()
    for number in (0, 1):
        folder = save_random(tmp_path / str(number), f"resid_post[{number}]", seed=number)
        made.load(traced("qwen3"), declared(folder))
    made.load(traced("qwen3"), declared(save_random(tmp_path / "t", "mlp_in[1]", "mlp_out[1]"), name="t"))
    return made


def test_a_source_is_found_by_its_name_or_its_layer_when_there_is_one(store: FeatureStore):
    model = traced("qwen3")
    assert [one.name for one in store.of(model)] == ["0-resid_post", "1-resid_post", "t"]
    assert store.source(model, layer=0).name == "0-resid_post"
    assert store.source(model, "t", 1).name == "t"
    assert [one.name for one in store.choose(model, layer=1)] == ["1-resid_post", "t"]
    with pytest.raises(InvalidArgument, match="'1-resid_post', 't'; name one"):
        store.source(model, layer=1)
    with pytest.raises(SourceNotFound, match=r"named 'x'.*'t' \(layer 1\)"):
        store.source(model, "x")
    with pytest.raises(SourceNotFound, match="it has none") as raised:
        store.source(traced("llama"), layer=1)
    assert raised.value.param == "layer"


def test_loading_the_same_again_is_safe_and_another_of_its_name_is_refused(store: FeatureStore, tmp_path: Path):
    model, other = traced("qwen3"), save_random(tmp_path / "other", "attn_out[0]")
    again = declared(tmp_path / "t", name="t")
    before = store.source(model, "t").describe()
    assert store.load(model, again).describe() == before
    assert len(store.all()) == 3
    with pytest.raises(InvalidArgument, match="has a source 't' already") as raised:
        store.load(model, declared(other, name="t"))
    assert raised.value.param == "name"
    store.load(model, declared(other, name="t"), overwrite=True)
    assert (store.source(model, "t").reads, len(store.all())) == (Place("attn_out", 0), 3)


def test_descriptions_are_not_lost_unseen(store: FeatureStore, tmp_path: Path):
    model, said = traced("qwen3"), tmp_path / "said.jsonl"
    said.write_text('{"index": 3, "description": "three"}')
    described = declared(tmp_path / "t", name="t", descriptions=said)
    store.load(model, described)
    with pytest.raises(InvalidArgument, match="has descriptions, which it would lose") as raised:
        store.load(model, declared(tmp_path / "t", name="t"))
    assert raised.value.param == "descriptions"
    assert store.load(model, described).descriptions.of(3) == "three"
    assert store.load(model, declared(tmp_path / "t", name="t"), overwrite=True).descriptions.of(3) is None


def test_a_folder_that_was_written_anew_is_read_anew_and_never_unseen(store: FeatureStore, tmp_path: Path):
    model = traced("qwen3")
    before = store.source(model, "t").autoencoder()
    store.weights.drop(tmp_path / "t")
    save_random(tmp_path / "t", "mlp_in[1]", "mlp_out[1]", n_features=33)
    with pytest.raises(StorageFailed, match=r"33 features .* where there were 70"):
        store.source(model, "t").autoencoder()
    store.load(model, declared(tmp_path / "t", name="t"))
    assert store.source(model, "t").autoencoder().n_features == 33 != before.n_features


def test_weights_are_read_once_for_each_dtype_and_let_go_with_the_model(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
):
    source, reads = store.source(traced("qwen3"), "t"), []
    real = weights_module.read_autoencoder
    monkeypatch.setattr(weights_module, "read_autoencoder", lambda folder: reads.append(folder) or real(folder))
    found = source.autoencoder()
    assert source.autoencoder(torch.device("cpu"), torch.float32) is found
    assert source.autoencoder("cpu", torch.float64).dtype == torch.float64
    assert len(reads) == 2
    assert store.weights.used == N_FEATURES * 2 * D_MODEL * (4 + 8)
    store.drop("tiny-llama")
    assert store.weights.used > 0
    store.drop("tiny-qwen3")
    assert store.weights.used == 0
    assert [row["status"] for row in store.status()] == ["waiting"] * 3
    assert len(store.of(traced("qwen3"))) == 3


def test_four_threads_read_the_weights_once(store: FeatureStore, monkeypatch: pytest.MonkeyPatch):
    source, reads, together = store.source(traced("qwen3"), "t"), [], threading.Barrier(4)
    real = weights_module.read_autoencoder
    monkeypatch.setattr(weights_module, "read_autoencoder", lambda folder: reads.append(folder) or real(folder))

    def ask(_: int) -> object:
        together.wait(30)
        return source.autoencoder()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(reads) == 1
    assert all(one is found[0] for one in found)


def test_of_the_weights_those_used_last_are_kept_within_the_bound(tmp_path: Path):
    one = N_FEATURES * 2 * D_MODEL * 4
    store, model = FeatureStore(most_bytes=2 * one), traced("qwen3")
    for number in range(3):
        store.load(model, declared(save_random(tmp_path / str(number), f"resid_post[{number}]", seed=number)))
    first, second, third = store.of(model)
    kept = [source.autoencoder() for source in (first, second)]
    assert first.autoencoder() is kept[0]
    third.autoencoder()  # the second was used longest ago
    assert store.weights.used == 2 * one
    assert first.autoencoder() is kept[0]
    assert second.autoencoder() is not kept[1]
    alone = FeatureStore(most_bytes=1)
    source = alone.load(model, declared(tmp_path / "0"))
    assert source.autoencoder() is source.autoencoder()


def test_weights_for_which_there_is_no_memory_are_refused_before_they_are_read(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights_module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(CannotFit, match=f"takes {N_FEATURES * 2 * D_MODEL * 4:,} bytes on cpu and 1,000 are free"):
        store.source(traced("qwen3"), "t").autoencoder()


def test_a_model_with_other_weights_under_the_same_name_is_checked_again(store: FeatureStore, tmp_path: Path):
    other = replace(traced("qwen3"), fingerprint="another", dimensions=replace(traced("qwen3").dimensions, n_layers=1))
    assert [one.name for one in store.of(other)] == ["0-resid_post"]
    failed = [row["reason"] for row in store.status() if row["status"] == "failed"]
    assert len(failed) == 2
    assert all("the layers 0 to 0" in reason for reason in failed)
    assert len(store.of(traced("qwen3"))) == 3


def test_a_source_is_forgotten(store: FeatureStore):
    store.remove("tiny-qwen3", "t")
    assert [one.name for one in store.all()] == ["0-resid_post", "1-resid_post"]
    for model_id, name in (("tiny-qwen3", "t"), ("tiny-llama", "0-resid_post")):
        with pytest.raises(SourceNotFound):
            store.remove(model_id, name)


def test_a_source_may_be_handed_over_as_it_is(tmp_path: Path):
    store, made = FeatureStore(), random_autoencoder()
    place = Place("resid_post", 1)
    sizes = (made.n_features, made.d_in, made.d_out)
    folder = save_random(tmp_path / "one")
    for _ in range(2):
        store.add(Source("mine", "tiny-qwen3", folder, place, place, *sizes, "jumprelu"))
    (found,) = store.of(traced("qwen3"))
    assert torch.equal(found.autoencoder().W_enc, made.W_enc)
    store.drop("tiny-qwen3")
    assert store.source(traced("qwen3")) is found


def test_one_that_failed_is_read_again_with_its_model_however_that_is_spelled(tmp_path: Path):
    (tmp_path / "link").symlink_to(save_tiny("qwen3", tmp_path / "model"))
    registry = tmp_path / "features.toml"
    registry.write_text(f'[[source]]\nmodel = "{tmp_path}/link"\nfolder = "late"\n')
    session = LocalSession(str(tmp_path / "model"), store=tmp_path / "store", features=registry)
    assert [row["status"] for row in session.list_features()["sources"]] == ["failed"]
    save_random(tmp_path / "late")
    session.load_model(str(tmp_path / "model"))
    assert [row["status"] for row in session.list_features()["sources"]] == ["ready"]
