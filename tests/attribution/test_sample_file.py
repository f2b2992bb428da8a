"""The file of a sample: read in slices, and refused when it is not what it says."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from attribution.errors import OutOfRange, SampleNotFound, StorageFailed
from attribution.store import ActivationStore
from tests.attribution.storing import D_HEAD, D_MODEL, HEADS, MODEL, file_of, tensors, written


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """Nothing stays in memory."""
    return ActivationStore(tmp_path / "store", 0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every read from here on."""
    seen, original = [], os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        got = original(file, buffers, offset)
        seen.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


@pytest.mark.parametrize("ram_bytes", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_slice_comes_back_bit_for_bit_from_disk_and_from_memory(tmp_path: Path, dtype: Any, ram_bytes: int):
    given = tensors(9, dtype=dtype)
    identity = replace(MODEL, dtype=str(dtype).removeprefix("torch."))
    store = ActivationStore(tmp_path, ram_bytes)
    sample = store.write("set", 0, identity, list(range(9)), given)
    assert store.ram_used == (sum(t.numel() * dtype.itemsize for t in given.values()) if ram_bytes else 0)
    for name, tensor in given.items():
        last = len(tensor) - 1
        assert torch.equal(sample.read(name, last), tensor[last])
        assert torch.equal(sample.read(name, 1, [8, 2, 3, 2]), tensor[1][[8, 2, 3, 2]])
        assert torch.equal(sample.read(name, range(1, 3)), tensor[1:3])
        assert torch.equal(sample.read(name, range(2, -1, -2), [4]), tensor[[2, 0]][:, [4]])
        assert sample.read(name, range(0), [1, 2]).shape == (0, 2, *tensor.shape[2:])


def test_what_is_read_is_the_readers_own(tmp_path: Path):
    sample = written(ActivationStore(tmp_path, 10**6))
    before = sample.read("z", 1)
    sample.read("z", 1).zero_()
    sample.read("z", range(3)).zero_()
    assert torch.equal(sample.read("z", 1), before)


def test_views_of_a_batch_are_written_as_they_are(store: ActivationStore):
    given = {name: torch.stack([value, value + 1], dim=1) for name, value in tensors(7).items()}
    # row 1 of a left-padded batch, the first two columns being padding
    sample = store.write("set", 0, MODEL, list(range(5)), {name: value[:, 1, 2:] for name, value in given.items()})
    assert all(torch.equal(sample.read(name, range(3)), tensors(7)[name][:3, 2:] + 1) for name in given)


def test_only_the_bytes_asked_for_are_read(store: ActivationStore, reads: list[tuple[int, int]]):
    sample, size = written(store, tokens=10), os.path.getsize(file_of(store))
    row = 4 * HEADS * D_HEAD

    def taken(name: str, layers: Any, positions: Any) -> list[int]:
        reads.clear()
        sample.read(name, layers, positions)
        return [got for _, got in reads]

    assert taken("z", 2, [7]) == [row]
    assert taken("z", 2, [7, 1, 2, 3]) == [row, 3 * row]
    assert taken("z", range(1, 3), [9]) == [row, row]
    assert taken("z", range(1, 3), None) == [20 * row]
    # position 9 of a layer and 0 of the next lie side by side
    assert taken("mlp_out", range(1, 3), [0, 9]) == [4 * D_MODEL, 2 * 4 * D_MODEL, 4 * D_MODEL]
    assert taken("mlp_out", range(1, 3), [1, 8]) == [4 * D_MODEL] * 4
    assert taken("mlp_out", 2, None) == [10 * 4 * D_MODEL]
    assert reads[0][0] + reads[0][1] == size  # mlp_out comes last


def test_a_header_is_read_once_for_as_long_as_the_file_is_the_same(
    store: ActivationStore, reads: list[tuple[int, int]]
):
    written(store)
    reads.clear()
    assert store.sample("set", 0, MODEL).token_ids == [0, 1, 2, 3, 4, 5]
    assert reads == []
    ActivationStore(store.root, 0).sample("set", 0, MODEL)
    assert [offset for offset, _ in reads] == [0, 8]


def test_the_safetensors_library_reads_the_file(store: ActivationStore):
    written(store, tokens=6)
    with safe_open(file_of(store), "pt") as file:
        about = json.loads(file.metadata()["sightline"])
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors(6, 6).items())
    assert about["token_ids"] == [0, 1, 2, 3, 4, 5]
    assert about["model"] == MODEL.record()
    assert about["finite"] is True
    assert torch.__version__ == about["versions"]["torch"]


def test_a_layer_or_position_that_is_not_there_is_refused(store: ActivationStore):
    sample = written(store, tokens=6)
    for layers, positions in ((3, None), (-1, None), (range(2, 4), None), (0, [6]), (0, [-1])):
        with pytest.raises(OutOfRange):
            sample.read("z", layers, positions)
    assert sample.read("resid", 3).shape == (6, D_MODEL)


def test_a_file_that_is_replaced_or_deleted_is_never_read_by_an_old_header(store: ActivationStore):
    sample = written(store, tokens=6)
    store.clear("set")
    with pytest.raises(SampleNotFound, match="deleted meanwhile"):
        sample.read("z", 0)
    others = [5, 4, 3, 2, 1, 0]  # as many, so that every byte lies where it lay
    ActivationStore(store.root, 0).write("set", 0, MODEL, others, tensors(6, seed=1))
    with pytest.raises(StorageFailed, match="was replaced while"):
        sample.read("z", 0)
    assert store.sample("set", 0, MODEL).token_ids == others


def rewritten(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A file whose header (its tensors, its metadata) was changed, and whose tensors were not."""

    def damage(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        about = json.loads(header["__metadata__"]["sightline"])
        change(header, about)
        header["__metadata__"]["sightline"] = json.dumps(about)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return damage


def setting(key: str, part: str, value: Any) -> Callable[[bytes], bytes]:
    return rewritten(lambda header, about: header[key].update({part: value}))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "five bytes": lambda data: data[:5],
    "half a header": lambda data: data[:100],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a header of 10 GB": lambda data: (10**10).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"x" + data[9:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "a pickle": lambda data: pickle.dumps({"resid": [1.0] * 100}),
    "another safetensors file": lambda data: safetensors.torch.save({"weight": torch.zeros(3)}),
    "another shape": setting("z", "shape", [3, 3, 4, 5]),
    "a longer shape": setting("resid", "shape", [5, 6, 8]),
    "a negative shape": setting("resid", "shape", [-4, -6, 8]),
    "another dtype": setting("z", "dtype", "I32"),
    "an unknown dtype": setting("z", "dtype", "F8"),
    "overlapping tensors": setting("z", "data_offsets", [0, 720]),
    "a tensor beyond the end": setting("mlp_out", "data_offsets", [10**12, 10**12 + 576]),
    "other tokens": rewritten(lambda header, about: about["token_ids"].reverse()),
    "tokens that are no numbers": rewritten(lambda header, about: about.update(token_ids=["a"] * 6)),
    "fewer tokens": rewritten(lambda header, about: about["token_ids"].pop()),
    "no model": rewritten(lambda header, about: about.pop("model")),
    "a strange model": rewritten(lambda header, about: about["model"].update(colour="red")),
    "another format": rewritten(lambda header, about: about.update(format=2)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_file_is_refused_by_name_when_it_is_touched_and_hides_no_other(
    store: ActivationStore, damage: Callable[[bytes], bytes], reads: list[tuple[int, int]]
):
    written(store, 0)
    written(store, 1)
    path = file_of(store)
    path.write_bytes(damage(path.read_bytes()))
    reads.clear()
    with pytest.raises(StorageFailed, match=str(path)):
        store.sample("set", 0, MODEL)
    assert sum(got for _, got in reads) <= path.stat().st_size
    with pytest.raises(StorageFailed, match=str(path)):
        written(store, 0)  # nor is it overwritten
    assert store.sample_ids("set", MODEL) == [0, 1]
    assert store.sample("set", 1, MODEL).read("z", 0).shape == (6, HEADS, D_HEAD)


def test_a_file_that_shrinks_while_it_is_read_is_refused(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    sample = written(store)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: 0)
    with pytest.raises(StorageFailed, match="ends at byte"):
        sample.read("z", 0)
