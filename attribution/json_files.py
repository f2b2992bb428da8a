"""Records of graphs and results on disk: JSON of one format, whole or not at all."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attribution.errors import InvalidArgument, StorageFailed
from attribution.sample_file import temporary_name

FORMAT = 1


def write_json(path: Path | str, kind: str, record: Mapping[str, Any]) -> Path:
    """Write a record of some kind ("graph"); a file of this name is replaced in one step.

    Raises:
        StorageFailed: it cannot be written, and why.
    """
    path = Path(path)
    hidden = path.parent / temporary_name()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_text(json.dumps({"kind": kind, "format": FORMAT, **record}, allow_nan=False))
        hidden.replace(path)
    except OSError as error:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise StorageFailed(f"{path} cannot be written: {error}") from error
    return path


def read_json(path: Path | str, kind: str) -> dict[str, Any]:
    """The record that `write_json` wrote.

    Raises:
        StorageFailed: it cannot be read.
        InvalidArgument: it is a file of something else, or of another version.
    """
    try:
        record = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise StorageFailed(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise InvalidArgument(f"{path} is no JSON file: {error}", param="path") from error
    found = (record.get("kind"), record.get("format")) if isinstance(record, dict) else (None, None)
    if found != (kind, FORMAT):
        raise InvalidArgument(
            f"{path} is of kind {found[0]!r} and format {found[1]!r}; expected {kind!r}, format {FORMAT}", param="path"
        )
    return record
