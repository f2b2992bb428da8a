"""The two ways to generate, behind one interface.

`StepLoop` shares forward passes between sequences; `ReferenceLoop` hands one sequence after the other to nnsight's
`generate`. Both live on the thread that owns the model, which calls `turn` as long as they are `busy`.
"""

import time
from collections import deque
from collections.abc import Iterable
from functools import cached_property
from typing import Protocol, runtime_checkable

from attribution.errors import SightlineError
from attribution.model.capture import Change, Stream
from attribution.model.decode import DecodeBatch, Fed, Prefill
from attribution.model.reference import generate
from attribution.model.traced import TracedModel
from server.acting import Row, changes_for, lasting_changes
from server.generation.sequence import Sequence
from server.metrics import Metrics


@runtime_checkable
class Engine(Protocol):
    """Generates. `turn` is one bounded piece of work."""

    waiting: deque[Sequence]

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        ...

    def turn(self) -> None:
        """Do one piece of work."""
        ...

    def fail(self, error: SightlineError) -> None:
        """End everything that is under way with `error`, and be ready for new work."""
        ...


def make_engine(model: TracedModel, max_batch: int, prefill_chunk: int, metrics: Metrics) -> Engine:
    """The step loop, or the reference path for a batch of one and for families that the loop is not proved on."""
    if max_batch == 1 or model.family is None:
        return ReferenceLoop(model, metrics)
    return StepLoop(model, max_batch, prefill_chunk, metrics)


class _Arriving:
    """Newcomers whose prompts are being fed together."""

    def __init__(self, model: TracedModel, sequences: list[Sequence]) -> None:
        self.model, self.sequences = model, sequences

    @cached_property
    def prefill(self) -> Prefill:
        """Made when the group is fed, not when it is admitted: what fails then fails for a group that is known."""
        return Prefill(self.model, [sequence.prompt for sequence in self.sequences])

    @property
    def left(self) -> int:
        return self.prefill.columns - self.prefill.fed


class StepLoop:
    """Continuous batching. One turn feeds one piece of the newcomers' prompts, and one token of everyone else."""

    def __init__(self, model: TracedModel, max_batch: int, prefill_chunk: int, metrics: Metrics) -> None:
        self.model, self.max_batch, self.prefill_chunk, self.metrics = (
            model,
            max_batch,
            prefill_chunk,
            metrics,
        )
        self.waiting: deque[Sequence] = deque()
        self._arriving: list[_Arriving] = []
        self._active: list[Sequence] = []
        self._oldest_next = True
        self._batch = DecodeBatch(model)

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting, arriving or being decoded."""
        return bool(self.waiting or self._arriving or self._active)

    def turn(self) -> None:
        """Admit, feed one piece of a prompt, and take one step with all that are active."""
        self._drop_cancelled()
        self._admit()
        if self._arriving:
            self._feed_prompts(self._next_group())
        if self._active:
            self._step()

    def _next_group(self) -> _Arriving:
        """In turns the group with the fewest tokens left, and the one that came first: neither waits for ever."""
        self._oldest_next = not self._oldest_next
        return self._arriving[0] if self._oldest_next else min(self._arriving, key=lambda group: group.left)

    def fail(self, error: SightlineError) -> None:
        """End everything that is under way with `error`."""
        underway = [*self._active, *(s for group in self._arriving for s in group.sequences)]
        self._active, self._arriving, self._batch = [], [], DecodeBatch(self.model)
        for sequence in underway:
            if sequence.finish_reason is None:
                sequence.fail(error)

    def _drop_cancelled(self) -> None:
        self._keep([not _dropped(sequence) for sequence in self._active])
        for group in self._arriving:
            for sequence in group.sequences:
                _dropped(sequence)
        self._arriving = [g for g in self._arriving if any(s.finish_reason is None for s in g.sequences)]

    def _admit(self) -> None:
        room = self.max_batch - len(self._active) - sum(len(group.sequences) for group in self._arriving)
        newcomers: list[Sequence] = []
        longest = 0
        while self.waiting:
            group = self._next_waiting()
            longest = max(longest, len(group[0].prompt))
            if len(newcomers) + len(group) > room:
                break
            if newcomers and longest * (len(newcomers) + len(group)) > self.prefill_chunk:
                break
            for sequence in group:
                self.waiting.popleft()
                if not _dropped(sequence):
                    newcomers.append(sequence)
        if newcomers:
            self._arriving.append(_Arriving(self.model, newcomers))

    def _next_waiting(self) -> list[Sequence]:
        """The sequence that has waited longest, with the one that has to come in together with it."""
        first = self.waiting[0]
        pair = len(self.waiting) > 1 and self.waiting[1] is first.beside
        return [first, self.waiting[1]] if pair else [first]

    def _feed_prompts(self, group: _Arriving) -> None:
        prefill, sequences = group.prefill, group.sequences
        tokens = max(1, self.prefill_chunk // len(sequences))  # a pair comes in together, however small the pieces
        stop = min(prefill.columns, prefill.fed + tokens)
        wanted: set[Stream] = set()
        spans = [
            (max(prefill.fed - prefill.columns + length, 0), max(stop - prefill.columns + length, 0))
            for length in prefill.lengths
        ]
        for sequence, span in zip(sequences, spans, strict=True):
            wanted |= sequence.wanted(*span)
        changes = _changes(self.model, sequences, spans)
        fed = prefill.advance(tokens, max(sequence.tail for sequence in sequences), wanted, changes)
        live = [s.finish_reason is None for s in sequences]
        if not prefill.done:
            for row, sequence in enumerate(sequences):
                if live[row]:
                    _guarded(sequence, fed, row, advance=False)
            return
        going = [row for row, s in enumerate(sequences) if live[row] and _guarded(s, fed, row, advance=True)]
        self._batch.join(prefill, going)
        self._arriving.remove(group)  # not before it has joined: until then `fail` must find it here
        self._active += [sequences[row] for row in going]

    def _step(self) -> None:
        started = time.perf_counter()
        size = len(self._active)
        wanted: set[Stream] = set()
        for sequence, length in zip(self._active, self._batch.lengths, strict=True):
            wanted |= sequence.wanted(length, length + 1)
            sequence.largest_batch = max(sequence.largest_batch, size)
        changes = _changes(self.model, self._active, [(length, length + 1) for length in self._batch.lengths])
        fed = self._batch.step([sequence.tokens[-1] for sequence in self._active], wanted, changes)
        self._keep([_guarded(sequence, fed, row, advance=True) for row, sequence in enumerate(self._active)])
        self.metrics.batch_size.labels(self.model.id).observe(size)
        self.metrics.step_seconds.labels(self.model.id).observe(time.perf_counter() - started)

    def _keep(self, stays: list[bool]) -> None:
        if not all(stays):
            rows = [row for row, stay in enumerate(stays) if stay]
            self._batch.keep(rows)
            self._active = [self._active[row] for row in rows]


class ReferenceLoop:
    """nnsight's own `generate`, one sequence at a time. One turn is one whole sequence."""

    def __init__(self, model: TracedModel, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        self.waiting: deque[Sequence] = deque()
        self._current: Sequence | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting."""
        return bool(self.waiting)

    def turn(self) -> None:
        """Generate the sequence that has waited longest."""
        sequence = self._current = self.waiting.popleft()
        if _dropped(sequence):
            return
        streams: Iterable[Stream] = sequence.wanted(0, 1 << 40)
        if sequence.limit == 0:
            length = len(sequence.prompt)
            changes = _changes(self.model, [sequence], [(0, length)])
            fed = Prefill(self.model, [sequence.prompt]).advance(length, sequence.tail, streams, changes)
            _guarded(sequence, fed, 0, advance=True)
            return
        changes = lasting_changes(self.model, sequence.acting, sequence.tail) if sequence.acting else []
        all_keys = bool(sequence.acting and sequence.acting.layers)
        generate(
            self.model,
            sequence.prompt,
            sequence.limit,
            sequence.tail,
            streams,
            self._take,
            changes,
            all_keys=all_keys,
        )

    def fail(self, error: SightlineError) -> None:
        """End the sequence that is under way with `error`."""
        if self._current and self._current.finish_reason is None:
            self._current.fail(error)

    def _take(self, fed: Fed) -> int | None:
        sequence = self._current
        assert sequence is not None
        if _dropped(sequence) or not _guarded(sequence, fed, 0, advance=True):
            return None
        self.metrics.batch_size.labels(self.model.id).observe(1)
        return sequence.tokens[-1]


def _changes(model: TracedModel, sequences: list[Sequence], spans: list[tuple[int, int]]) -> list[Change]:
    """What the interventions of the sequences change in a forward pass that feeds them these positions."""
    rows = [
        Row(one.acting, row, start, stop, one.tail)
        for row, (one, (start, stop)) in enumerate(zip(sequences, spans, strict=True))
        if one.acting is not None and one.finish_reason is None and stop > start
    ]
    return changes_for(model, rows) if rows else []


def _dropped(sequence: Sequence) -> bool:
    """End a sequence whose client has gone; whether it has ended."""
    if sequence.cancelled and sequence.finish_reason is None:
        sequence.drop()
    return sequence.finish_reason is not None


def _guarded(sequence: Sequence, fed: Fed, row: int, *, advance: bool) -> bool:
    """Let a sequence take its row; an error of its own ends it alone. Whether it goes on."""
    try:
        if not advance:
            sequence.observe(fed, row)
            return True
        return sequence.advance(fed, row) is not None
    except SightlineError as error:
        sequence.fail(error)
        return False
