"""`sightline sae train`, with the trainer that needs no library; sae-lens trains in the slow test of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from attribution.session import LocalSession
from tests.models import save_tiny
from tests.server.command_line import cells, refusal, sightline

SMALL = ("--features", 32, "--k", 4, "--tokens", "2k", "--batch", 128, "--context", 16, "--trainer", "own")
SENTENCE = "the rest is in a while, and the sun is in the sea\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 60)
    return path


def test_an_autoencoder_is_trained_measured_and_kept_with_its_card(folder: Path, text: Path, tmp_path: Path):
    out = tmp_path / "made" / "one"
    done = sightline(
        "sae", "train", folder, "--point", "blocks.1.hook_resid_post", "--texts", text, "--out", out, *SMALL
    )
    assert done.exit_code == 0, done.stderr
    read = read_autoencoder(out)
    assert (read.reads, read.architecture, read.autoencoder.n_features) == (Place("resid_post", 1), "jumprelu", 32)
    said = dict(cells(line) for line in done.stdout.splitlines()[1:12])
    assert 2 < float(said["L0"]) < 9
    assert 0.3 < float(said["explained variance"]) < 1
    assert (out / "sae_weights.safetensors").stat().st_mode & 0o044 == 0o044
    card = (out / "README.md").read_text()
    assert f"| explained variance | {said['explained variance']} |" in card
    assert "- rows: 2,000, in steps of 128" in card
    assert "text.txt, in pieces of 16 tokens" in card
    # what was made is a source of the model, under the place and the name that its config has
    session = LocalSession(str(folder), store=tmp_path / "store")
    source = session.load_features(str(out))
    assert (source["reads"], source["layer"], source["n_features"]) == ("resid_post[1]", 1, 32)
    found = session.features_topk(text="the sun", k=3)
    assert len(found["tokens"][-1]["features"]) > 0


def test_a_transcoder_is_trained_with_a_skip_path_and_the_row_of_the_special_token_is_left_out(
    folder: Path, text: Path, tmp_path: Path
):
    out = tmp_path / "two"
    done = sightline(
        "sae", "train", folder, "--transcoder", "--layer", 2, "--skip", "--texts", text, "--out", out, *SMALL
    )
    assert done.exit_code == 0, done.stderr
    read = read_autoencoder(out)
    assert (read.reads, read.writes) == (Place("mlp_in", 2), Place("mlp_out", 2))
    assert read.autoencoder.W_skip is not None
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    model = LocalSession(str(folder), store=tmp_path / "store").model
    assert metadata["prepend_bos"] is (model.tokenizer.bos_token_id is not None)
    pieces = int(dict(cells(line) for line in done.stdout.splitlines()[1:12])["rows measured"].replace(",", ""))
    assert pieces % (16 - metadata["prepend_bos"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say where it reads: --point resid_post[2], or --transcoder --layer 2"),
        (("--point", "resid_post"), "'resid_post' is no place of an autoencoder"),
        (("--point", "resid_post[9]"), "has the layers 0 to 2; found resid_post[9]"),
        (("--transcoder",), "--transcoder goes with --layer"),
        (("--point", "z[0]", "--layer", 1), "--layer is for --transcoder"),
        (("--point", "z[0]", "--skip"), "--skip is for a transcoder"),
        (("--transcoder", "--layer", 1, "--trainer", "sae-lens"), "sae-lens trains no transcoders"),
        (("--transcoder", "--layer", 1, "--architecture", "topk"), "has no top-k transcoder; --architecture jumprelu"),
        (("--point", "z[0]", "--tokens", "much"), "--tokens is a number as 20000, 500k or 1M; found 'much'"),
        (("--point", "z[0]", "--tokens", "0"), "--tokens is a number as 20000, 500k or 1M; found '0'"),
        (("--point", "z[0]", "--features", 8, "--k", 9), "k is at most the number of features, 8; found 9"),
        (("--point", "z[0]"), "--texts is the text file that"),
        (("--point", "z[0]", "--texts", "puzzles"), "'puzzles' are for 'demo'"),
        (("--point", "z[0]", "--texts", "nothing.txt"), "nothing.txt cannot be read: No such file"),
        (("--point", "z[0]", "--texts", "short.txt"), "short.txt is too short: 21 pieces of 128 tokens are needed"),
        (("--point", "z[0]", "--texts", "bytes.txt"), "bytes.txt cannot be read: it is no text in UTF-8"),
        (("--point", "z[0]", "--texts", "short.txt", "--context", 100_000), "context is from 2 to"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(folder: Path, tmp_path: Path, arguments: tuple, said: str):
    (tmp_path / "short.txt").write_text(SENTENCE)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00" * 50)
    own = () if "--trainer" in arguments else ("--trainer", "own")
    assert said in refusal(sightline("sae", "train", folder, "--out", "made", *own, *arguments), 2)
    assert not Path("made").exists()


def test_a_folder_that_is_there_is_not_written_over(folder: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    said = refusal(sightline("sae", "train", folder, "--point", "z[0]", "--out", "there"), 2)
    assert "there is there already" in said
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_without_sae_lens_the_extra_is_named_and_the_trainer_that_needs_none(folder: Path, text: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    said = refusal(sightline("sae", "train", folder, "--point", "z[0]", "--texts", text, "--out", "made"), 1)
    assert "pip install 'sightline[sae]'" in said
    assert "--trainer own" in said


def _trains(architecture: str, folder: Path, text: Path, out: Path) -> dict[str, str]:
    small = ("--features", 32, "--k", 4, "--tokens", "20k", "--batch", 128, "--context", 16)
    asked = ("--point", "resid_post[1]", "--texts", text, "--architecture", architecture, "--out", out)
    done = sightline("sae", "train", folder, *asked, *small)
    assert done.exit_code == 0, done.stderr
    return dict(cells(line) for line in done.stdout.splitlines()[1:12])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_sae_lens_trains_what_it_reads_again_as_we_do(architecture: str, folder: Path, text: Path, tmp_path: Path):
    out = tmp_path / "made"
    said = _trains(architecture, folder, text, out)
    assert float(said["L0"]) == pytest.approx(4, abs=0.01 if architecture == "topk" else 1.5)
    assert 0.5 < float(said["explained variance"]) < 1
    assert "trained with: sae-lens" in (out / "README.md").read_text()
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(str(out), device="cpu"), read_autoencoder(out).autoencoder
    rows = torch.randn(50, ours.d_in) * 5
    torch.testing.assert_close(ours.encode(rows), theirs.encode(rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(rows), theirs(rows), rtol=1e-5, atol=1e-5)
