"""`sightline serve`: its options are the fields of `Settings`, one for one."""

import inspect
import json
import logging
import os
import shlex
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic.fields import FieldInfo

from attribution.errors import SightlineError
from server import logs
from server.settings import Settings, bound_spinning, load_settings, refuse_open_host, show_value

if TYPE_CHECKING:
    from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 75  # clients keep idle connections, and one closed under a request is an error for them
GRACE_SECONDS = 8  # less than the ten seconds after which containers are killed


def serve(**given: Any) -> None:
    """Serve a model over HTTP. Each option is also a variable SIGHTLINE_… and a key of sightline.toml."""
    settings = load_settings(**{name: value for name, value in given.items() if value is not None})
    refuse_open_host(settings)
    bound_spinning()
    logs.configure(settings)
    with _bind(settings.host, settings.port) as listener:
        if sys.stderr.isatty():
            typer.echo("Sightline is starting…", err=True)
        from server.app import create_app

        _run(create_app(settings), listener, greeting(settings, listener.getsockname()[1]))


def greeting(settings: Settings, port: int) -> str:
    """The line that a started server prints: where it is, what it serves, what to try."""
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host.strip("[]")
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = "" if settings.api_key is None else '-H "Authorization: Bearer $SIGHTLINE_API_KEY" '
    post = f"curl {key}-H 'Content-Type: application/json' {url}"
    if settings.no_model:
        body = shlex.quote(json.dumps({"model_id": "demo"}))
        return f"Sightline is at {url} with no model. Load one: {post}/models/load -d {body}"
    model = settings.model or "demo"
    body = shlex.quote(json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]}))
    return f"Sightline serves {model} at {url}/v1. Try: {post}/v1/chat/completions -d {body}"


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, taken before a model is loaded: a port in use is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = f"; --port {port + 1} or --port 0 takes another" if "in use" in str(error) else ""
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}{hint}") from error
    return listener


def _run(app: "FastAPI", listener: socket.socket, line: str) -> None:
    """Serve until a signal comes; a start that fails raises its own reason."""
    import uvicorn

    failures: list[Exception] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            if scope["type"] == "lifespan":
                failures.append(error)
            raise

    class Server(uvicorn.Server):
        """Says when it can be used, or why it cannot, and can be stopped while a model loads."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit:
                raise failures[0] if failures else SightlineError("the server did not start") from None
            logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
            typer.echo(line)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.started:
                # The thread that loads cannot be interrupted, and unwinding around it aborts in native code.
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    # Until the start is over, uvicorn would log the traceback of what is told in one line.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        watched,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # a signal: the server has stopped in good order


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field of the settings as an option; None means that it was not given."""
    default = "" if field.annotation is bool else show_value(field.default)
    text = f"{field.description} (default {default})" if default else field.description
    flag = f"--{name.replace('_', '-')}"
    if name == "model":
        declared: Any = Annotated[str | None, typer.Argument(help=text, show_default=False)]
    elif field.annotation is bool:
        declared = Annotated[bool | None, typer.Option(flag, help=text, show_default=False)]
    else:
        metavar = "N" if field.annotation is int else "VALUE"
        declared = Annotated[str | None, typer.Option(flag, help=text, metavar=metavar, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=declared)


_parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
serve.__signature__ = inspect.Signature(_parameters)  # pyright: ignore[reportFunctionMemberAccess]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}
