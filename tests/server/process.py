"""A server in a process of its own, on a free loopback port."""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

KEY = "socket-key"


@dataclass(frozen=True)
class Process:
    """A running server, where it is, what it serves, and where it writes."""

    process: subprocess.Popen[str]
    url: str
    model: str
    runs: Path
    log: Path

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        connection.request("GET", path, headers={"X-Api-Key": KEY})
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def steps(self) -> float:
        """How many steps the model has taken."""
        found = re.search(r"sightline_step_seconds_count\{.*\} (\S+)", self.get("/metrics"))
        return float(found[1]) if found else 0.0

    def idle(self) -> bool:
        before = self.steps()
        time.sleep(0.2)
        return self.steps() == before

    def requests(self) -> list[dict[str, Any]]:
        """The lines of the log about requests."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["message"] == "request"]


def start(folder: Path, model: str) -> Process:
    """A server of `model` that writes below `folder`; the caller stops it."""
    options = {
        "port": 0,
        "activations-dir": folder / "runs",
        "store-dir": folder / "store",
        "log-file": folder / "log",
        "log-format": "json",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", model, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"SIGHTLINE_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    timer = threading.Timer(120, process.kill)
    timer.start()
    url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    timer.cancel()
    assert url, "the server did not start"
    return Process(process, url[0], model, folder / "runs", folder / "log")
