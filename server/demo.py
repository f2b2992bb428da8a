"""`sightline demo`: the main job end to end, on the embedded model, against a real server.

1. Start the server as a user would, on a free port.
2. Send a puzzle through the OpenAI SDK, with savepoints.
3. Show the answer grid beside the right one, and the tensors that were on disk when it arrived.
4. Attribute one cell of the answer, and remove what was found (`server.commands.demo_attribution`).
5. Stop the server, and keep a picture of the run.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from attribution.errors import SightlineError
from puzzles import Puzzle, PuzzleError, gen_prompt, gen_puzzle, parse_grid
from server.commands.demo_attribution import explain
from server.commands.output import show, size
from server.settings import environment_without_settings

SAVEPOINTS = [
    {"name": "residual", "selector": "resid_post[*]"},
    {"name": "heads", "selector": "z[*]", "positions": "generated"},
    {"name": "pattern", "selector": "pattern[*]", "positions": "generated"},
    {"name": "last_mlp", "selector": "model.layers[3].mlp.output", "positions": "last"},
    {"name": "logits", "selector": "logits"},
]
_START_SECONDS = 180
_STYLES = {
    "K": "white on black",
    "B": "white on blue",
    "G": "black on green",
    "R": "white on red",
    "Y": "black on yellow",
}


def run(out: Path) -> None:
    """Run the demo; what it saves goes to `out`.

    Raises:
        SightlineError: the server did not start, or its answer is not a grid.
    """
    console = Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 120)
    out.mkdir(parents=True, exist_ok=True)
    puzzle = gen_puzzle("paint right", n=4, m=4, n_train=4, seed=63)
    prompt, _, _ = gen_prompt(puzzle)
    log = out / "server.log"
    console.print(f"[bold]1.[/] Starting the server on the embedded model (its log: {log})")
    with running_server(out / "activations", log) as (url, seconds):
        console.print(f"   {url}, ready after {seconds:.1f} s\n")
        console.print(f"[bold]2.[/] A puzzle in {len(puzzle.examples)} examples; the rule is not named. The first one:")
        show_grids(console, {"input": puzzle.examples[0][0], "output": puzzle.examples[0][1]})
        console.print("   and the grid to solve, sent through the OpenAI SDK with savepoints:")
        show_grids(console, {"input": puzzle.test_input})
        started = time.perf_counter()
        reply = ask(url, prompt)
        taken = time.perf_counter() - started
        console.print(f"[bold]3.[/] The answer after {taken:.2f} s ({reply.usage.completion_tokens} tokens):")
        _show_answer(console, puzzle, reply.choices[0].message.content)
        console.print("[bold]4.[/] On disk when the answer arrived:")
        _show_files(console, reply.activations_meta)
        run_id = reply.choices[0].message.run_id
        console.print()
        explain(console, url, run_id, reply.usage.prompt_tokens, puzzle, out)
    command = "sightline" if shutil.which("sightline") else os.path.relpath(Path(sys.executable).with_name("sightline"))
    console.save_svg(str(out / "demo.svg"), title="sightline demo", clear=False)
    console.print("\nThe server has stopped. Look closer with:")
    console.print(f"   {command} inspect {reply.activations_meta['residual']['file']}", soft_wrap=True)
    console.print(f"   {command} runs {run_id} --activations-dir {out / 'activations'}", soft_wrap=True)


def ask(url: str, prompt: str) -> Any:
    """The puzzle through the real OpenAI SDK."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none needed on loopback")
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        extra_body={"savepoints": SAVEPOINTS},
    )


@contextmanager
def running_server(activations: Path, log: Path) -> Iterator[tuple[str, float]]:
    """A server of our own on a free loopback port: its URL and the seconds that its start took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        "--port",
        str(port),
        "--activations-dir",
        str(activations),
        "--store-dir",
        str(activations.with_name("store")),
    ]
    url = f"http://127.0.0.1:{port}"
    environment = environment_without_settings()
    started = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    try:
        _wait(process, url, log)
        yield url, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    for _ in range(_START_SECONDS * 5):
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise SightlineError(f"the server stopped at its start: {lines[-1] if lines else 'no reason given'}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                if json.load(response)["loaded_models"]:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.2)
    raise SightlineError(f"the server did not answer within {_START_SECONDS} s; its log is {log}")


def _show_answer(console: Console, puzzle: Puzzle, text: str) -> None:
    try:
        answer = parse_grid(text)
    except PuzzleError as error:
        raise SightlineError(f"the model did not answer with a grid: {error}") from error
    show_grids(console, {"answer": answer, "right answer": puzzle.test_output})
    given = [cell for row in answer for cell in row]
    right = sum(a == b for a, b in zip(given, puzzle.answers, strict=False))
    console.print(f"   {right} of {len(puzzle.answers)} cells right; the rule is '{puzzle.relation}'\n")


def _show_files(console: Console, meta: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            name,
            one["selector"],
            one["shape"],
            one["dtype"],
            "{}:{}:{}".format(*one["positions"]),
            size(one["bytes"]),
        )
        for name, one in meta.items()
    ]
    show(("name", "selector", "shape", "dtype", "positions", "size"), rows, right=("size",), console=console)


def show_grids(console: Console, grids: dict[str, Any]) -> None:
    """Print grids side by side, under their names."""
    panels = []
    for title, grid in grids.items():
        text = Text()
        for number, row in enumerate(grid):
            text.append("\n" if number else "")
            for cell in row:
                text.append(f" {cell} ", style=_STYLES[cell])
        panels.append(Panel.fit(text, title=title))
    console.print(Columns(panels, padding=(0, 2)))
