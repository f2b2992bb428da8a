"""The second half of `sightline demo`: which heads and MLPs wrote one cell of the answer, and what removing them does.

1. The recorded chat becomes a stored sample, and the gradient of the cell's log-probability is taken at the final
   stream.
2. Residual attribution gives a score to every head and MLP; a heat map is drawn.
3. The five highest heads are set to zero, and, to compare, five heads drawn at random, again and again.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rich.console import Console
from torch import Tensor

from attribution.errors import SightlineError
from attribution.plots import head_map
from clients import ModelClient
from puzzles import COLOURS, Puzzle
from server.commands.output import show

REMOVED, DRAWS = 5, 100
DATASET = "demo"

Heads = list[tuple[int, int]]


class Scored(TypedDict):
    """The arguments by which operations know the cell."""

    pos_ids: list[int]
    labels: list[int]
    candidate_ids: list[int]


@dataclass(frozen=True)
class Cell:
    """One cell of the answer: its place in the grid, the token that predicts it, its colour and the five candidates."""

    row: int
    column: int
    letter: str
    query: int
    label: int
    candidates: list[int]

    @property
    def scored(self) -> Scored:
        """Its place and colour, as operations take them."""
        return {"pos_ids": [self.query], "labels": [self.label], "candidate_ids": self.candidates}


def explain(console: Console, url: str, run_id: str, prompt_tokens: int, puzzle: Puzzle, out: Path) -> None:
    """Attribute a cell of the recorded answer and print what was found; the picture goes to `out`/heads.png."""
    with ModelClient(url) as client:
        stored = client.forward(DATASET, run_id, run_id=run_id)
        cell = _changed_cell(puzzle, stored["tokens"], stored["token_ids"], prompt_tokens)
        layers = client.status()["n_layers"]
        report = client.node_gradient_report(DATASET, run_id, "lm_head", layers, **cell.scored, steps=16)
        scores = client.attribute_residual(DATASET, run_id, [cell.query], [report["gradient"]], [float(layers)])
        scores = scores[..., 0]
        console.print(
            f"[bold]5.[/] Which parts of the model wrote the cell in row {cell.row + 1}, column {cell.column + 1} "
            f"('{cell.letter}')? Its log-probability\n   among the five colours is {report['objective']:.4f}; "
            f"{report['objective'] - report['objective_at_zero']:.3f} nats of it are attributed "
            f"(completeness error {report['completeness_error']:.0e}). The highest scores:"
        )
        _show_top(console, scores)
        picture = out / "heads.png"
        head_map(scores, f"what wrote '{cell.letter}' in the answer", marked=REMOVED).savefig(picture, dpi=150)
        console.print(f"   The whole map: {picture}\n")
        _show_ablation(console, client, run_id, cell, scores[:, :-1])


def _changed_cell(puzzle: Puzzle, tokens: list[str], token_ids: list[int], prompt_tokens: int) -> Cell:
    """The last cell that the rule changes and the model got right."""
    colours = {f" {letter}": letter for letter in COLOURS}
    ids = {colours[token]: number for token, number in zip(tokens, token_ids, strict=True) if token in colours}
    places = [i for i in range(prompt_tokens, len(tokens)) if tokens[i] in colours]
    rows, columns = puzzle.shape
    for number, position in reversed(list(enumerate(places[: rows * columns]))):
        row, column = divmod(number, columns)
        letter = puzzle.test_output[row][column]
        if letter != puzzle.test_input[row][column] and colours[tokens[position]] == letter:
            candidates = [ids[colour] for colour in COLOURS if colour in ids]
            return Cell(row, column, letter, position - 1, ids[letter], candidates)
    raise SightlineError("the model got none of the cells right that the rule changes")


def _highest(scores: Tensor, count: int) -> Heads:
    order = scores.flatten().argsort(descending=True)[:count].tolist()
    return [divmod(place, scores.shape[1]) for place in order]


def _show_top(console: Console, scores: Tensor) -> None:
    mlp = scores.shape[1] - 1
    rows = [
        (f"layer {layer}", "MLP" if column == mlp else f"head {column}", f"{float(scores[layer, column]):+.3f}")
        for layer, column in _highest(scores, 8)
    ]
    show(("where", "what", "nats"), rows, right=("nats",), console=console)


def _show_ablation(console: Console, client: ModelClient, sample: str, cell: Cell, scores: Tensor) -> None:
    top, draw = _highest(scores, REMOVED), random.Random(0)
    every = _highest(scores, scores.numel())
    found = client.ablate(DATASET, sample, heads=top, **cell.scored)
    drawn = [client.ablate(DATASET, sample, heads=draw.sample(every, REMOVED), **cell.scored) for _ in range(DRAWS)]
    losses = sorted(one["before"] - one["after"] for one in drawn)
    loss = found["before"] - found["after"]
    names = ", ".join(f"{layer}.{head}" for layer, head in top)
    beaten = sum(loss > other for other in losses)
    console.print("[bold]6.[/] Is that so? The loss of log-probability when heads write nothing:")
    rows = [
        (f"the {REMOVED} highest heads ({names})", f"{loss:.2f}"),
        (f"{REMOVED} heads at random, median of {DRAWS} draws", f"{losses[DRAWS // 2]:.2f}"),
        (f"{REMOVED} heads at random, mean", f"{sum(losses) / DRAWS:.2f}"),
    ]
    show(("removed", "nats lost"), rows, right=("nats lost",), console=console)
    console.print(f"   The highest heads cost more than {beaten} of {DRAWS} random choices.\n")
