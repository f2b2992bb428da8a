"""Work that is done piece by piece on the threads of models, and the answer that says how far it is.

Between two pieces others use the model; when the client goes away the work ends.
"""

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from attribution.envelope import PROGRESS_TYPE, pack
from attribution.errors import ShuttingDown, SightlineError
from attribution.operation import Progress, Steps
from server.bodies import reply, unless_gone
from server.state import SERVER_FAILED
from server.worker import ModelWorker

log = logging.getLogger("sightline.attribution")


@dataclass(frozen=True)
class Outcome:
    """What an operation returned."""

    value: Any


Pieces = AsyncGenerator[Progress | Outcome, None]
"""How far the work is, after each piece, and last its outcome."""


async def pieces(worker: ModelWorker, steps: Steps[Any]) -> Pieces:
    """Take the steps of an operation on the thread of its model, where it is also ended when nobody waits for it."""
    try:
        while not isinstance(step := await _advance(worker, steps), Outcome):
            yield step
        yield step
    finally:
        if inspect.getgeneratorstate(steps) != inspect.GEN_CLOSED:
            with suppress(ShuttingDown):  # then the thread has ended, and the work with it
                worker.submit(steps.close)


async def answer(request: Request, work: Pieces, kind: str) -> Response:
    """The answer of this media type to a request whose body has been read."""
    if kind == PROGRESS_TYPE:
        return StreamingResponse(_lines(work), media_type=PROGRESS_TYPE)
    return await reply(await unless_gone(request, _result(work)), kind)


async def _advance(worker: ModelWorker, steps: Steps[Any]) -> Progress | Outcome:
    def piece() -> Progress | Outcome:
        try:
            return next(steps)
        except StopIteration as end:
            return Outcome(end.value)

    return await asyncio.wrap_future(worker.submit(piece))


async def _result(work: Pieces) -> Any:
    async with aclosing(work):
        async for step in work:
            if isinstance(step, Outcome):
                return step.value
    raise AssertionError("the work ended without an outcome")


async def _lines(work: Pieces) -> AsyncIterator[bytes | memoryview]:
    """A line for each piece of the work, then one that says how it ended, and after a good end the envelope."""
    packed = None
    try:
        async with aclosing(work):
            async for step in work:
                if isinstance(step, Progress):
                    yield _line({"progress": {"done": step.done, "total": step.total}})
                else:
                    packed = await asyncio.to_thread(pack, step.value)
    except SightlineError as error:
        yield _line(error.body())
        return
    except Exception:
        log.exception("an operation failed on the server")
        yield _line(SightlineError(SERVER_FAILED).body())
        return
    assert packed is not None
    yield _line({"result": True})
    async for chunk in iterate_in_threadpool(packed):
        yield chunk


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
