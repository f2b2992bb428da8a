"""How long things take, measured in turn, so that a busy machine is busy for all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Work = Callable[[], Any]
Times = dict[str, list[float]]

_LEAST = 0.05  # seconds that one round of one work takes at least
_MOST_CALLS = 50


@dataclass(frozen=True)
class Prepared:
    """Work that needs something new before each call; only `work(prepare())` counts, not `prepare()`."""

    prepare: Work
    work: Callable[[Any], Any]


def in_turn(works: Mapping[str, Work | Prepared], rounds: int) -> Times:
    """Seconds per call of each work, one number per round: the mean of as many calls as take 50 ms (50 at most).

    Every round runs all works one after the other, each once before it is measured for the first time. The garbage
    collector is off while the clock runs.
    """
    calls = {}
    for name, work in works.items():
        once = _measure(work, 1)
        if once < _LEAST:
            once = _measure(work, 1)  # the first call sets things up
        calls[name] = min(_MOST_CALLS, max(1, round(_LEAST / once)))
    times: Times = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(_measure(work, calls[name]))
    return times


def _measure(work: Work | Prepared, calls: int) -> float:
    taken = 0.0
    gc.collect()
    gc.disable()
    try:
        for _ in range(calls):
            given = (work.prepare(),) if isinstance(work, Prepared) else ()
            do: Callable[..., Any] = work.work if isinstance(work, Prepared) else work
            start = time.perf_counter()
            do(*given)
            taken += time.perf_counter() - start
    finally:
        gc.enable()
    return taken / calls


def ratio(times: Times, over: str, under: str) -> float:
    """The median over rounds of `over` / `under` of the same round."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def milliseconds(*measured: list[float]) -> str:
    """The medians, as the table shows them."""
    return ", ".join(_three_digits(statistics.median(one) * 1000) for one in measured) + " ms"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
