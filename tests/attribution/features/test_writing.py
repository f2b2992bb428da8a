"""What is written is read again as it was, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.errors import InvalidArgument, StorageFailed
from attribution.features import writing
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import PLACES, Place
from attribution.features.reading import read_autoencoder
from attribution.features.writing import write_autoencoder
from tests.attribution.features.plain_autoencoder import D_IN, D_OUT, every_autoencoder, random_autoencoder

EVERY = dict(every_autoencoder())
ROWS = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
RESID, OUT = Place("resid_mid", 1), Place("mlp_out", 1)


@pytest.mark.parametrize("name", EVERY)
def test_every_autoencoder_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    one, transcoder = EVERY[name], "transcoder" in name
    folder = write_autoencoder(tmp_path / "one", one, reads=RESID, writes=OUT if transcoder else None)
    found = read_autoencoder(folder)
    assert (found.reads, found.writes) == (RESID, OUT if transcoder else RESID)
    assert torch.equal(found.autoencoder.encode(ROWS), one.encode(ROWS))
    torch.testing.assert_close(found.autoencoder.reconstruct(ROWS), one.reconstruct(ROWS), atol=1e-14, rtol=1e-14)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("point", PLACES)
def test_every_place_comes_back(point: str, tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "one", random_autoencoder(), reads=Place(point, 11))
    assert read_autoencoder(tmp_path / "one").reads == Place(point, 11)


@pytest.mark.parametrize("point", ["mlp_out", "attn_out"])
def test_a_place_that_was_named_by_its_module_stays_so(point: str, tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "one", random_autoencoder(), reads=Place(point, 1, of_module=True))
    found = read_autoencoder(tmp_path / "one").reads
    assert found == Place(point, 1)
    assert found.of_module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    one = random_autoencoder(dtype=dtype)
    found = read_autoencoder(write_autoencoder(tmp_path / "one", one, reads=RESID)).autoencoder
    assert found.dtype == dtype
    assert torch.equal(found.W_dec, one.W_dec)


def test_what_is_said_about_it_is_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_name": "demo", "prepend_bos": False, "metadata": {"l0": 7.5}}
    folder = write_autoencoder(tmp_path / "one", random_autoencoder(), reads=RESID, **options)
    found = read_autoencoder(folder)
    assert (found.model_name, found.prepend_bos) == ("demo", False)
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["l0"] == 7.5


def test_a_folder_that_is_there_is_left_alone_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    first, second = random_autoencoder(1), random_autoencoder(2)
    folder = write_autoencoder(tmp_path / "one", first, reads=RESID)
    with pytest.raises(InvalidArgument, match="is there already"):
        write_autoencoder(folder, second, reads=RESID)
    assert torch.equal(read_autoencoder(folder).autoencoder.W_enc, first.W_enc)
    write_autoencoder(folder, second, reads=RESID, replace=True)
    assert torch.equal(read_autoencoder(folder).autoencoder.W_enc, second.W_enc)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_autoencoder(tmp_path / "one", random_autoencoder(), reads=RESID)
    assert read_autoencoder(tmp_path / "one").reads == RESID


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_autoencoder(1)
    folder = write_autoencoder(tmp_path / "one", first, reads=RESID)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(StorageFailed, match=r"cannot be written: .*No space left"):
        write_autoencoder(folder, random_autoencoder(2), reads=RESID, replace=True)
    assert torch.equal(read_autoencoder(folder).autoencoder.W_enc, first.W_enc)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("one", "writes", "message"),
    [
        (
            random_autoencoder(activation="gated", d_out=D_OUT, restores=False),
            OUT,
            "not have a transcoder with 'gated'",
        ),
        (random_autoencoder(skip=True), None, "not have an autoencoder with 'relu' and a skip connection"),
        (random_autoencoder(rescaled=True), None, "'relu' and rescaled activations"),
        (random_autoencoder(normalisation="layer_norm", restores=False), None, "is undone after an autoencoder"),
        (random_autoencoder(normalisation="layer_norm"), OUT, "not after a transcoder"),
        (random_autoencoder(subtracts_b_dec=True), OUT, "takes no b_dec off"),
    ],
)
def test_what_the_format_does_not_have_is_refused(
    one: Autoencoder, writes: Place | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        write_autoencoder(tmp_path / "one", one, reads=RESID, writes=writes)
    assert not list(tmp_path.iterdir())


def test_nothing_is_centred_where_a_norm_takes_the_mean_away(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"at mlp_in\[1\] nothing is centred"):
        write_autoencoder(tmp_path / "one", random_autoencoder(centred=True), reads=Place("mlp_in", 1))
