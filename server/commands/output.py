"""How the commands show numbers and tables."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.errors import StorageFailed


def show(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print a table; columns named in `right` stand to the right. A pipe gets whole lines, however long."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = console or Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    console.print(table)


def write_json(path: Path, found: Any) -> None:
    """Write a result to a file, and say so.

    Raises:
        StorageFailed: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1))
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error}") from error
    typer.echo(f"\nresult: {path}")


def size(count: int | None) -> str:
    """Bytes to read: ``3.4 MiB``; unknown is a question mark."""
    if count is None:
        return "?"
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def amount(count: int | None) -> str:
    """A number of parameters to read: ``860 k``, ``1.5 B``; unknown is a question mark."""
    if count is None:
        return "?"
    for step, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return str(count)


def moment(seconds: float) -> str:
    """A time of day here, from seconds since 1970."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
