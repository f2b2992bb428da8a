"""The table of results: sections that are measured on their own, kept as JSON beside the table that shows them."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class Row:
    """One figure: a ratio (None when there is none), what was aimed at, and what the two sides measured."""

    name: str
    aim: str
    ratio: float | None
    measured: str


@dataclass(frozen=True)
class Section:
    """The rows of one run of one part, and what a reader must know of how they were measured."""

    title: str
    rows: list[Row]
    rounds: int
    note: str
    day: str
    machine: str

    @classmethod
    def of(cls, title: str, rows: list[Row], rounds: int, note: str = "") -> "Section":
        """A section that was measured here and now."""
        return cls(title, rows, rounds, note, date.today().isoformat(), machine())

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Section":
        """A section as `asdict` gave it."""
        fields: dict[str, Any] = record | {"rows": [Row(**row) for row in record["rows"]]}
        return cls(**fields)


def machine() -> str:
    """This machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, {gpu}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def markdown(section: Section) -> str:
    """One section as it stands in RESULTS.md."""
    head = (
        f"## {section.title}\n\n{section.day}, {section.machine}; medians of {section.rounds} rounds.\n"
        + (f"\n{section.note}\n" if section.note else "")
        + "\n| what | ratio | aim | measured (base, ours) |\n|---|---|---|---|\n"
    )
    lines = [f"| {row.name} | {_shown(row.ratio)} | {row.aim} | {row.measured} |" for row in section.rows]
    return head + "\n".join(lines) + "\n"


def _shown(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.3f}" if ratio < 0.2 else f"{ratio:.2f}"


def write(sections: list[Section], folder: Path) -> None:
    """Print sections and their JSON; in results.json and RESULTS.md they replace those of the same titles."""
    for section in sections:
        print(markdown(section))
        print(json.dumps(asdict(section), ensure_ascii=False))
    kept = {one.title: one for one in _read(folder)} | {one.title: one for one in sections}
    records = [asdict(one) for one in kept.values()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    head = (
        "# Results\n\nBoth sides of a ratio were measured in turn in one run; absolute numbers compare only within a "
        "row. `make bench` measures everything again, `python -m benchmarks PART` one part; both print this table and "
        "write it, with results.json, which holds the same.\n"
    )
    (folder / "RESULTS.md").write_text("\n".join([head, *(markdown(one) for one in kept.values())]))


def _read(folder: Path) -> list[Section]:
    path = folder / "results.json"
    return [Section.read(record) for record in json.loads(path.read_text())] if path.exists() else []
