"""Progress bars: on a terminal and in a notebook, silent in a pipe."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

from attribution.operation import Progress

R = TypeVar("R")


def progress_bar(total: int | None, label: str, *, show: bool = True) -> tqdm:
    """A bar of `total` samples; nothing is drawn when `show` is false or nobody looks."""
    in_notebook = "ipykernel" in sys.modules
    return tqdm(total=total, desc=label, unit="sample", disable=not (show and (in_notebook or sys.stderr.isatty())))


@contextmanager
def shown(label: str, *, show: bool) -> Iterator[Callable[[Progress], None]]:
    """What to call with each `Progress`; the bar appears with the first."""
    bar: tqdm | None = None

    def tell(progress: Progress) -> None:
        nonlocal bar
        bar = bar or progress_bar(progress.total, label, show=show)
        if bar.total != progress.total:  # another part of the work
            bar.reset(progress.total)
        bar.update(progress.done - bar.n)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()


def drive(steps: Generator[Progress, None, R], label: str, *, show: bool) -> R:
    """Run a generator of `Progress` to its end, with a bar, and give what it returns."""
    with shown(label, show=show) as tell:
        while True:
            try:
                tell(next(steps))
            except StopIteration as end:
                return end.value
