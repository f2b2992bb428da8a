"""The thread that owns one model.

The interventions of a trace are greenlets of one OS thread, so everything on a model runs on its own thread: the
load itself, generation, and the jobs that others submit. Between two turns of generation one job runs, and between two
jobs generation takes a turn, so neither waits for the other for long.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from attribution.errors import InvalidRequest, OutOfMemory, QueueFull, ShuttingDown, SightlineError
from attribution.model.traced import TracedModel
from server.generation.engine import Engine
from server.generation.sequence import Sequence
from server.metrics import Metrics

T = TypeVar("T")
log = logging.getLogger("sightline.worker")


class ModelWorker:
    """One model on one thread. Every public method may be called from any thread."""

    def __init__(
        self,
        name: str,
        load: Callable[[], TracedModel],
        engine: Callable[[TracedModel], Engine],
        max_queue: int,
        metrics: Metrics,
    ) -> None:
        self.name, self.max_queue, self._metrics = name, max_queue, metrics
        self.loaded: Future[TracedModel] = Future()
        self._load, self._make_engine = load, engine
        self._engine: Engine | None = None
        self._inbox: deque[Sequence] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"model-{name}", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """How many sequences wait for a place in the batch; those whose clients have gone do not count."""
        waiting = [*self._inbox, *(self._engine.waiting if self._engine else ())]
        return sum(not sequence.cancelled for sequence in waiting)

    @property
    def jobs_waiting(self) -> int:
        """How many jobs wait for the model."""
        return len(self._jobs)

    def refuse_when_full(self) -> None:
        """Refuse further work for as long as `max_queue` jobs wait; what has begun goes on.

        Raises:
            QueueFull: they do.
        """
        if self.jobs_waiting >= self.max_queue:
            raise QueueFull(f"{self.jobs_waiting} jobs wait for {self.name!r}, and no more than that may; try again")

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request, all or none.

        Raises:
            QueueFull: when they do not fit the waiting line.
            InvalidRequest: when they never could.
            ShuttingDown: when the model is being unloaded.
        """
        with self._changed:
            self._refuse_when_stopping()
            if len(sequences) > self.max_queue:
                raise InvalidRequest(
                    f"the request asks for {len(sequences)} completions and the queue holds {self.max_queue}; "
                    "ask for fewer at once, or start the server with a larger --max-queue"
                )
            if self.queue_length + len(sequences) > self.max_queue:
                raise QueueFull(
                    f"{self.queue_length} wait for {self.name!r} and the queue holds {self.max_queue}; try again"
                )
            self._inbox.extend(sequences)
            self._changed.notify()

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Run `job` on the model's thread."""
        future: Future[T] = Future()
        with self._changed:
            self._refuse_when_stopping()
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """End the thread after its current piece of work; what waits or is under way fails with `ShuttingDown`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise ShuttingDown(f"the model {self.name!r} is being unloaded")

    def _run(self) -> None:
        try:
            model = self._load()
            self._engine = self._make_engine(model)
        except BaseException as error:  # the caller of `loaded` gets it, whatever it is
            self._stopping = True
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(model)
        del model
        while self._wait():
            self._run_job()
            self._take_turn()
        self._end()

    def _wait(self) -> bool:
        engine = self._engine
        assert engine is not None
        with self._changed:
            while not (self._stopping or self._inbox or self._jobs or engine.busy):
                self._changed.wait()
            engine.waiting.extend(self._inbox)
            self._inbox.clear()
        for sequence in [sequence for sequence in engine.waiting if sequence.cancelled]:
            engine.waiting.remove(sequence)
            sequence.drop()
        return not self._stopping

    def _run_job(self) -> None:
        with self._changed:
            job, future = self._jobs.popleft() if self._jobs else (None, None)
        if job is None or future is None or not future.set_running_or_notify_cancel():
            return
        failure: BaseException
        try:
            future.set_result(job())
            return
        except (torch.OutOfMemoryError, MemoryError) as error:
            log.exception("a job ran out of memory", extra={"model": self.name})
            failure = OutOfMemory(f"{self.name!r} ran out of memory: {error}; ask for less at once, or try again later")
        except BaseException as error:
            failure = error
        if isinstance(failure, OutOfMemory) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # here, where the frames that held the tensors are gone
        future.set_exception(failure)

    def _take_turn(self) -> None:
        engine = self._engine
        assert engine is not None
        if not engine.busy:
            return
        try:
            engine.turn()
        except torch.OutOfMemoryError as error:
            log.exception("a step of generation ran out of memory", extra={"model": self.name})
            engine.fail(OutOfMemory(f"{self.name!r} ran out of memory: {error}; ask for less, or lower --max-batch"))
            torch.cuda.empty_cache()
        except Exception as error:
            log.exception("a step of generation failed", extra={"model": self.name})
            engine.fail(SightlineError(f"generation failed on the server: {type(error).__name__}: {error}"))
        self._metrics.queue_length.labels(self.name).set(self.queue_length)

    def _end(self) -> None:
        gone = ShuttingDown(f"the model {self.name!r} was unloaded")
        engine = self._engine
        assert engine is not None
        engine.fail(gone)
        with self._changed:
            waiting = [*engine.waiting, *self._inbox]
            jobs = list(self._jobs)
        for sequence in waiting:
            sequence.fail(gone)
        for _, future in jobs:
            if future.set_running_or_notify_cancel():  # those whose clients left are not waited for
                future.set_exception(gone)
        self._engine = None
