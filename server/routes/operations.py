"""One route for each operation, made from its declaration, and what is stored.

Each, as `POST /attribution/{name}`, takes the operation's arguments and `model` as an object, in JSON or, with
tensors, in an envelope. The work is done on the thread of the model, a long operation piece by piece, so that chats go
on between two pieces, and it ends when the client goes away.
"""

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, pack
from attribution.errors import InvalidArgument, ShuttingDown, SightlineError
from attribution.operation import CALLERS_OWN, Operation, Progress, Steps
from attribution.operations import OPERATIONS
from server.bodies import JSON_TYPE, read_arguments, reply, unless_gone, wanted_type
from server.state import SERVER_FAILED, state_of
from server.worker import ModelWorker

router = APIRouter()
log = logging.getLogger("sightline.attribution")
_BINARY = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Outcome:
    """What an operation returned."""

    value: Any


async def held() -> AsyncIterator[ExitStack]:
    """What is to be done after an answer was sent, or could not be."""
    with ExitStack() as stack:
        yield stack


@router.get("/attribution", tags=["attribution"])
async def operations() -> dict[str, Any]:
    """The operations, each with its arguments as a JSON schema."""
    return {"operations": [_row(one) for one in OPERATIONS.values()]}


@router.get("/attribution/status", tags=["attribution"])
async def status(request: Request, model: str | None = None) -> dict[str, Any]:
    """Whether a model is loaded, which, and what is stored for it."""
    registry = state_of(request).registry
    nothing = model is None and not registry.loaded
    session = registry.empty_session() if nothing else registry.choose(model).session
    return await asyncio.to_thread(session.status)


def _row(operation: Operation) -> dict[str, Any]:
    return {
        "name": operation.name,
        "path": f"/{operation.path}",
        "summary": _summary(operation),
        "safe": operation.safe,
        "long": operation.long,
        "parameters": schema_of(operation),
    }


def schema_of(operation: Operation) -> dict[str, Any]:
    """The body of an operation's route as a JSON schema."""
    schema = _without_references(operation.params.model_json_schema())
    properties = {name: one for name, one in schema["properties"].items() if name not in CALLERS_OWN}
    text = "A loaded model; left out, the only one."
    properties["model"] = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": text}
    return schema | {"properties": properties, "additionalProperties": False}


def _without_references(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with each `{"$ref": "#/$defs/…"}` replaced by what it names.

    Inside `/openapi.json` such a path would be one of that document, in which nothing is found. A definition that
    names itself has no end here; no operation takes one.
    """
    definitions = schema.get("$defs", {})

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("$ref", "")
            return (
                plain(definitions[name.rsplit("/", 1)[1]]) if name else {key: plain(one) for key, one in value.items()}
            )
        return [plain(one) for one in value] if isinstance(value, list) else value

    return {key: plain(value) for key, value in schema.items() if key != "$defs"}


def _summary(operation: Operation) -> str:
    return " ".join((operation.__doc__ or "").split("\n\n")[0].split())


def _handler(operation: Operation) -> Callable[..., Awaitable[Response]]:
    async def handle(request: Request, stack: Annotated[ExitStack, Depends(held)]) -> Response:
        state, kind = state_of(request), wanted_type(request)
        arguments = await read_arguments(request, state.room, stack)
        name = _model_name(arguments.pop("model", None))
        _refuse_callers_own(operation, arguments)
        checked = await asyncio.to_thread(operation.validate, arguments)  # a dataset's prompts take a while
        loaded = state.registry.choose(name)
        loaded.worker.refuse_when_full()
        steps = operation.start(loaded.session, checked)
        stack.callback(_close, loaded.worker, steps)
        if kind == PROGRESS_TYPE:
            return StreamingResponse(_lines(loaded.worker, steps), media_type=PROGRESS_TYPE)
        return await reply(await unless_gone(request, _result(loaded.worker, steps)), kind)

    return handle


def _model_name(given: Any) -> str | None:
    if given is not None and not isinstance(given, str):
        raise InvalidArgument(f"model is the name of a loaded model; found {str(given)[:80]!r}", param="model")
    return given


def _refuse_callers_own(operation: Operation, arguments: dict[str, Any]) -> None:
    for name in CALLERS_OWN:
        if name in arguments:
            raise InvalidArgument(f"{operation.name} has no argument {name!r} over HTTP; clients see to it", param=name)


async def _advance(worker: ModelWorker, steps: Steps[Any]) -> Progress | Outcome:
    """One piece of the work, on the thread of the model."""

    def piece() -> Progress | Outcome:
        try:
            return next(steps)
        except StopIteration as end:
            return Outcome(end.value)

    return await asyncio.wrap_future(worker.submit(piece))


async def _result(worker: ModelWorker, steps: Steps[Any]) -> Any:
    while not isinstance(step := await _advance(worker, steps), Outcome):
        pass
    return step.value


async def _lines(worker: ModelWorker, steps: Steps[Any]) -> AsyncIterator[bytes | memoryview]:
    """A line for each piece of the work, then one that says how it ended, and after a good end the envelope."""
    try:
        while isinstance(step := await _advance(worker, steps), Progress):
            yield _line({"progress": {"done": step.done, "total": step.total}})
        packed = await asyncio.to_thread(pack, step.value)
    except SightlineError as error:
        yield _line(error.body())
        return
    except Exception:
        log.exception("an operation failed on the server")
        yield _line(SightlineError(SERVER_FAILED).body())
        return
    yield _line({"result": True})
    async for chunk in iterate_in_threadpool(packed):
        yield chunk


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _close(worker: ModelWorker, steps: Steps[Any]) -> None:
    """End work that its client did not wait for, where it was done: on the thread of the model."""
    if inspect.getgeneratorstate(steps) != inspect.GEN_CLOSED:
        with suppress(ShuttingDown):  # then the thread has ended, and the work with it
            worker.submit(steps.close)


def _add_routes() -> None:
    for name, operation in OPERATIONS.items():
        content = {JSON_TYPE: {"schema": schema_of(operation)}, MEDIA_TYPE: {"schema": _BINARY}}
        answers = {JSON_TYPE: {}, MEDIA_TYPE: {"schema": _BINARY}, PROGRESS_TYPE: {"schema": _BINARY}}
        router.add_api_route(
            f"/{operation.path}",
            _handler(operation),
            methods=["POST"],
            name=name,
            tags=[operation.path.split("/")[0]],
            summary=_summary(operation),
            description=inspect.getdoc(operation),
            response_model=None,
            responses={200: {"content": answers}},
            openapi_extra={"requestBody": {"content": content}},
        )


_add_routes()
