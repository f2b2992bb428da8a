"""A server that is a fake: it answers what it was told, and keeps the requests."""

import json
from typing import Any

import httpx

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, pack, unpack
from attribution.errors import SightlineError

Reply = httpx.Response | Exception


class Server:
    """A fake: gives the answers it was told, the last one again and again, and keeps the requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.requests, self.pauses = list(replies), list[httpx.Request](), list[float]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        # a fresh one, as a response is read once
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)

    def sent(self) -> dict[str, Any]:
        """The last body."""
        body = self.requests[-1].content
        return unpack(body) if self.requests[-1].headers["content-type"] == MEDIA_TYPE else json.loads(body)


def tensors(value: Any, **headers: str) -> httpx.Response:
    return httpx.Response(200, content=b"".join(pack(value)), headers={"content-type": MEDIA_TYPE} | headers)


def refused(error: SightlineError, **headers: str) -> httpx.Response:
    return httpx.Response(error.status, json=error.body(), headers={k.replace("_", "-"): v for k, v in headers.items()})


def stream(*said: dict[str, Any], rest: bytes = b"") -> httpx.Response:
    text = b"".join(json.dumps(line).encode() + b"\n" for line in said)
    return httpx.Response(200, content=text + rest, headers={"content-type": PROGRESS_TYPE})


OK = tensors({"sample_ids": [], "count": 0})
RESET = httpx.ReadError("reset by peer")
REFUSED = httpx.ConnectError("[Errno 111] Connection refused")
