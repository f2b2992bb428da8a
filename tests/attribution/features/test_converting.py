"""Conversion: what is kept is what was published, or nothing; sae-lens is asked only where it must be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.errors import InvalidArgument, LibraryMissing, ModelLoadFailed, SourceNotFound, StorageFailed
from attribution.features import converting
from attribution.features.autoencoder import Autoencoder
from attribution.features.converting import convert_folder, convert_release
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from tests.attribution.features.folders import (
    METADATA,
    saelens_config,
    saelens_tensors,
    sparsify_config,
    sparsify_tensors,
    write_folder,
)
from tests.attribution.features.plain_autoencoder import D_IN, by_loops, random_autoencoder
from tests.server.command_line import refusal, sightline

CENTRED = METADATA | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


class Fetched:
    """What `SAE.from_pretrained` gives: it saves itself, and encodes by loops over what it was made of."""

    def __init__(self, one: Autoencoder, **changes: Any) -> None:
        self.one, self.config = one, saelens_config(one, **changes)
        self.cfg = type("Config", (), {"reshape_activations": "none"})

    def save_model(self, path: str) -> None:
        write_folder(Path(path), self.config, saelens_tensors(self.one))

    def to(self, dtype: torch.dtype) -> "Fetched":
        assert dtype == torch.float64
        return self

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([by_loops(self.one, row.tolist())[1] for row in x], dtype=torch.float64)


def library(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """sae-lens, which fetches this or fails with it."""

    def from_pretrained(release: str, sae_id: str, device: str) -> Any:
        assert (release, sae_id, device) == ("gpt2-small-res-jb", "blocks.1.hook_resid_post", "cpu")
        if isinstance(found, Exception):
            raise found
        return found

    fake = type("sae_lens", (), {"SAE": type("SAE", (), {"from_pretrained": staticmethod(from_pretrained)})})
    monkeypatch.setattr(converting, "_library", lambda: fake)


def convert(folder: Path) -> Any:
    return convert_release("gpt2-small-res-jb", "blocks.1.hook_resid_post", folder)


@pytest.mark.parametrize("metadata", [METADATA, CENTRED])
def test_a_release_is_kept_when_both_compute_the_same(
    metadata: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, Fetched(random_autoencoder(), metadata=metadata))
    found = convert(tmp_path / "a" / "one")
    assert (found.reads, found.centred) == (Place("resid_post", 1), metadata is CENTRED)
    assert torch.equal(read_autoencoder(tmp_path / "a" / "one").autoencoder.W_enc, random_autoencoder().W_enc)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one"]


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = Fetched(random_autoencoder())
    fetched.config["apply_b_dec_to_input"] = True  # which the loops do not do
    library(monkeypatch, fetched)
    with pytest.raises(ModelLoadFailed, match="does not compute what sae-lens computes"):
        convert(tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_what_we_do_not_do_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, Fetched(random_autoencoder(), architecture="temporal"))
    with pytest.raises(InvalidArgument, match="the architecture 'temporal' is not done"):
        convert(tmp_path / "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "kind", "code", "message"),
    [
        (ValueError("Release x not found in pretrained SAEs directory"), SourceNotFound, 2, "Release x not found"),
        (ConnectionError("no route to host\nmore"), ModelLoadFailed, 1, "could not be fetched: no route to host"),
        (type("NotHere", (FileNotFoundError, ValueError), {})("no file"), ModelLoadFailed, 1, "be fetched: no file"),
        (OSError("We couldn't connect to the hub"), ModelLoadFailed, 1, "could not be fetched: We couldn't connect"),
        (KeyError("architecture"), ModelLoadFailed, 1, "could not be fetched: 'architecture'"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    error: Exception, kind: type[Exception], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, error)
    with pytest.raises(kind, match=message):
        convert(tmp_path / "one")
    command = ("sae", "convert", "gpt2-small-res-jb", "blocks.1.hook_resid_post", tmp_path / "one")
    assert message in refusal(sightline(*command), code)
    assert not list(tmp_path.iterdir())


def test_without_sae_lens_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(LibraryMissing, match=r"pip install 'sightline\[sae\]'"):
        convert(tmp_path / "one")
    assert "sightline[sae]" in refusal(sightline("sae", "convert", "a", "b", tmp_path / "one"), 1)


def test_a_folder_that_is_there_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, AssertionError("fetched"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "kept").write_text("mine")
    with pytest.raises(InvalidArgument, match="is there already"):
        convert(tmp_path / "one")
    with pytest.raises(InvalidArgument, match="is there already"):
        convert_folder(tmp_path, tmp_path / "one")
    assert (tmp_path / "one" / "kept").read_text() == "mine"


# --- folders


@pytest.mark.parametrize(("name", "transcode"), [("layers.1", False), ("layers.1.mlp", True)])
def test_a_folder_of_sparsify_is_written_in_the_format_of_saelens(name: str, transcode: bool, tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk", skip=transcode, subtracts_b_dec=not transcode)
    config = sparsify_config(one, transcode=transcode)
    source = write_folder(tmp_path / name, config, sparsify_tensors(one), "sae")
    done = sightline("sae", "convert", source, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    found = read_autoencoder(tmp_path / "out")
    assert (found.origin, found.architecture) == ("SAELens", "topk_skip_transcoder" if transcode else "topk")
    x = torch.randn(5, D_IN, dtype=torch.float64)
    for row in x:
        assert found.autoencoder.reconstruct(row).tolist() == pytest.approx(by_loops(one, row.tolist())[2], abs=1e-12)
    assert ("reads: mlp_in[1], writes: mlp_out[1]" if transcode else "reads: resid_post[1]") in done.stdout
    assert "13 features, width 6" in done.stdout


def test_a_place_that_the_config_does_not_say_is_asked_for(tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk", subtracts_b_dec=True)
    source = write_folder(tmp_path / "mine", sparsify_config(one), sparsify_tensors(one), "sae")
    command = ("sae", "convert", source, tmp_path / "out")
    assert "does not say where it reads ('mine'); name the place, as in --reads" in refusal(sightline(*command), 2)
    assert "is no place of an autoencoder" in refusal(sightline(*command, "--reads", "here"), 2)
    assert sightline(*command, "--reads", "resid_pre[2]").exit_code == 0
    assert read_autoencoder(tmp_path / "out").reads == Place("resid_pre", 2)


def test_what_is_no_folder_and_no_release_is_refused(tmp_path: Path) -> None:
    assert "is named by RELEASE ID DIR" in refusal(sightline("sae", "convert", tmp_path / "none", "out"), 2)
    said = refusal(sightline("sae", "convert", tmp_path, tmp_path / "out"), 2)
    assert "is no autoencoder: there is no" in said
    assert "sae-lens" not in said
    wrong = ("sae", "convert", "release", "id", tmp_path / "out", "--reads", "resid_pre[2]")
    assert "of a release they are known" in refusal(sightline(*wrong), 2)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    one = random_autoencoder()
    source = write_folder(tmp_path / "one", saelens_config(one), saelens_tensors(one))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="cannot be written"):
        convert_folder(source, tmp_path / "file" / "out")


def test_the_group_alone_shows_its_commands() -> None:
    done = sightline("sae")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "convert" in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_itself_is_asked_for_what_we_do_not_read(tmp_path: Path) -> None:
    from sae_lens import TrainingSAE

    config = {"architecture": "batchtopk", "d_in": D_IN, "d_sae": 13, "dtype": "float32", "k": 4}
    sae = TrainingSAE.from_dict(config | {"metadata": METADATA})
    sae.W_enc.data = torch.randn(D_IN, 13)
    sae.topk_threshold.fill_(0.7)
    sae.save_model(tmp_path / "raw")
    found = convert_folder(tmp_path / "raw", tmp_path / "out")
    assert found.architecture == "jumprelu"
    assert found.autoencoder.threshold is not None
    raw = json.loads((tmp_path / "raw" / "cfg.json").read_text()) | {"architecture": "temporal"}
    (tmp_path / "raw" / "cfg.json").write_text(json.dumps(raw))
    with pytest.raises(InvalidArgument, match="'temporal' is not done"):
        convert_folder(tmp_path / "raw", tmp_path / "other")
    with pytest.raises(SourceNotFound, match="no-such-release"):
        convert_release("no-such-release", "x", tmp_path / "third")
    with pytest.raises(SourceNotFound, match="Valid IDs"):
        convert_release("gpt2-small-res-jb", "x", tmp_path / "third")
