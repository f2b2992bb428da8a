"""The registry file: which autoencoders there are, for which models.

    [[source]]
    model = "google/gemma-2-2b"         # as it is loaded: a hub id, an alias, a folder, "demo"
    folder = "gemma-2-2b/12-res-16k"    # of cfg.json and the weights; relative to this file
    name = "12-res-16k"                 # optional, as all that follows
    point = "resid_post[12]"            # where it reads, when cfg.json does not say so
    writes = "mlp_out[12]"              # of a transcoder, likewise
    descriptions = "12-res-16k.jsonl"   # a file or a folder; relative to this file
    source_id = "12-res-16k"            # whose rows of the descriptions are meant
    model_name = "gemma-2b-2"           # the name that cfg.json has for the model, when it is none of the model's own

An entry that is wrong is reported and does not keep the others from being used; a file that is no registry is refused.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from attribution.arguments import DatasetId, refusal
from attribution.errors import InvalidArgument
from attribution.features.declared import Declaration

REGISTRY_FILE = "features.toml"
_PARAM = "features"


class Entry(BaseModel):
    """An entry of the file as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model: str
    folder: str
    name: DatasetId | None = None
    point: str | None = None
    writes: str | None = None
    descriptions: str | None = None
    source_id: str | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class Refused:
    """An entry that is wrong as it is written: what it says of itself, and why it cannot be used."""

    name: str | None
    model: str | None
    reason: str

    def status(self) -> dict[str, Any]:
        """A row of the list of all sources."""
        return {"name": self.name, "model_id": self.model, "folder": None, "status": "failed", "reason": self.reason}


def read_registry(path: Path) -> tuple[list[Declaration], list[Refused]]:
    """The entries of a registry, and those that are wrong.

    Args:
        path: of the file, or of a folder that has a features.toml.

    Raises:
        InvalidArgument: there is no such file, it is no TOML, or it has something else than entries.
    """
    path = path / REGISTRY_FILE if path.is_dir() else path
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"the registry of autoencoders {path} cannot be read: {error}", param=_PARAM) from error
    entries = content.pop("source", [])
    if content or not isinstance(entries, list):
        found = ", ".join(content) or "a source that is no [[source]]"
        raise InvalidArgument(f"{path} has entries [[source]] and nothing else; found {found}", param=_PARAM)
    declared: list[Declaration] = []
    refused: list[Refused] = []
    for number, values in enumerate(entries, 1):
        try:
            declared.append(_declaration(path, f"{path}, source {number}", values))
        except InvalidArgument as error:
            refused.append(_refused(values, error.message))
    return declared, refused


def _declaration(path: Path, where: str, values: Any) -> Declaration:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{where}: a table is expected; found {values!r}", param=_PARAM)
    try:
        entry = Entry.model_validate(values)
    except ValidationError as error:
        raise InvalidArgument(f"{where}{_shown(values)}: {refusal('a source', error).message}", param=_PARAM) from error
    folder = path.parent.absolute()
    return Declaration(
        **entry.model_dump(exclude={"folder", "descriptions"}),
        folder=folder / entry.folder,
        descriptions=None if entry.descriptions is None else folder / entry.descriptions,
        origin=f"{where}{_shown(values)}",
    )


def _refused(values: Any, reason: str) -> Refused:
    said = values if isinstance(values, dict) else {}
    name, model = (said[key] if isinstance(said.get(key), str) else None for key in ("name", "model"))
    return Refused(name, model, reason)


def _shown(values: dict[str, Any]) -> str:
    name = values.get("name", values.get("folder"))
    return f" ({name!r})" if isinstance(name, str) else ""
