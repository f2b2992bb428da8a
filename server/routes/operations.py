"""One route for each operation, made from its declaration, and what is stored.

Each, as `POST /attribution/{name}`, takes the operation's arguments and `model` (or `model_id`, the same) as an object,
in JSON or, with tensors, in an envelope. The work is done on the thread of the model, a long operation piece by piece,
so that chats go on between two pieces, and it ends when the client goes away.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE
from attribution.errors import InvalidArgument
from attribution.operation import CALLERS_OWN, Operation
from attribution.operations import OPERATIONS
from server.bodies import JSON_TYPE, read_arguments, wanted_type
from server.pieces import answer, pieces
from server.state import state_of

router = APIRouter()
_BINARY = {"type": "string", "format": "binary"}


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
    if operation.of_model:
        properties |= _named_model(operation)
    return schema | {"properties": properties, "additionalProperties": False}


_TWO_NAMES = ("features", "circuits")


def _named_model(operation: Operation) -> dict[str, Any]:
    """The property that names the model: `model`, which every route also takes as `model_id`."""
    text = "A loaded model; left out, the only one."
    one = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": text}
    both = operation.path.split("/")[0] in _TWO_NAMES
    return {"model": one} | ({"model_id": one | {"description": "The same as model."}} if both else {})


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
        name = model_name(arguments.pop("model", None), arguments.pop("model_id", None))
        checked = await checked_arguments(operation, arguments)
        loaded = state.registry.choose(name)
        loaded.worker.refuse_when_full()
        return await answer(request, pieces(loaded.worker, operation.start(loaded.session, checked)), kind)

    return handle


async def checked_arguments(operation: Operation, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation as a body has them, checked and converted.

    Raises:
        InvalidArgument: naming the one that is wrong.
    """
    for name in CALLERS_OWN:
        if name in arguments:
            raise InvalidArgument(f"{operation.name} has no argument {name!r} over HTTP; clients see to it", param=name)
    return await asyncio.to_thread(operation.validate, arguments)  # a dataset's prompts take a while


def model_name(model: Any, model_id: Any) -> str | None:
    """The model that a body names, as `model` or `model_id`; None when it names none.

    Raises:
        InvalidArgument: it is no text, or both are given and differ.
    """
    for param, given in (("model", model), ("model_id", model_id)):
        if given is not None and not isinstance(given, str):
            raise InvalidArgument(f"{param} is the name of a loaded model; found {str(given)[:80]!r}", param=param)
    if model is not None and model_id is not None and model != model_id:
        raise InvalidArgument(
            f"model is {model!r} and model_id is {model_id!r}; they mean the same thing, give one", param="model_id"
        )
    return model if model_id is None else model_id


def add_route(to: APIRouter, operation: Operation, handler: Callable[..., Awaitable[Response]]) -> None:
    """The route of an operation, described by its declaration."""
    content = {JSON_TYPE: {"schema": schema_of(operation)}, MEDIA_TYPE: {"schema": _BINARY}}
    answers = {JSON_TYPE: {}, MEDIA_TYPE: {"schema": _BINARY}, PROGRESS_TYPE: {"schema": _BINARY}}
    to.add_api_route(
        f"/{operation.path}",
        handler,
        methods=["POST"],
        name=operation.name,
        tags=[operation.path.split("/")[0]],
        summary=_summary(operation),
        description=inspect.getdoc(operation),
        response_model=None,
        responses={200: {"content": answers}},
        openapi_extra={"requestBody": {"content": content}},
    )


for _operation in OPERATIONS.values():
    if _operation.of_model:
        add_route(router, _operation, _handler(_operation))
