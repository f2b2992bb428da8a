"""What the features of an autoencoder are said to be about: Neuronpedia's exports, and plain lines.

    {"modelId": "gpt2-small", "layer": "5-res-jb", "index": "12", "description": "…", "explanationModelName": …, …}
    {"index": 12, "description": "…"}

One JSON object a line, gzipped or not, in one file or in a folder of them (`explanations/batch-N.jsonl.gz`). A feature
may have several rows: all are kept, in the order of the files and lines, and the first one is the feature's
description. A line that cannot be read costs that line and is reported.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from attribution.errors import InvalidArgument

PROBLEMS_KEPT = 20
"""How many problems are kept in words; all of them are counted."""

_SUFFIXES = (".jsonl", ".jsonl.gz")
_LONGEST_LINE = 1 << 20
_GZIP = b"\x1f\x8b"
_SHOWN = 5
_PARAM = "descriptions"


@dataclass(frozen=True)
class Description:
    """One row of a feature: its text, and which model and which method wrote it, where that is said."""

    text: str
    explainer: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Descriptions:
    """The descriptions of an autoencoder's features.

    Attributes:
        rows: of each feature that has one, in the order in which they were read.
        problems: lines that were left out, as "batch-0.jsonl.gz, line 7: …"; the first `PROBLEMS_KEPT` of them.
        n_problems: how many lines were left out.
        source: whose features they describe, as "gpt2-small/5-res-jb"; None when no row says it.
    """

    rows: dict[int, tuple[Description, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    n_problems: int = 0
    source: str | None = None

    def of(self, index: int) -> str | None:
        """The first description of a feature; None where there is none."""
        found = self.rows.get(index)
        return found[0].text if found else None

    def all_of(self, index: int) -> list[Description]:
        """All descriptions of a feature."""
        return list(self.rows.get(index, ()))

    def search(self, words: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The features, in order, that have a description with all these words, with the first such description.

        Args:
            words: case-folded; a part of a word is one too.
        """
        for index in sorted(self.rows):
            texts = (one.text for one in self.rows[index])
            if text := next((text for text in texts if all(word in text.casefold() for word in words)), None):
                yield index, text

    def __len__(self) -> int:
        """How many features have a description."""
        return len(self.rows)


def read_descriptions(path: Path | str, n_features: int | None = None, source_id: str | None = None) -> Descriptions:
    """Read a file or a folder of descriptions.

    Args:
        n_features: an index at or above it is a problem of its line.
        source_id: whose rows are meant, in Neuronpedia's words: "5-res-jb", or "gpt2-small/5-res-jb". Rows of others
            are problems; rows that do not say whose they are, are taken.

    Raises:
        InvalidArgument: there is nothing at this path, no line of it can be read, a file is no whole gzip, or it has
            rows of several sources and `source_id` is None.
    """
    files = _files(Path(path))
    reader = _Reader(n_features, source_id)
    for file in files:
        reader.read(file)
    return reader.finish(Path(path))


def _files(path: Path) -> list[Path]:
    """The files of a folder (or of its folder "explanations"), batch-2 before batch-10; a file is itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidArgument(f"there are no descriptions at {path}; name a file or a folder", param=_PARAM)
    folders = [path, path / "explanations"]
    for folder in folders:
        found = [file for file in folder.glob("*") if file.name.endswith(_SUFFIXES) and not file.name.startswith(".")]
        if found:
            return sorted(found, key=lambda file: [int(part) if part.isdigit() else part for part in _parts(file.name)])
    raise InvalidArgument(f"{path} has no file of descriptions; they end in {' or '.join(_SUFFIXES)}", param=_PARAM)


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


class _Reader:
    """Collects the rows of several files, and what is wrong with them."""

    def __init__(self, n_features: int | None, source_id: str | None) -> None:
        self._n_features = n_features
        *model, self._layer = (None,) if source_id is None else source_id.rsplit("/", 1)
        self._model = model[0] if model else None
        self._rows: dict[int, list[Description]] = {}
        self._problems: list[str] = []
        self._count = 0
        self._sources: dict[str, None] = {}

    def read(self, path: Path) -> None:
        """Take the rows of a file."""
        try:
            with open(path, "rb") as file:
                zipped = file.read(2) == _GZIP
            with gzip.GzipFile(path) if zipped else open(path, "rb") as file:
                for number, line in _lines(file):
                    self._take(f"{path.name}, line {number}", line)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidArgument(f"{path} cannot be read: {error}; get the file anew", param=_PARAM) from error

    def _take(self, where: str, line: bytes | None) -> None:
        try:
            row = _row(line)
            if row is None:
                return
            self._check_source(row)
            index = _index(row, self._n_features)
            text = row.get("description")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"its description is {_short(text)}, and a text is expected")
        except ValueError as error:
            self._count += 1
            if len(self._problems) < PROBLEMS_KEPT:
                self._problems.append(f"{where}: {error}")
            return
        said = Description(text.strip(), _text_of(row, "explanationModelName"), _text_of(row, "typeName"))
        self._rows.setdefault(index, []).append(said)

    def _check_source(self, row: dict[str, Any]) -> None:
        model, layer = row.get("modelId"), row.get("layer")
        for name, found, expected in (("modelId", model, self._model), ("layer", layer, self._layer)):
            if expected is not None and found is not None and found != expected:
                raise ValueError(f"its {name} is {_short(found)}, and {expected!r} was asked for")
        if said := "/".join(str(one) for one in (model, layer) if one is not None):
            self._sources[said] = None

    def finish(self, path: Path) -> Descriptions:
        """What was read, unless that is nothing, or of several sources."""
        if len(self._sources) > 1:
            there = ", ".join(list(self._sources)[:_SHOWN])
            raise InvalidArgument(
                f"{path} describes the features of {len(self._sources)} sources ({there}); say which is meant with "
                "source_id",
                param="source_id",
            )
        if not self._rows:
            why = f"; {self._problems[0]}" if self._problems else ""
            raise InvalidArgument(
                f"{path} has no description that can be read ({self._count} lines were left out{why})", param=_PARAM
            )
        rows = {index: tuple(found) for index, found in self._rows.items()}
        source = next(iter(self._sources), None)
        return Descriptions(rows, tuple(self._problems), self._count, source)


def _lines(file: BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers; None is one that is too long to be kept in memory."""
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        too_long = False
        while line and not line.endswith(b"\n") and (more := file.readline(_LONGEST_LINE)):
            line, too_long = more, True
        yield number, None if too_long else line


def _row(line: bytes | None) -> dict[str, Any] | None:
    """The object of a line; None of an empty line."""
    if line is None:
        raise ValueError(f"it is longer than {_LONGEST_LINE:,} bytes")
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it is {_short(row)}, and an object is expected")
    return row


def _index(row: dict[str, Any], n_features: int | None) -> int:
    given = row.get("index")
    if isinstance(given, str) and re.fullmatch(r"[0-9]{1,12}", given):
        given = int(given)
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise ValueError(f"its index is {_short(given)}, and a feature's number is expected")
    if n_features is not None and given >= n_features:
        raise ValueError(f"its index is {given}, and the features are 0 to {n_features - 1}")
    return given


def _text_of(row: dict[str, Any], name: str) -> str | None:
    found = row.get(name)
    return found if isinstance(found, str) and found else None


def _short(value: object) -> str:
    return repr(value)[:60]
