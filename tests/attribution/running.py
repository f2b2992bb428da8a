"""Drives the two ways to generate, with whatever watches them: what the server does, without the server."""

from collections.abc import Callable, Iterable

from attribution.model.capture import Stream
from attribution.model.decode import DecodeBatch, Fed, Prefill
from attribution.model.reference import generate
from attribution.model.traced import TracedModel


class Watcher:
    """One sequence: given its row of every forward, it chooses the most likely token until it has enough."""

    def __init__(self, prompt: list[int], limit: int, tail: int = 1) -> None:
        self.prompt, self.limit, self.tail = prompt, limit, tail
        self.tokens: list[int] = []

    def wanted(self, start: int, stop: int) -> set[Stream]:
        """The streams to capture when the positions [start, stop) are fed."""
        return set()

    def see(self, fed: Fed, row: int) -> None:
        """Look at a forward."""

    def choose(self, fed: Fed, row: int) -> int | None:
        """See, and choose the next token; None after the last."""
        self.see(fed, row)
        self.tokens.append(int(fed.logits[row, -1].argmax()))
        return self.tokens[-1] if len(self.tokens) < self.limit else None


def step_loop(model: TracedModel, arrivals: list[list[Watcher]], chunk: int = 10**9) -> None:
    """Generate: the group `arrivals[i]` is prefilled, `chunk` columns a time, and joins before step i.

    Every sequence leaves when it has its tokens, whoever is still there.
    """
    batch, active = DecodeBatch(model), []
    for group in [*arrivals, *([[]] * 1000)]:
        if group:
            prefill, going = Prefill(model, [w.prompt for w in group]), []
            while not prefill.done:
                going = _feed(prefill, group, chunk)
            batch.join(prefill, going)
            active += [group[row] for row in going]
        if not active:
            continue
        wanted: set[Stream] = set()
        for watcher, length in zip(active, batch.lengths, strict=True):
            wanted |= watcher.wanted(length, length + 1)
        fed = batch.step([watcher.tokens[-1] for watcher in active], wanted)
        stay = [row for row, watcher in enumerate(active) if watcher.choose(fed, row) is not None]
        if len(stay) < len(active):
            batch.keep(stay)
            active = [active[row] for row in stay]


def _feed(prefill: Prefill, group: list[Watcher], chunk: int) -> list[int]:
    """Feed one piece; the rows that go on when it was the last."""
    stop = min(prefill.columns, prefill.fed + chunk)
    wanted: set[Stream] = set()
    for watcher in group:
        padding = prefill.columns - len(watcher.prompt)
        wanted |= watcher.wanted(max(prefill.fed - padding, 0), max(stop - padding, 0))
    fed = prefill.advance(chunk, max(watcher.tail for watcher in group), wanted)
    if prefill.done:
        return [row for row, watcher in enumerate(group) if watcher.choose(fed, row) is not None]
    for row, watcher in enumerate(group):
        watcher.see(fed, row)
    return []


def reference(model: TracedModel, watchers: Iterable[Watcher]) -> None:
    """Generate by nnsight's own loop, one sequence after the other."""
    for watcher in watchers:
        take: Callable[[Fed], int | None] = lambda fed, watcher=watcher: watcher.choose(fed, 0)  # noqa: E731
        streams = watcher.wanted(0, 10**9)
        generate(model, watcher.prompt, watcher.limit, watcher.tail, streams, take)
