"""A client of a fake server."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients import ModelClient
from tests.clients.fakes import Reply, Server


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ModelClient, Server]]:
    """Make a client of a fake server; pauses are noted, not waited for."""

    def make(*replies: Reply, **options: Any) -> tuple[ModelClient, Server]:
        server = Server(*replies)
        monkeypatch.setattr(time, "sleep", server.pauses.append)
        http = httpx.Client(transport=httpx.MockTransport(server))
        return ModelClient(http_client=http, **options), server

    return make
