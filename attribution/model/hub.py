"""The models on this machine that could be loaded: the embedded one, the Hugging Face cache, and folders.

Nothing is loaded for it: file listings, config.json and the headers of safetensors files say enough.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, scan_cache_dir
from huggingface_hub import get_local_safetensors_metadata as read_headers
from huggingface_hub.errors import CacheNotFound, NotASafetensorsRepoError, SafetensorsParsingError

import puzzles
from attribution.errors import InvalidRequest, NotFound
from attribution.model.families import FAMILIES

DEMO = "demo"
ALIASES = {
    "gpt2-small": "openai-community/gpt2",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
}

Source = Literal["embedded", "cache", "folder"]

_WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_STORED_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
# The last three: JSON of another shape than a config, an index or a header has.
_UNREADABLE = (OSError, ValueError, SafetensorsParsingError, AttributeError, KeyError, TypeError)
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        id: what to load it by: a hub id, a folder, or "demo".
        path: the folder of its files; None when it has none.
        model_type: the family that its config.json names; None when that cannot be read.
        supported: whether the points of this family are known.
        parameters: from the headers of the weights; None when these are packed, or no safetensors.
        disk_bytes: what its files take, all cached revisions together.
        memory_bytes: estimate of the weights in the dtype of the config; None when unknown.
        source: where it was found.
        reason: what keeps it from being loaded, or from being known in full; None when all is well.
    """

    id: str
    path: Path | None
    model_type: str | None
    supported: bool
    parameters: int | None
    disk_bytes: int
    memory_bytes: int | None
    source: Source
    reason: str | None = None


def resolve_alias(name: str) -> str:
    """The hub id or folder that a short name stands for; another name stands for itself."""
    return str(puzzles.demo_model_path()) if name == DEMO else ALIASES.get(name, name)


def canonical(name: str) -> str:
    """The one name of a model: aliases stand for their hub ids."""
    return name if name == DEMO else resolve_alias(name)


def list_local_models(models_dir: Path | None = None) -> list[LocalModel]:
    """The embedded model, those of the cache that huggingface_hub uses, and folders below `models_dir`.

    What is damaged is listed with the reason.

    Raises:
        NotFound: `models_dir` is not a folder.
        InvalidRequest: the cache is not a folder.
    """
    embedded = Path(puzzles.demo_model_path())
    return [
        _describe(DEMO, embedded, _disk_bytes(embedded), "embedded"),
        *sorted(_cached(), key=lambda model: model.id.lower()),
        *([] if models_dir is None else _folders(models_dir)),
    ]


def _cached() -> Iterator[LocalModel]:
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    except ValueError as error:
        raise InvalidRequest(f"the Hugging Face cache cannot be read: {error}") from error
    for repo in cache.repos:
        if repo.repo_type == "model":
            revision = _chosen_revision(repo)
            yield _describe(repo.repo_id, revision.snapshot_path if revision else None, repo.size_on_disk, "cache")
    for warning in cache.warnings:
        if found := re.search(r"models--([^/\s]+)", str(warning)):
            reason = f"damaged in the cache: {warning}"
            yield LocalModel(found[1].replace("--", "/"), None, None, False, None, 0, None, "cache", reason)


def _chosen_revision(repo: CachedRepoInfo) -> CachedRevisionInfo | None:
    """The revision that a load without `revision` takes, else the newest."""
    by_age = sorted(repo.revisions, key=lambda revision: revision.last_modified)
    return repo.refs.get("main") or (by_age[-1] if by_age else None)


def _folders(models_dir: Path) -> Iterator[LocalModel]:
    if not models_dir.is_dir():
        raise NotFound(f"models_dir {str(models_dir)!r} is not a folder", param="models_dir")
    for folder, subfolders, files in os.walk(models_dir):
        # hidden folders, and the layout of a cache, whose models are listed by their hub ids
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "models--")))
        if "config.json" in files:
            subfolders.clear()
            path = Path(folder)
            yield _describe(str(path), path, _disk_bytes(path), "folder")


def needed_bytes(folder: Path, dtype: str = "auto") -> int | None:
    """Estimate of a model's weights in memory, in this dtype ("auto": its own); None where its files do not say."""
    found = _describe(str(folder), folder, 0, "folder")
    if dtype == "auto" or found.parameters is None:
        return found.memory_bytes
    return found.parameters * _WIDTHS[dtype]


def _describe(name: str, path: Path | None, disk_bytes: int, source: Source) -> LocalModel:
    """One entry; whatever cannot be read becomes its reason."""
    model_type = parameters = memory = None
    try:
        if path is None:
            raise ValueError("no revision of it is in the cache")
        config = _read_config(path)
        model_type = str(config.get("model_type") or "") or None
        parameters, memory = _sizes(path, config)
        reason = None if model_type else "config.json names no model_type"
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
    supported = model_type in FAMILIES
    return LocalModel(name, path, model_type, supported, parameters, disk_bytes, memory, source, reason)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError("it has no config.json")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config.json holds a {type(config).__name__}, not an object")
    return config


def _sizes(path: Path, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Parameters and bytes in memory of the weights below `path`."""
    try:
        stored = read_headers(path).parameter_count
    except NotASafetensorsRepoError:
        if any((path / name).is_file() for name in _OTHER_WEIGHTS):
            return None, None
        raise ValueError("its weights are not here") from None
    as_stored = sum(count * _STORED_WIDTHS.get(kind, 1) for kind, count in stored.items())
    if "quantization_config" in config:
        return None, as_stored
    parameters = sum(stored.values())
    text = config.get("text_config") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    width = _WIDTHS.get(str(dtype).removeprefix("torch."))
    return parameters, as_stored if width is None else parameters * width


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
