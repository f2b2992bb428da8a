"""Progress bars: on a terminal and in a notebook, silent in a pipe."""

import sys
from collections.abc import Generator
from typing import TypeVar

from tqdm.auto import tqdm

from attribution.operation import Progress

R = TypeVar("R")


def progress_bar(total: int | None, label: str, *, show: bool = True) -> tqdm:
    """A bar of `total` samples; nothing is drawn when `show` is false or nobody looks."""
    in_notebook = "ipykernel" in sys.modules
    return tqdm(total=total, desc=label, unit="sample", disable=not (show and (in_notebook or sys.stderr.isatty())))


def drive(steps: Generator[Progress, None, R], label: str, *, show: bool) -> R:
    """Run a generator of `Progress` to its end, with a bar, and give what it returns."""
    bar = None
    try:
        while True:
            done = next(steps)
            bar = bar or progress_bar(done.total, label, show=show)
            bar.update(done.done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        if bar is not None:
            bar.close()
