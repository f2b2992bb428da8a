"""Apps over a real socket, in a thread of the test's own process."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.settings import Settings
from tests.server.support import wait_until


@contextmanager
def over_socket(folder: Path, **settings: Any) -> Iterator[tuple[str, FastAPI]]:
    """A server that starts with no model; gives its URL and its app."""
    paths = {"store_dir": folder / "store", "activations_dir": folder / "runs"}
    app = create_app(Settings(no_model=True, **paths | settings))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports connections that tests break off
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join(30)
