import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from attribution.errors import InvalidRequest, NotFound
from attribution.model.families import FAMILIES
from attribution.model.hub import LocalModel, list_local_models, resolve_alias

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_weights(folder: Path, **tensors: tuple[str, list[int]]) -> None:
    """A safetensors file of zeros, written by hand: 8 bytes of length, a JSON header, the data."""
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = {"F32": 4, "BF16": 2, "I32": 4}[kind]
        for length in shape:
            size *= length
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "dtype": "bfloat16"} | config))
    write_weights(folder, embed=("F32", [7, 5]), norm=("F32", [5]))
    return folder


def write_cached(cache: Path, name: str, **config: object) -> None:
    repo = cache / f"models--{name.replace('/', '--')}"
    write_model(repo / "snapshots" / COMMIT, **config)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own Hugging Face cache, not yet there."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder))
    return folder


def found(models: list[LocalModel], name: str) -> LocalModel:
    return {model.id: model for model in models}[name]


def test_an_alias_stands_for_its_hub_id_and_any_other_name_for_itself():
    assert resolve_alias("gpt2-small") == "openai-community/gpt2"
    assert resolve_alias("gemma-2-2b") == "google/gemma-2-2b"
    assert resolve_alias("gemma-2-2b-it") == "google/gemma-2-2b-it"
    assert resolve_alias("llama-3.1-8b") == "meta-llama/Llama-3.1-8B"
    assert resolve_alias("someone/model") == "someone/model"
    assert Path(resolve_alias("demo")).is_absolute()


def test_the_embedded_model_is_listed_first_and_a_missing_cache_adds_nothing(cache: Path):
    (only,) = list_local_models()
    assert (only.id, only.source) == ("demo", "embedded")


def test_the_embedded_model_can_be_loaded_as_it_is(cache: Path):
    demo = list_local_models()[0]
    assert (demo.model_type, demo.supported, demo.reason) == ("qwen3", True, None)
    assert demo.parameters is not None
    assert demo.memory_bytes == 4 * demo.parameters
    assert demo.memory_bytes < demo.disk_bytes <= 9_000_000


def test_parameters_come_from_the_headers_and_memory_from_the_dtype_of_the_config(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "tiny")
    model = found(list_local_models(tmp_path / "models"), str(folder))
    assert model.parameters == 7 * 5 + 5
    assert model.memory_bytes == 2 * 40  # bfloat16, though the file holds float32
    assert model.disk_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert (model.path, model.model_type, model.source) == (folder, "qwen2", "folder")
    assert model.supported
    assert model.reason is None


def test_without_a_dtype_in_the_config_memory_is_what_the_file_stores(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "tiny", dtype=None)
    assert found(list_local_models(tmp_path / "models"), str(folder)).memory_bytes == 4 * 40


def test_packed_weights_have_their_stored_size_and_no_parameter_count(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "packed", quantization_config={"bits": 4})
    write_weights(folder, qweight=("I32", [11, 3]), scales=("BF16", [3]))
    model = found(list_local_models(tmp_path / "models"), str(folder))
    assert (model.parameters, model.memory_bytes) == (None, 4 * 33 + 2 * 3)


def test_sharded_weights_are_added_up(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "sharded")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    write_weights(folder, head=("F32", [3]))
    (folder / "model.safetensors").rename(folder / "two.safetensors")
    shards = {"embed": "one.safetensors", "norm": "one.safetensors", "head": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert found(list_local_models(tmp_path / "models"), str(folder)).parameters == 43


def test_a_family_without_known_points_is_listed_as_not_supported(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "other", model_type="mamba")
    model = found(list_local_models(tmp_path / "models"), str(folder))
    assert (model.supported, model.reason, model.model_type) == (False, None, "mamba")
    assert "mamba" not in FAMILIES


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": "qwen2", "text_config": 3}', "'int' object"),
    ],
)
def test_a_broken_config_is_listed_with_the_reason(tmp_path: Path, cache: Path, config: str, reason: str):
    broken = write_model(tmp_path / "models" / "broken")
    (broken / "config.json").write_text(config)
    whole = write_model(tmp_path / "models" / "whole")
    models = list_local_models(tmp_path / "models")
    assert reason in (found(models, str(broken)).reason or "")
    assert found(models, str(whole)).reason is None


@pytest.mark.parametrize("content", [b"", b"\x10", struct.pack("<Q", 50) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_broken_weights_are_listed_with_the_reason_and_the_family(tmp_path: Path, cache: Path, content: bytes):
    folder = write_model(tmp_path / "models" / "broken")
    (folder / "model.safetensors").write_bytes(content)
    model = found(list_local_models(tmp_path / "models"), str(folder))
    assert model.reason
    assert (model.model_type, model.parameters) == ("qwen2", None)


def test_missing_weights_are_a_reason_and_weights_in_another_format_are_not(tmp_path: Path, cache: Path):
    folder = write_model(tmp_path / "models" / "bare")
    (folder / "model.safetensors").unlink()
    assert found(list_local_models(tmp_path / "models"), str(folder)).reason == "its weights are not here"
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    model = found(list_local_models(tmp_path / "models"), str(folder))
    assert (model.reason, model.parameters, model.memory_bytes) == (None, None, None)


def test_folders_are_found_at_any_depth_but_not_inside_a_model_a_cache_or_a_hidden_folder(tmp_path: Path, cache: Path):
    deep = write_model(tmp_path / "models" / "org" / "deep")
    write_model(deep / "checkpoint-100")
    write_model(tmp_path / "models" / ".hidden" / "model")
    write_cached(tmp_path / "models" / "huggingface" / "hub", "org/cached")
    assert [model.id for model in list_local_models(tmp_path / "models")[1:]] == [str(deep)]


def test_a_models_dir_that_is_no_folder_is_refused(tmp_path: Path, cache: Path):
    with pytest.raises(NotFound, match="is not a folder"):
        list_local_models(tmp_path / "nowhere")


def test_cached_models_are_listed_by_hub_id_and_data_sets_are_not(cache: Path):
    write_cached(cache, "org/b-model")
    write_cached(cache, "Org/a-model", model_type="llama")
    write_cached(cache, "org/words")
    (cache / "models--org--words").rename(cache / "datasets--org--words")
    models = list_local_models()[1:]
    assert [(model.id, model.model_type) for model in models] == [
        ("Org/a-model", "llama"),
        ("org/b-model", "qwen2"),
    ]
    assert all(model.source == "cache" and model.parameters == 40 for model in models)


def test_a_damaged_repository_of_the_cache_is_listed_with_the_reason(cache: Path):
    write_cached(cache, "org/whole")
    (cache / "models--org--half-done").mkdir()
    models = list_local_models()
    assert "Snapshots dir doesn't exist" in (found(models, "org/half-done").reason or "")
    assert found(models, "org/whole").reason is None


def test_the_revision_of_main_is_described_rather_than_the_newest(cache: Path):
    write_cached(cache, "org/model")
    newer = "f" * 40
    write_model(cache / "models--org--model" / "snapshots" / newer, model_type="llama")
    later = (cache / "models--org--model" / "snapshots" / COMMIT / "config.json").stat().st_mtime + 100
    for file in (cache / "models--org--model" / "snapshots" / newer).iterdir():
        os.utime(file, (later, later))
    assert found(list_local_models(), "org/model").model_type == "qwen2"
    (cache / "models--org--model" / "refs" / "main").unlink()
    assert found(list_local_models(), "org/model").model_type == "llama"


def test_a_cache_that_is_a_file_is_refused(cache: Path):
    cache.write_text("not a folder")
    with pytest.raises(InvalidRequest, match="found a file"):
        list_local_models()


def test_the_cache_is_found_where_hf_home_says(tmp_path: Path):
    write_cached(tmp_path / "home" / "hub", "org/model")
    code = "from attribution.model.hub import list_local_models; print(list_local_models()[1].id)"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "org/model"
