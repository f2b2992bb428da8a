"""Steering vectors on disk: whole or absent, and never another model's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from attribution import steering
from attribution.errors import InvalidArgument, OutOfRange, StorageFailed, VectorMismatch, VectorNotFound
from attribution.session import LocalSession
from attribution.steering import SteeringVector, VectorStore
from tests.attribution.storing import MODEL, OTHER

PROVENANCE = {"model": MODEL.record(), "why": "a test"}


def single(name: str = "one", **changes: object) -> SteeringVector:
    vector = SteeringVector(name, torch.tensor([3.0, 4.0]), "resid_post[2]", (2,), False, PROVENANCE, ({"auc": 0.5},))
    return replace(vector, **changes)  # type: ignore[arg-type]


def several(name: str = "many") -> SteeringVector:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.bfloat16)
    return SteeringVector(name, rows, "mlp_out[1:4:2]", (1, 3), True, PROVENANCE)


@pytest.fixture
def store(tmp_path: Path) -> VectorStore:
    return VectorStore(tmp_path / "deep" / "vectors")


@pytest.mark.parametrize("vector", [single(), several()], ids=["single", "several"])
def test_a_vector_comes_back_as_it_was(store: VectorStore, vector: SteeringVector):
    store.write(vector)
    found = VectorStore(store.root).read(vector.name, MODEL)
    assert torch.equal(found.vector, vector.vector)
    assert found.vector.dtype == vector.vector.dtype
    for name in ("name", "selector", "layers", "stacked", "provenance", "statistics"):
        assert getattr(found, name) == getattr(vector, name)
    assert found.identity == MODEL


def test_what_a_vector_says_of_itself():
    assert single().describe() == {
        "name": "one",
        "selector": "resid_post[2]",
        "layers": [2],
        "shape": [2],
        "dtype": "float32",
        "norms": [5.0],  # 3, 4, 5
        "statistics": [{"auc": 0.5}],
        "provenance": PROVENANCE,
    }
    assert several().describe()["norms"] == [1.0, 2.0]
    assert several().describe()["dtype"] == "bfloat16"


def test_the_file_is_one_that_the_safetensors_library_reads(store: VectorStore):
    store.write(several())
    path = store.root / "many.safetensors"
    assert torch.equal(safetensors.torch.load_file(path)["vector"], several().vector)
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["sightline"])
    assert (metadata["selector"], metadata["layers"]) == ("mlp_out[1:4:2]", [1, 3])
    assert metadata["provenance"] == PROVENANCE


def test_one_layers_vector_is_for_every_layer_and_several_are_each_for_their_own():
    assert torch.equal(single().at(7), single().vector)
    assert torch.equal(several().at(3), several().vector[1])
    with pytest.raises(OutOfRange, match=r"layer is 2; the steering vector 'many' has \[1, 3\]"):
        several().at(2)


def test_vectors_are_listed_by_name_and_deleted(store: VectorStore):
    assert store.list() == []
    for name in ("b", "a"):
        store.write(single(name))
    assert store.names() == ["a", "b"]
    assert [one["name"] for one in store.list()] == ["a", "b"]
    size = (store.root / "a.safetensors").stat().st_size
    assert store.delete("a") == size
    assert store.names() == ["b"]


def test_what_is_not_there_is_named_with_what_is(store: VectorStore):
    with pytest.raises(VectorNotFound, match="no steering vector 'x'; there is none"):
        store.read("x")
    store.write(single())
    for act in (store.read, store.delete):
        with pytest.raises(VectorNotFound, match="no steering vector 'x'; there is one") as refusal:
            act("x")
        assert refusal.value.param == "name"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 129, "x\n"])
def test_a_name_that_is_none_never_becomes_a_path(store: VectorStore, name: str):
    for act in (store.read, store.delete, store.check_free, lambda given: store.write(single(given))):
        with pytest.raises(InvalidArgument, match=r"^name: a name has 1 to 128 letters") as refusal:
            act(name)
        assert refusal.value.param == "name"
    assert not store.root.exists()


def test_a_name_is_given_once_unless_it_is_asked_for(store: VectorStore):
    store.check_free("one")
    store.write(single())
    other = single(vector=torch.tensor([1.0, 1.0]))
    with pytest.raises(InvalidArgument, match="there is a steering vector 'one' already"):
        store.write(other)
    with pytest.raises(InvalidArgument, match="overwrite=True"):
        store.check_free("one")
    assert store.read("one").vector.tolist() == [3.0, 4.0]
    assert store.write(other, overwrite=True).vector.tolist() == [1.0, 1.0]
    assert store.read("one").vector.tolist() == [1.0, 1.0]


def test_another_models_vector_is_refused_and_the_message_says_whose_it_is(store: VectorStore):
    store.write(single())
    with pytest.raises(VectorMismatch, match=r"with the model 'toy' .*, and this is 'other'"):
        store.read("one", OTHER)
    assert store.read("one").identity == MODEL


def test_the_same_weights_under_another_name_are_the_same_model(store: VectorStore):
    store.write(single())
    assert store.read("one", replace(MODEL, id="alias", source="/elsewhere", revision=None)).name == "one"


def test_a_vector_of_another_width_is_refused():
    single().check_width((2,), "resid_post[1]")
    several().check_width([3], "mlp_out[1]")
    with pytest.raises(VectorMismatch, match=r"'one' was computed at resid_post\[2\] .* \[2\]; z\[1\] has \[2, 5\]"):
        single().check_width((2, 5), "z[1]")
    with pytest.raises(VectorMismatch):
        several().check_width((2, 3), "z[1]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vector": torch.tensor([1.0, float("nan")])}, "1 numbers that are not finite"),
        ({"vector": torch.tensor([1, 2])}, "floating numbers; found torch.int64"),
        ({"vector": torch.zeros(0)}, r"shape \[0\]"),
        ({"vector": torch.tensor(1.0)}, r"shape \[\]"),
        ({"stacked": True}, "a row for each layer"),
        ({"stacked": True, "vector": torch.ones(3, 4)}, "a row for each layer"),
        ({"provenance": {}}, "under 'model'"),
        ({"provenance": {"model": {"id": "x"}}}, "under 'model'"),
        ({"provenance": PROVENANCE | {"x": float("inf")}}, "is JSON"),
        ({"provenance": PROVENANCE | {"x": object()}}, "is JSON"),
    ],
)
def test_what_is_no_vector_is_not_written(store: VectorStore, changes: dict[str, object], words: str):
    with pytest.raises(InvalidArgument, match=words):
        store.write(single(**changes))
    assert store.names() == []


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(store: VectorStore, monkeypatch: pytest.MonkeyPatch):
    store.write(single())

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StorageFailed, match="No space left on device"):
        store.write(single(vector=torch.ones(2)), overwrite=True)
    assert [file.name for file in store.root.iterdir()] == ["one.safetensors"]
    assert store.read("one").vector.tolist() == [3.0, 4.0]


def test_what_a_killed_process_left_behind_is_not_listed_and_goes(store: VectorStore):
    store.write(single())
    left = store.root / f".{steering.temporary_name().split('.')[1]}.999999999.abc.tmp"
    left.write_bytes(b"half")
    assert store.names() == ["one"]
    store.write(single("two"))
    assert not left.exists()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        safetensors.torch.save_file({"vector": torch.ones(2)}, path)
    elif how == "kind":
        path.write_bytes(data.replace(b"steering vector", b"steering-vector"))
    elif how == "layers":
        path.write_bytes(data.replace(rb"\"layers\":[2]", rb"\"layers\":2.5"))
    elif how == "nan":
        path.write_bytes(data[:-4] + b"\xff\xff\xff\xff")


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "kind", "layers", "nan"])
def test_a_file_that_holds_something_else_is_named_and_never_believed(store: VectorStore, how: str):
    store.write(single())
    before = (store.root / "one.safetensors").read_bytes()
    damage(store.root / "one.safetensors", how)
    assert (store.root / "one.safetensors").read_bytes() != before
    with pytest.raises(StorageFailed, match=r"one\.safetensors is no steering vector"):
        store.read("one")
    with pytest.raises(StorageFailed, match=r"one\.safetensors"):
        store.list()
    assert store.delete("one") > -1  # what cannot be read can be deleted


def test_a_folder_that_cannot_be_one_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="could not be written"):
        VectorStore(tmp_path / "file").write(single())
    with pytest.raises(StorageFailed, match="cannot be read"):
        VectorStore(tmp_path / "file").names()


def test_a_session_keeps_its_vectors_beside_its_samples_or_where_it_is_told(tmp_path: Path):
    assert LocalSession(store=tmp_path / "store").vectors.root == tmp_path / "store_vectors"
    assert LocalSession(store=tmp_path / "store", vectors_dir=tmp_path / "v").vectors.root == tmp_path / "v"
    shared = VectorStore(tmp_path / "shared")
    assert LocalSession(store=tmp_path / "store", vectors_dir=shared).vectors is shared
    assert not (tmp_path / "store_vectors").exists()  # made with the first vector
