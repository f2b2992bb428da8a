"""`sightline demo --features`: what the features of the embedded model say of an answer, and what clamping one does.

1. Start the server as a user would, and send a puzzle through the OpenAI SDK; the stream is recorded.
2. Ask which features are strongest on each token of the answer (`POST /features/topk`), by what was recorded.
3. Clamp the feature of a colour at one cell of the test grid, in chat, with the baseline beside it, and hold the answer
   against the rule: what it gives when that cell has this colour.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from attribution.errors import SightlineError
from clients import ModelClient
from puzzles import COLOURS, Puzzle, PuzzleError, apply_relation, demo_model_path, gen_prompt, gen_puzzle, parse_grid
from puzzles.puzzle import Grid, to_letters
from server.commands.output import show
from server.demo import running_server, show_grids

SOURCE = "2-resid_post"
PUZZLE = {"relations": "shift right", "n": 4, "m": 4, "n_train": 4, "seed": 5}
CELL = (2, 2)
"""Row and column of the cell of the test grid that is clamped."""
SAVEPOINTS = [{"name": "stream", "selector": "resid_post[2]"}]
_SHOWN, _TOKENS = 2, 10
"""Features of a token, and tokens of the answer, that are shown."""


@dataclass(frozen=True)
class Colour:
    """The feature of a colour, and the value at which clamping it was measured for the card."""

    index: int
    letter: str
    value: float


def run(out: Path) -> None:
    """Run the demo; what it saves goes to `out`.

    Raises:
        SightlineError: the server did not start, or an answer is not a grid.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    out.mkdir(parents=True, exist_ok=True)
    puzzle = gen_puzzle(**PUZZLE)
    log = out / "server.log"
    console.print(f"[bold]1.[/] Starting the server on the embedded model (its log: {log})")
    with running_server(out / "activations", log) as (url, seconds):
        console.print(f"   {url}, ready after {seconds:.1f} s. A puzzle (its rule: '{puzzle.relation}'):")
        reply = _ask(url, puzzle, savepoints=SAVEPOINTS)
        answer = _grid(reply.choices[0].message.content)
        show_grids(console, {"test grid": puzzle.test_input, "answer": answer})
        with ModelClient(url) as client:
            run_id = reply.choices[0].message.run_id
            console.print(f"[bold]2.[/] The strongest features of {SOURCE} on the first tokens of the answer:")
            found = client.features_topk(run_id=run_id, source=SOURCE, k=_SHOWN)
            prompt_tokens = reply.usage.prompt_tokens
            answered = [one for one in found["tokens"] if one["position"] >= prompt_tokens]
            _show_features(console, answered[:_TOKENS])
            position = _position(found["tokens"][:prompt_tokens], puzzle)
        _clamp(console, url, puzzle, position, answer)
    console.print("\nThe server has stopped. docs/features.md says how to do this with your own model.")


def colour_feature() -> Colour:
    """The feature whose clamping works best, by the figures of the card."""
    figures = json.loads((demo_model_path().with_name("demo_features") / "figures.json").read_text())
    best = figures["clamps"][0]
    return Colour(best["index"], best["colour"], float(best["value"]))


def _ask(url: str, puzzle: Puzzle, **extra: Any) -> Any:
    """The puzzle through the OpenAI SDK."""
    from openai import OpenAI

    prompt, _, _ = gen_prompt(puzzle)
    client = OpenAI(base_url=f"{url}/v1", api_key="none needed on loopback")
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, extra_body=extra)


def _grid(text: str) -> list[list[str]]:
    try:
        return parse_grid(text)
    except PuzzleError as error:
        raise SightlineError(f"the model did not answer with a grid: {error}") from error


def _show_features(console: Console, tokens: Sequence[dict[str, Any]]) -> None:
    rows = []
    for one in tokens:
        named = [
            f"{feature['index']} at {feature['activation']:.0f}: {feature['description'] or 'not described'}"
            for feature in one["features"]
        ]
        rows += [
            (one["position"] if not place else "", repr(one["token"]) if not place else "", text)
            for place, text in enumerate(named)
        ]
    headers = ("position", "token", "feature, activation, description")
    show(headers, rows, right=("position",), console=console if console.is_terminal else None)


def _position(prompt: Sequence[dict[str, Any]], puzzle: Puzzle) -> int:
    """Where the cell that is clamped stands: the test grid is the last one of the prompt."""
    rows, columns = puzzle.shape
    cells = [one["position"] for one in prompt if one["token"] in {f" {colour}" for colour in COLOURS}]
    return cells[-rows * columns :][CELL[0] * columns + CELL[1]]


def _clamp(console: Console, url: str, puzzle: Puzzle, position: int, answer: list[list[str]]) -> None:
    one, (row, column) = colour_feature(), CELL
    body = {"type": "feature", "source": SOURCE, "index": one.index, "operation": "clamp", "value": one.value}
    console.print(
        f"\n[bold]3.[/] Feature {one.index} fires on cells of the colour '{one.letter}'. It is clamped at "
        f"{one.value:g}, at position {position} alone: row {row + 1},\n   column {column + 1} of the test grid, "
        f"which is '{puzzle.test_input[row][column]}'. The same chat without and with it:"
    )
    reply = _ask(
        url,
        puzzle,
        interventions=[body | {"positions": {"start": position, "stop": position + 1}}],
        baseline=True,
    )
    choice = reply.choices[0]
    baseline, clamped = _grid(choice.baseline["text"]), _grid(choice.message.content)
    expected = [list(cells) for cells in with_colour(puzzle, one.letter)]
    show_grids(console, {"without": baseline, "clamped": clamped, f"the rule, were it '{one.letter}'": expected})
    same = sum(a == b for x, y in zip(clamped, expected, strict=False) for a, b in zip(x, y, strict=False))
    changed = sum(a != b for x, y in zip(clamped, baseline, strict=False) for a, b in zip(x, y, strict=False))
    console.print(
        f"   {changed} of {len(puzzle.answers)} cells changed by the clamp; {same} of {len(puzzle.answers)} are now "
        "what the rule says"
    )
    if baseline != answer:
        raise SightlineError("without the clamp the answer is another one than before; they should be the same")
    console.print(f"   The receipt: {json.dumps(choice.message.interventions[0])}", soft_wrap=True)


def with_colour(puzzle: Puzzle, letter: str) -> Grid:
    """The right answer if the cell that is clamped had this colour."""
    grid = np.array([[COLOURS.index(cell) for cell in cells] for cells in puzzle.test_input])
    grid[CELL] = COLOURS.index(letter)
    return to_letters(apply_relation(puzzle.relation, grid))
