"""Bodies with tensors: what a request brings, in which form its answer is wanted, and the bound of all of them."""

import asyncio
import json
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from attribution.envelope import MAX_HEADER_BYTES, MEDIA_TYPE, PROGRESS_TYPE, Unpacker, pack, to_json
from attribution.errors import Cancelled, InvalidRequest, QueueFull
from attribution.operations import OPERATIONS

T = TypeVar("T")

JSON_TYPE = "application/json"
_PATHS = frozenset(operation.path for operation in OPERATIONS.values())
_ON_THE_LOOP_BYTES = 64 * 1024  # what is parsed in less than a millisecond


class TensorRoom:
    """How many bytes the tensors of all requests under way may have together. Used from the event loop only."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """While this is open, `count` bytes are in use.

        Raises:
            QueueFull: others have so many that these do not fit beside them.
        """
        if self.used + count > self.size:
            raise QueueFull(f"requests under way hold {self.used:,} of {self.size:,} bytes for tensors; try again")
        self.used += count
        try:
            yield
        finally:
            self.used -= count


def longest_body(scope: Any, json_bytes: int, tensor_bytes: int) -> int:
    """The bound of a request's body: more for tensors, on the routes that take them."""
    kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    takes_tensors = scope["path"].removeprefix("/") in _PATHS and _plain(kind) == MEDIA_TYPE
    return tensor_bytes + MAX_HEADER_BYTES if takes_tensors else json_bytes


async def read_arguments(request: Request, room: TensorRoom, stack: ExitStack) -> dict[str, Any]:
    """The object in a request's body, of JSON or an envelope; `stack` gives back the room that its tensors take.

    Raises:
        InvalidRequest, BadEnvelope, EnvelopeTooLarge: the body is something else.
        QueueFull: there is no room for its tensors now.
        Cancelled: the client went away.
    """
    kind = _plain(request.headers.get("content-type", ""))
    try:
        value = await (_envelope(request, room, stack) if kind == MEDIA_TYPE else _json(request, kind))
    except ClientDisconnect as error:
        raise Cancelled("the client closed the connection") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is a {type(value).__name__}; an object with the arguments is expected")
    return value


def wanted_type(request: Request) -> str:
    """The media type of the answer: the first that `Accept` names of those there are, or that of the request's body."""
    kinds = (JSON_TYPE, MEDIA_TYPE, PROGRESS_TYPE)
    named = [_plain(one) for one in request.headers.get("accept", "").split(",")]
    of_body = _plain(request.headers.get("content-type", ""))
    return next((one for one in (*named, of_body) if one in kinds), JSON_TYPE)


async def reply(value: Any, kind: str) -> Response:
    """The result of an operation as an answer of this media type."""
    if kind == JSON_TYPE:
        return Response(await asyncio.to_thread(to_json, value), media_type=JSON_TYPE)
    packed = await asyncio.to_thread(pack, value)
    # Starlette takes each chunk in a thread, as copying from a GPU takes its time
    return StreamingResponse(packed, media_type=MEDIA_TYPE, headers={"Content-Length": str(packed.length)})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is dropped when the client closes the connection; its body must have been read.

    Raises:
        Cancelled: the client did.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Cancelled("the client closed the connection")
        return done.result()
    finally:
        done.cancel()
        gone.cancel()


async def _envelope(request: Request, room: TensorRoom, stack: ExitStack) -> Any:
    announced = request.headers.get("content-length", "")
    unpacker = Unpacker(room.size, int(announced) if announced.isdigit() else None)
    async for chunk in request.stream():
        if unpacker.total is not None:
            unpacker.feed(chunk)
            continue
        await asyncio.to_thread(unpacker.feed, chunk)  # a long header takes a while to check
        if unpacker.total is not None:
            stack.enter_context(room.taken(unpacker.total))
    return await asyncio.to_thread(unpacker.finish)


async def _json(request: Request, kind: str) -> Any:
    body = await request.body()
    if not body:
        return {}
    if kind != JSON_TYPE:
        raise InvalidRequest(f"a body of type {kind or 'none'!r} is not read; send it as {JSON_TYPE} or {MEDIA_TYPE}")
    try:
        if len(body) < _ON_THE_LOOP_BYTES:
            return json.loads(body)
        return await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def _plain(media_type: str) -> str:
    """A media type without its parameters."""
    return media_type.partition(";")[0].strip().lower()
