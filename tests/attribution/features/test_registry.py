"""The registry file: entries that wait for their model, and wrong ones that do not keep the others from being used."""

import logging
from pathlib import Path

import pytest

from attribution.errors import InvalidArgument, SourceNotFound
from attribution.features.registry import read_registry
from attribution.features.sources import FeatureStore
from attribution.session import LocalSession
from tests.autoencoders import save_random
from tests.models import traced

WHOLE = """
[[source]]
model = "tiny-qwen3"
folder = "deep/one"
name = "one"
point = "resid_post[1]"
descriptions = "said.jsonl"
source_id = "1-res"
model_name = "tiny"

[[source]]
model = "tiny-llama"
folder = "deep/two"
writes = "mlp_out[2]"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save_random(tmp_path / "deep" / "one", name="tiny")
    save_random(tmp_path / "deep" / "two", "mlp_in[2]", "mlp_out[2]")
    (tmp_path / "said.jsonl").write_text('{"index": 3, "layer": "1-res", "description": "three"}')
    (tmp_path / "features.toml").write_text(WHOLE)
    return tmp_path


def test_an_entry_waits_until_its_model_asks_for_it(home: Path):
    store = FeatureStore(home / "features.toml")
    assert [(row["model_id"], row["status"], row["reason"]) for row in store.status()] == [
        ("tiny-qwen3", "waiting", None),
        ("tiny-llama", "waiting", None),
    ]
    (found,) = store.of(traced("qwen3"))
    assert (found.name, found.folder, found.descriptions.of(3)) == ("one", home / "deep" / "one", "three")
    assert sorted(row["status"] for row in store.status()) == ["ready", "waiting"]
    assert store.source(traced("llama")).is_transcoder


def test_a_session_takes_a_file_a_folder_or_a_store_and_operations_find_what_it_declares(home: Path, tmp_path: Path):
    store = FeatureStore(str(home))
    for features in (home / "features.toml", str(home), store):
        session = LocalSession(traced("qwen3"), store=tmp_path / "store", features=features)
        reply = session.features_topk("the rest", k=70)
        said = {one["index"]: one["description"] for token in reply["tokens"] for one in token["features"]}
        assert (reply["source"], said.get(3, "three")) == ("one", "three")
    assert session.features is store
    assert session.list_features()["count"] == 2


def test_unloading_the_model_of_a_session_lets_its_weights_go(home: Path, tmp_path: Path):
    session = LocalSession(traced("qwen3"), store=tmp_path / "store", features=home)
    session.features_topk("the rest")
    assert session.features.weights.used > 0
    session.unload_model()
    assert session.features.weights.used == 0
    assert [row["status"] for row in session.features.status()] == ["waiting", "waiting"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('model = "tiny-qwen3"\nfolder = "absent"', "source 2 ('absent'): "),
        ('model = "tiny-qwen3"\nfolder = "deep/two"\npoint = "z[0]"', "point is z[0]"),
        ('model = "tiny-qwen3"\nfolder = "deep/one"\nname = "mine"', "trained on 'tiny'"),
        ('model = "tiny-qwen3"\nfolder = "deep/two"\nname = "one"', "has a source 'one' already"),
        ('model = "tiny-qwen3"\nfolder = "deep/two"\ndescriptions = "none"', "there are no descriptions"),
        ('model = "tiny-qwen3"\nfolder = "deep/two"\ncolour = "blue"', "no argument 'colour'"),
        ('model = "tiny-qwen3"', "needs the argument 'folder'"),
        ('folder = "deep/two"', "source 2 ('deep/two'): a source needs the argument 'model'"),
        ('model = 3\nfolder = "deep/two"', "source 2 ('deep/two'): model"),
        ('model = "tiny-qwen3"\nfolder = "deep/two"\nname = "a b"', "name: a name has"),
    ],
)
def test_a_wrong_entry_is_reported_and_logged_and_the_others_are_used(
    home: Path, entry: str, said: str, caplog: pytest.LogCaptureFixture
):
    first, second = WHOLE.strip().split("\n\n")
    (home / "features.toml").write_text(f"{first}\n[[source]]\n{entry}\n{second}")
    with caplog.at_level(logging.ERROR, "sightline.features"):
        store = FeatureStore(home)
        assert [one.name for one in store.of(traced("qwen3"))] == ["one"]
    (failed,) = [row for row in store.status() if row["status"] == "failed"]
    assert failed["reason"].startswith(f"{home / 'features.toml'}, source 2")
    assert said in failed["reason"]
    assert [record.reason for record in caplog.records] == [failed["reason"]]  # type: ignore[attr-defined]
    store.of(traced("qwen3"))
    assert len(caplog.records) == 1
    assert len(store.of(traced("llama"))) == 1


def test_who_asks_for_a_source_that_failed_is_told_why(home: Path):
    (home / "features.toml").write_text('[[source]]\nmodel = "tiny-qwen3"\nfolder = "absent"\nname = "gone"')
    with pytest.raises(SourceNotFound, match=r"not used: .*features.toml, source 1 \('gone'\): .*absent"):
        FeatureStore(home).source(traced("qwen3"), "gone")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[source", "cannot be read"),
        ("\udcff", "cannot be read"),
        ("source = 3", "a source that is no"),
        ("[source]\nmodel = 'x'", "a source that is no"),
        ("colour = 3", "nothing else; found colour"),
    ],
)
def test_a_file_that_is_no_registry_is_refused(tmp_path: Path, content: str, said: str):
    path = tmp_path / "features.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArgument, match=said) as raised:
        FeatureStore(path)
    assert (raised.value.param, str(path) in raised.value.message) == ("features", True)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        FeatureStore(tmp_path / "absent.toml")


def test_a_registry_may_be_empty(tmp_path: Path):
    (tmp_path / "features.toml").write_text("# none yet\n")
    assert read_registry(tmp_path) == ([], [])


def test_an_entry_names_its_model_by_its_folder_too(home: Path, tmp_path: Path):
    from dataclasses import replace

    (tmp_path / "model").mkdir()
    model = replace(traced("qwen3"), id="mine", source=str(tmp_path / "model"))
    (home / "features.toml").write_text(
        f'[[source]]\nmodel = "{tmp_path}/deep/../model"\nfolder = "deep/one"\nmodel_name = "tiny"'
    )
    assert [one.model_id for one in FeatureStore(home).of(model)] == ["mine"]
    assert FeatureStore(home).of(traced("qwen3")) == []


def test_descriptions_of_another_layer_are_taken_only_on_the_callers_word(home: Path):
    (home / "said.jsonl").write_text('{"index": 3, "modelId": "m", "layer": "2-res", "description": "three"}')
    entry = '[[source]]\nmodel = "tiny-qwen3"\nfolder = "deep/one"\nmodel_name = "tiny"\ndescriptions = "said.jsonl"\n'
    (home / "features.toml").write_text(entry)
    store = FeatureStore(home)
    assert store.of(traced("qwen3")) == []
    assert "describes the features of 'm/2-res', and the autoencoder reads at resid_post[1]" in str(store.status())
    (home / "features.toml").write_text(entry + 'source_id = "2-res"\n')
    (found,) = FeatureStore(home).of(traced("qwen3"))
    assert found.describe()["descriptions"] == {"source": "m/2-res", "n_described": 1, "n_problems": 0, "problems": []}
