"""Before a load: whether there is such a model, and whether memory holds it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import puzzles
from attribution.errors import CannotFit, ModelNotFound
from attribution.model import known
from attribution.model.hub import canonical, needed_bytes
from attribution.model.known import check_fits, check_known
from attribution.model.load import LoadSpec
from tests.models import save_tiny, tiny_model


def test_a_folder_with_a_model_and_the_embedded_one_are_known(tmp_path: Path):
    check_known([str(save_tiny("llama", tmp_path / "one")), "demo"])


def test_all_that_are_unknown_are_named_with_their_reasons(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelNotFound) as refused:
        check_known(["demo", str(empty), "no/such-model", "a/b/c"])
    told = refused.value.message
    assert f"{str(empty)!r}: the folder {str(empty)!r} has no config.json" in told
    assert "'no/such-model': " in told
    assert "'a/b/c': " in told
    assert "'demo'" not in told


def test_what_is_needed_follows_the_dtype(tmp_path: Path):
    folder = save_tiny("llama", tmp_path / "one")
    count = sum(one.numel() for one in tiny_model("llama").parameters())
    assert needed_bytes(folder) == 4 * count
    assert needed_bytes(folder, "bfloat16") == 2 * count
    assert needed_bytes(folder, "float64") == 8 * count


def test_what_the_files_do_not_say_is_not_known(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert needed_bytes(tmp_path) is None


def test_a_model_that_memory_does_not_hold_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = str(save_tiny("llama", tmp_path / "one"))
    needed = needed_bytes(Path(folder))
    assert needed is not None
    monkeypatch.setattr(known.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(known.psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    check_fits(LoadSpec(folder))
    with pytest.raises(CannotFit, match=f"takes about {2 * needed:,} bytes and {needed:,} are free"):
        check_fits(LoadSpec(folder, dtype="float64"))


def test_a_gpu_has_room_too_unless_the_model_is_put_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = str(save_tiny("llama", tmp_path / "one"))
    monkeypatch.setattr(known.psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    monkeypatch.setattr(known.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(known.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(known.torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    check_fits(LoadSpec(folder))
    with pytest.raises(CannotFit):
        check_fits(LoadSpec(folder, device_map="cpu"))


def test_aliases_have_one_name():
    assert canonical("gpt2-small") == "openai-community/gpt2"
    assert canonical("demo") == "demo" != puzzles.demo_model_path()
