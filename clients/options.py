"""What both clients are made of, and what they make of arguments and results."""

import ipaddress
from collections.abc import Mapping
from typing import Any

import httpx
import torch
from torch import Tensor

from attribution.errors import InvalidArgument, ModelAmbiguous, ModelNotFound
from attribution.operation import CALLERS_OWN, Operation
from attribution.operations.devices import on_device
from attribution.session import NONE_LOADED

CONNECT_SECONDS = 10.0


def checked_url(url: str) -> str:
    """The URL of a server, without a slash at its end.

    Raises:
        InvalidArgument: it is none of http or https.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InvalidArgument(f"url is like http://localhost:8000; found {url!r} ({error})", param="url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidArgument(f"url is like http://localhost:8000; found {url!r}", param="url")
    return url.rstrip("/")


def http_options(url: str, timeout: float | None) -> dict[str, Any]:
    """How to make an HTTP client: no bound on waiting unless one is given, no proxy to this machine itself."""
    return {"timeout": httpx.Timeout(timeout, connect=CONNECT_SECONDS), "trust_env": not _is_here(httpx.URL(url).host)}


def key_headers(api_key: str | None) -> dict[str, str]:
    """The header that carries the key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def check(operation: Operation[..., Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is to be sent, of that which the caller gave, and the arguments that concern this process.

    Raises:
        InvalidArgument: as the operation itself refuses it, or the device cannot be used.
    """
    checked = operation.validate(arguments)
    own = {name: checked[name] for name in CALLERS_OWN if name in checked}
    on_device(torch.empty(0), own.get("device", "cpu"))
    return {name: checked[name] for name in arguments if name not in CALLERS_OWN}, own


def moved(value: Any, device: str) -> Any:
    """A result with its tensors on `device`."""
    if isinstance(value, Tensor):
        return on_device(value, device)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, list | tuple) else value


def load_body(path: str, device: str, quantization: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /models/load`."""
    given = {} if quantization is None else {"quantization": quantization}
    return {"model_id": path, "device_map": device} | given | dict(options)


def only_model(loaded: list[str]) -> str:
    """The one model that a server has loaded.

    Raises:
        ModelNotFound: it has none.
        ModelAmbiguous: it has several.
    """
    if not loaded:
        raise ModelNotFound(NONE_LOADED, param="model")
    if len(loaded) > 1:
        raise ModelAmbiguous(f"several models are loaded, and none was named: {', '.join(loaded)}", param="model")
    return loaded[0]


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
