"""The store: samples by name, tied to a model, whole or absent, in bounded memory."""

import errno
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attribution import store as store_module
from attribution.errors import DatasetNotFound, SampleMismatch, SampleNotFound, StorageFailed
from attribution.sample_file import temporary_name
from attribution.store import ActivationStore
from attribution.stored import shown_ids
from tests.attribution.storing import MODEL, OTHER, TOKEN_BYTES, file_of, tensors, written


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store", 0)


def test_samples_survive_a_restart_and_are_seen_by_another_store_on_the_folder(store: ActivationStore):
    other = ActivationStore(store.root, 10**6)
    for sample_id in (10, 2, "b", "a", 7):
        written(store, sample_id)
    assert other.sample_ids("set", MODEL) == [2, 7, 10, "a", "b"]
    assert other.datasets(MODEL) == {"set": 5}
    assert torch.equal(other.sample("set", "b", MODEL).read("resid", 2), tensors(6, 6)["resid"][2])
    assert other.disk_used() == sum(file_of(store, one).stat().st_size for one in (10, 2, "b", "a", 7))


def test_what_is_not_there_is_refused_with_what_is(store: ActivationStore):
    for sample_id in (*range(5), 7, "x"):
        written(store, sample_id)
    with pytest.raises(SampleNotFound, match=r"no sample 8 in 'set' \(it has 0–4, 7, 'x'\)"):
        store.sample("set", 8, MODEL)
    for wrong in (lambda: store.sample("sett", 0, MODEL), lambda: store.sample_ids("sett", MODEL)):
        with pytest.raises(DatasetNotFound, match="no dataset 'sett'; there is set"):
            wrong()
    with pytest.raises(DatasetNotFound):
        store.clear("sett")


def test_ids_are_shown_in_runs_and_not_all_of_them():
    assert shown_ids([]) == "none"
    assert shown_ids([3]) == "3"
    assert shown_ids([0, 1, 2, 5, "a", "b"]) == "0–2, 5, 'a', 'b'"
    assert shown_ids(list(range(0, 100, 2))) == ", ".join(str(one) for one in range(0, 24, 2)) + ", … (50 in all)"


@pytest.mark.parametrize("asked", [OTHER, replace(MODEL, dtype="bfloat16")])
def test_samples_of_another_model_or_dtype_are_refused_wherever_they_are_asked_for(store: ActivationStore, asked):
    written(store)
    for wrong in (
        lambda: store.sample("set", 0, asked),
        lambda: store.sample_ids("set", asked),
        lambda: store.find("set", 1, asked, [1]),
        lambda: written(store, 1, identity=asked),
    ):
        with pytest.raises(SampleMismatch, match=r"'toy' \(float32.*clear_cache\('set'\)"):
            wrong()
    assert store.datasets(asked) == {}
    assert store.sample_ids("set", MODEL) == [0]


def test_the_weights_decide_and_not_the_name(store: ActivationStore):
    written(store)
    moved = replace(MODEL, id="elsewhere", source="/tmp/elsewhere", revision=None)
    assert store.sample("set", 0, moved).seq_len == 6


def test_a_sample_that_was_copied_in_from_another_model_is_refused(store: ActivationStore):
    written(store)
    written(store, dataset="theirs", identity=OTHER)
    file_of(store, 5).write_bytes(file_of(store, 0, "theirs").read_bytes())
    with pytest.raises(SampleMismatch, match="sample 5 of 'set' is of the model 'other'"):
        store.sample("set", 5, MODEL)


def test_a_sample_is_found_by_its_tokens_and_never_overwritten_with_others(store: ActivationStore):
    assert store.find("set", 0, MODEL, [1, 2]) is None
    store.write("set", 0, MODEL, [1, 2], tensors(2))
    found = store.find("set", 0, MODEL, [1, 2])
    assert found is not None
    assert found.token_ids == [1, 2]
    for wrong in (
        lambda: store.find("set", 0, MODEL, [1, 3]),
        lambda: store.write("set", 0, MODEL, [1, 2, 3], tensors(3)),
    ):
        with pytest.raises(SampleMismatch, match="other tokens"):
            wrong()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_stored_and_says_so(store: ActivationStore, value: float):
    given = tensors(3)
    given["resid"][-1, 1, 2] = value
    assert not store.write("set", 0, MODEL, [1, 2, 3], given).finite
    assert not ActivationStore(store.root, 0).sample("set", 0, MODEL).finite
    assert written(store, 1).finite


def test_memory_holds_the_samples_used_last_and_never_more_than_its_bound(tmp_path: Path):
    store = ActivationStore(tmp_path, 2 * 6 * TOKEN_BYTES)

    def in_memory() -> list[int | str]:
        return [one for one in range(4) if store.sample("set", one, MODEL)._tensors is not None]

    written(store, 0, tokens=6)
    assert store.ram_used == 6 * TOKEN_BYTES
    written(store, 1, tokens=6)
    store.sample("set", 0, MODEL)  # now 1 is the one that was used least recently
    written(store, 2, tokens=6)
    written(store, 3, tokens=13)  # larger than the bound alone
    assert store.ram_used == 2 * 6 * TOKEN_BYTES
    assert in_memory() == [0, 2]
    assert torch.equal(store.sample("set", 3, MODEL).read("z", 1), tensors(13, 13)["z"][1])
    store.clear("set")
    assert store.ram_used == 0


def test_memory_forgets_a_sample_that_another_process_wrote_anew(tmp_path: Path):
    store, other = ActivationStore(tmp_path, 10**6), ActivationStore(tmp_path, 0)
    written(store)
    other.clear("set")
    other.write("set", 0, MODEL, [1, 2], tensors(2, seed=5))
    assert torch.equal(store.sample("set", 0, MODEL).read("z", 1), tensors(2, seed=5)["z"][1])
    assert store.ram_used == 0


def test_a_full_disk_is_told_and_leaves_nothing(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    written(store)
    original, written_bytes = os.write, 0

    def write(file: int, data: memoryview) -> int:
        nonlocal written_bytes
        if written_bytes > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written_bytes += (done := original(file, data[:100]))
        return done

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageFailed, match=r"1\.safetensors could not be written: .*No space left"):
        written(store, 1)
    assert written_bytes > 1000
    assert sorted(os.listdir(store.root / "set")) == ["0.safetensors", "manifest.json"]


def test_a_write_takes_as_many_calls_as_the_system_wants(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    original = os.write
    monkeypatch.setattr(os, "write", lambda file, data: original(file, data[:7]))
    sample = written(store)
    assert all(torch.equal(sample.read(name, range(3)), value[:3]) for name, value in tensors(6, 6).items())


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="cannot be used"):
        ActivationStore(tmp_path / "file" / "store", 0)


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not(store: ActivationStore):
    written(store)
    folder, unique = store.root / "set", uuid.uuid4().hex
    host, pid = temporary_name().split(".")[1:3]
    assert pid == str(os.getpid())
    names = {
        "mine": f".{host}.{pid}.{unique}.tmp",
        "dead": f".{host}.99999999.{unique}.tmp",
        "same number, earlier process": f".{host}.{os.getppid()}.{unique}.tmp",
        "elsewhere, now": f".elsewhere.1.{unique}.tmp",
        "elsewhere, long ago": f".elsewhere.2.{unique}.tmp",
        "strange": f".{unique}.tmp",
    }
    for name in names.values():
        (folder / name).write_text("half")
    for name in ("same number, earlier process", "elsewhere, long ago"):
        os.utime(folder / names[name], (1e9, 1e9))
    (store.root / names["dead"]).mkdir()  # a dataset that was being cleared
    ActivationStore(store.root, 0)
    left = {name for name in os.listdir(folder) if name.endswith(".tmp")}
    assert left == {names["mine"], names["elsewhere, now"], names["strange"]}
    assert os.listdir(store.root) == ["set"]


def test_clearing_frees_a_dataset_or_those_of_one_model(store: ActivationStore):
    for dataset, identity in (("a", MODEL), ("b", MODEL), ("c", OTHER)):
        for sample_id in range(3):
            written(store, sample_id, dataset=dataset, identity=identity)
    size = file_of(store, 0, "a").stat().st_size
    assert store.clear("a") == (3, 3 * size)
    assert not (store.root / "a").exists()
    assert store.clear_all(MODEL) == (3, 3 * size)
    assert os.listdir(store.root) == ["c"]
    assert store.clear("c")[0] == 3  # a dataset of another model can be cleared by its name
    written(store, dataset="c")
    assert store.sample_ids("c", MODEL) == [0]


def test_clearing_leaves_files_that_are_no_samples(store: ActivationStore):
    written(store)
    (store.root / "set" / "notes.txt").write_text("mine")
    (store.root / "folder").mkdir()
    with pytest.raises(StorageFailed, match=r"notes\.txt"):
        store.clear("set")
    with pytest.raises(DatasetNotFound):
        store.clear("folder")
    assert store.sample_ids("set", MODEL) == [0]


def test_a_damaged_manifest_is_refused_and_hides_no_other_dataset(store: ActivationStore):
    written(store, dataset="good")
    for number, text in enumerate(["", "[]", '{"model": 3}', '{"model": {"id": "x"}}']):
        dataset = f"bad{number}"
        written(store, dataset=dataset)
        (store.root / dataset / "manifest.json").write_text(text)
        with pytest.raises(StorageFailed, match=f"clear_cache\\('{dataset}'\\)"):
            store.sample(dataset, 0, MODEL)
        assert store.datasets(MODEL) == {"good": 1}
        store.clear(dataset)


def test_a_dataset_that_is_cleared_while_a_sample_is_written_gets_the_sample(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
):
    written(store)
    original, other = store_module.write_file, ActivationStore(store.root, 0)

    def write_file(*args):
        if other is not None and "set" in os.listdir(store.root) and not cleared:
            cleared.append(other.clear("set"))
        return original(*args)

    cleared: list[tuple[int, int]] = []
    monkeypatch.setattr(store_module, "write_file", write_file)
    written(store, 1)
    assert len(cleared) == 1
    assert store.sample_ids("set", MODEL) == [1]


def test_threads_that_write_and_read_at_once_lose_nothing(tmp_path: Path):
    store = ActivationStore(tmp_path, 5 * 9 * TOKEN_BYTES)
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for step in range(25):
            sample_id = worker * 100 + step
            written(store, sample_id, tokens=3 + step % 7, dataset=f"set{step % 2}")
            length = 3 + step % 7
            found = store.sample(f"set{step % 2}", sample_id, MODEL).read("resid", range(4))
            assert torch.equal(found, tensors(length, length)["resid"])
            assert store.ram_used <= store.ram_bytes

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.datasets(MODEL) == {"set0": 52, "set1": 48}
    assert 0 < store.ram_used <= store.ram_bytes
