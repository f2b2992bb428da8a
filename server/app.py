"""The app factory: everything is made here and handed down, nothing is global."""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import attribution.model  # noqa: F401  imports what must come before nnsight
from attribution.errors import InvalidRequest, NotFound, SightlineError, Unauthorized
from attribution.model.load import LoadSpec
from server.bodies import TensorRoom, longest_body
from server.logs import request_id
from server.metrics import Metrics
from server.registry import EMBEDDED, ModelRegistry
from server.routes import compare, features, health, models, openai, operations, runs, steering
from server.runs import RunStore
from server.settings import Settings
from server.state import SERVER_FAILED, State

OPEN_PATHS = frozenset({"/health"})
log = logging.getLogger("sightline.http")
_SWEEP_SECONDS = 60
_LONG_BODY_BYTES = 64 * 1024
_MAX_BODY_BYTES = 32 * 1024**2  # several times the longest prompt that is taken


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI app. Its models load when it starts, and unload when it stops."""
    metrics = Metrics()
    ttl = settings.activations_ttl
    store = RunStore(
        settings.activations_dir,
        None if settings.activations_max_bytes is None else int(settings.activations_max_bytes),
        None if ttl is None else ttl.total_seconds(),
    )
    store.remove_unfinished()
    room = TensorRoom(int(settings.max_tensor_bytes))
    state = State(settings, metrics, ModelRegistry(settings, metrics), store, room)
    app = FastAPI(title="Sightline", version=version("sightline"), lifespan=_lifespan)
    app.state.sightline = state
    for routes in (health, openai, models, runs, steering, features, operations, compare):
        app.include_router(routes.router)
    app.add_exception_handler(SightlineError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_middleware(Gate, state=state)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State = app.state.sightline
    settings = state.settings
    if not settings.no_model:
        spec = LoadSpec(
            model_id=settings.model or EMBEDDED,
            device_map=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        await state.registry.load(spec)
    sweeper = asyncio.create_task(_sweep(state.runs))
    yield
    sweeper.cancel()
    await state.registry.close()


async def _sweep(store: RunStore) -> None:
    """Delete the runs that have grown too old, also while nothing is written."""
    while True:
        try:
            await asyncio.to_thread(store.retain)
        except SightlineError as error:
            log.error("old runs could not be deleted", extra={"reason": error.message})
        await asyncio.sleep(_SWEEP_SECONDS)


class _Exchange:
    """One request and its answer: bounds what is read, and puts the id on what is sent.

    An answer to a long body that was not read to its end closes the connection, so that the rest is not read either.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, longest: int) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.status: int | None = None
        self._receive, self._send, self._read, self._longest = receive, send, 0, longest
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        is_long = not announced.isdigit() or int(announced) > _LONG_BODY_BYTES
        self._unread = is_long or b"transfer-encoding" in headers

    async def receive(self) -> Message:
        """The next part of the request."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._longest:
            raise HTTPException(413, f"the body has more than {self._longest:,} bytes")
        self._unread = self._unread and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send the next part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers.append((b"x-request-id", self.id.encode()))
            if self._unread:
                headers.append((b"connection", b"close"))
        await self._send(message)


class Gate:
    """Around every request: its id, the key, the bound of its body, one line of log, the metrics."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        longest = longest_body(scope, _MAX_BODY_BYTES, self.state.room.size)
        exchange, started = _Exchange(scope, receive, send, longest), time.perf_counter()
        token = request_id.set(exchange.id)
        try:
            if scope["path"] in OPEN_PATHS or self._has_key(scope):
                await self.app(scope, exchange.receive, exchange.send)
            else:
                error = Unauthorized("this server asks for its key: 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'")
                await _reply(error)(scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("a request failed on the server")
            if exchange.status is not None:
                raise  # the connection breaks off, which its client cannot take for the end of an answer
            error = SightlineError(SERVER_FAILED)
            await _reply(error)(scope, exchange.receive, exchange.send)
        finally:
            self._note(scope, exchange.status or 500, time.perf_counter() - started)
            request_id.reset(token)

    def _has_key(self, scope: Scope) -> bool:
        key = self.state.settings.api_key
        if key is None:
            return True
        headers = dict(scope["headers"])
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = headers.get(b"x-api-key") or (bearer if scheme.lower() == b"bearer" else b"")
        return secrets.compare_digest(given, key.get_secret_value().encode())

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.state.metrics.requests_total.labels(route, scope["method"], str(status)).inc()
        self.state.metrics.request_seconds.labels(route).observe(seconds)
        extra = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1000, 1),
        }
        log.info("request", extra=extra)


def _reply(error: SightlineError) -> JSONResponse:
    retry = getattr(error, "retry_after", None)
    headers = {} if retry is None else {"Retry-After": str(retry)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SightlineError)
    return _reply(error)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong with a body, in words."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return _reply(InvalidRequest(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"))
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "extra_forbidden":
        return _reply(InvalidRequest(f"unknown field {where!r}", param=where))
    if isinstance(first.get("input"), bytes):
        return _reply(InvalidRequest("the body was not read as JSON; send it with 'Content-Type: application/json'"))
    found = "" if first["type"] == "missing" else f"; found {str(first.get('input'))[:80]!r}"
    reason = first["msg"].removeprefix("Value error, ")
    return _reply(InvalidRequest(f"{where or 'the body'}: {reason}{found}", param=where or None))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _reply(NotFound(f"there is no {request.method} {request.url.path}; GET /docs lists what there is"))
    body = InvalidRequest(f"{request.method} {request.url.path}: {error.detail}").body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
