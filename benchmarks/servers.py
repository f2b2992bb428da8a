"""Servers under test: started as a user starts them, on a free loopback port, stopped by their own process id."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2
from openai import DefaultHttpxClient, OpenAI


@dataclass(frozen=True)
class Server:
    """A running server: its client, the name of its model, and the fields that only it takes."""

    name: str
    client: OpenAI
    model: str
    extra: dict[str, object]

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self.client.base_url).removesuffix("/v1/")


@contextmanager
def sightline(model: Path, activations: Path, *options: str) -> Iterator[Server]:
    """`sightline serve`."""
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        str(model),
        "--activations-dir",
        str(activations),
        *options,
    ]
    with _process("sightline", command, str(model), {"ignore_eos": True}, "/health") as server:
        yield server


@contextmanager
def transformers_serve(model: Path, *options: str) -> Iterator[Server]:
    """`transformers serve`, plain or with continuous batching."""
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model), *options]
    name = "transformers serve" + (", continuous batching" if "--continuous-batching" in options else "")
    with _process(name, command, str(model), {}, "/health") as server:
        yield server


@contextmanager
def _process(name: str, command: list[str], model: str, extra: dict[str, object], health: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url + health, log)
            yield Server(name, _client(url), model, extra)
        finally:
            process.terminate()
            process.wait()


def _client(url: str) -> OpenAI:
    """A client that retries nothing, and drops idle connections before any server does."""
    http = DefaultHttpxClient(limits=httpx2.Limits(keepalive_expiry=2), timeout=600)
    return OpenAI(base_url=url + "/v1", api_key="x", max_retries=0, http_client=http)


def _wait(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the server stopped at once: {log.read().decode()[-2000:]}")
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"no answer from {url}")
