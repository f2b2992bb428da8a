"""The table of results."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Row:
    """One figure: a ratio (None when there is none), what was aimed at, and what the two sides measured."""

    name: str
    aim: str
    ratio: float | None
    measured: str


def machine() -> str:
    """This machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, {gpu}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def markdown(rows: list[Row], rounds: int) -> str:
    """The table as it stands in RESULTS.md."""
    head = (
        "# Results\n\n"
        f"{date.today().isoformat()}, {machine()}; medians of {rounds} rounds, both sides of a ratio measured in turn "
        "in one run. `make bench` prints and writes this table; absolute numbers compare only within a row.\n\n"
        "| what | ratio | aim | measured (base, ours) |\n|---|---|---|---|\n"
    )
    lines = [
        f"| {row.name} | {'' if row.ratio is None else f'{row.ratio:.2f}'} | {row.aim} | {row.measured} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def write(rows: list[Row], rounds: int, folder: Path) -> None:
    """Print the table and its JSON, and keep the table in RESULTS.md."""
    text = markdown(rows, rounds)
    print(text)
    print(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
    (folder / "RESULTS.md").write_text(text)
