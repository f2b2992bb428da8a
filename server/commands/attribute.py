"""`sightline attribute`: the graph of heads and MLPs that carries an answer, and how much of the answer it carries.

1. Puzzles of one rule, or prompts of a file, become stored samples; some are held out.
2. A graph is grown over some of them, and heads are eliminated until few are left (`attribution.search`).
3. What they carry is measured on those held out, beside random heads and gradient × activation.
"""

import json
import math
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import InvalidRequest, StorageFailed
from server.commands.options import Device, Dtype, Model
from server.commands.output import show

if TYPE_CHECKING:
    from attribution.faithful import Faithfulness, FaithfulnessCurves
    from attribution.search import Found
    from attribution.session import LocalSession
    from puzzles import Result

SHARE = 0.4
_SIZE = re.compile(r"([1-9])x([1-9])")
_SEEDS = {"found": 0, "held": 10_000, "reference": 20_000}


Prompts = Annotated[
    Path | None,
    typer.Option(
        help='In place of puzzles: a file with a line {"prompt", "answer", "candidates"?} for each prompt; the last '
        "third is held out.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Task:
    """The results that a graph is found by, those that it is measured on, and those that means are taken over."""

    found: "list[Result]"
    held: "list[Result]"
    reference: "list[Result]"


def attribute(
    model: Model = "demo",
    prompts: Prompts = None,
    rule: Annotated[str, typer.Option(help="The rule of the puzzles, or 'any'.")] = "paint right",
    size: Annotated[str, typer.Option(help="Rows and columns of their grids.")] = "3x3",
    examples: Annotated[int, typer.Option(min=1, help="Examples in each puzzle.")] = 4,
    puzzles: Annotated[int, typer.Option(min=1, help="Puzzles that the graph is found by.")] = 16,
    held_out: Annotated[int, typer.Option(min=1, help="Puzzles that it is measured on.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the puzzles and of the random heads.")] = 0,
    heads: Annotated[int, typer.Option(min=0, help="How many heads the graph has; 0 is 40 % of them.")] = 0,
    at_once: Annotated[int, typer.Option(min=1, help="Heads that are eliminated in one round.")] = 2,
    draws: Annotated[int, typer.Option(min=1, help="Random orders of heads to compare with.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for what is found.")] = Path("attribute_out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find the heads that carry an answer, draw their graph, and measure how much of the answer they carry."""
    shape = _SIZE.fullmatch(size)
    if shape is None:
        raise InvalidRequest(f"--size is rows and columns as 3x3; found {size!r}", param="size")
    from puzzles import side_neighbor_relations

    if prompts is None and rule not in (*side_neighbor_relations, "any"):
        allowed = ", ".join(side_neighbor_relations)
        raise InvalidRequest(f"--rule is 'any' or one of {allowed}; found {rule!r}", param="rule")
    from attribution.session import LocalSession

    with tempfile.TemporaryDirectory() as store:
        session = LocalSession(model, store=store, device=device, dtype=dtype)
        tokenizer = session.model.tokenizer
        if prompts is None:
            counts = {"found": puzzles, "held": held_out}
            task = _puzzles(tokenizer, rule, int(shape[1]), int(shape[2]), examples, counts, seed)
        else:
            task = _prompts(tokenizer, prompts)
        dims = session.model.dimensions
        count = heads or max(1, math.floor(SHARE * dims.n_layers * dims.n_heads))
        title = f"{model}, {prompts.name if prompts else rule}"
        _find(session, task, count, out, title, {"at_once": at_once}, {"draws": draws, "seed": seed})


def _find(
    session: "LocalSession",
    task: Task,
    count: int,
    out: Path,
    title: str,
    searching: dict[str, int],
    drawing: dict[str, int],
) -> None:
    """Find a graph of `count` heads, measure it, print what was measured and write it to `out`."""
    from attribution.faithful import faithfulness, faithfulness_curves
    from attribution.search import find_graph

    ablation = _stored(session, task)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{out} cannot be a folder: {error}") from error
    found = find_graph(task.found, session, count, save=out / "graph.json", **searching, **ablation)
    measured = faithfulness(found.heads, task.held, session, **ablation)
    order = found.elimination.order
    sizes = sorted({max(1, round(len(order) * part / 8)) for part in range(1, 9)} | {len(found.heads)})
    drawn = faithfulness_curves(order, task.held, session, sizes=sizes, **drawing, **ablation)
    _tell(found, measured, drawn, task)
    _write(out, found, measured, drawn, title)


def _puzzles(
    tokenizer: Any, rule: str, rows: int, columns: int, examples: int, counts: dict[str, int], seed: int
) -> Task:
    """Puzzles of a rule, and of all rules for the means: what a head says of the rule is not in these."""
    from puzzles import Result, gen_puzzle, side_neighbor_relations

    def results(part: str, count: int, rules: Any) -> "list[Result]":
        first = 1_000_000 * seed + _SEEDS[part]
        return [
            Result.from_puzzle(gen_puzzle(rules, rows, columns, examples, first + number), tokenizer, number)
            for number in range(count)
        ]

    chosen = side_neighbor_relations if rule == "any" else rule
    return Task(
        results("found", counts["found"], chosen),
        results("held", counts["held"], chosen),
        results("reference", 4 * len(side_neighbor_relations), side_neighbor_relations),
    )


def _prompts(tokenizer: Any, path: Path) -> Task:
    """The prompts of a file; means are taken over those that the graph is found by."""
    from puzzles import Result

    results = []
    for number, line in enumerate(path.read_text().splitlines()):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            results.append(
                Result.from_text(len(results), given["prompt"], given["answer"], tokenizer, given.get("candidates"))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"{path}, line {number + 1}: {error}", param="prompts") from error
    if len(results) < 3:
        raise InvalidRequest(f"{path} has {len(results)} prompts; at least three are needed", param="prompts")
    held = max(1, len(results) // 3)
    return Task(results[:-held], results[-held:], [])


def _stored(session: "LocalSession", task: Task) -> dict[str, Any]:
    """Run all prompts; how heads are to be ablated."""
    for name, results in vars(task).items():
        if results:
            session.forward_results(name, results)
    if task.reference:
        return {"mode": "position_mean", "source_dataset_id": "reference"}
    return {"mode": "mean", "source_dataset_id": "found"}


def _tell(found: "Found", measured: "Faithfulness", drawn: "FaithfulnessCurves", task: Task) -> None:
    count = len(found.heads)
    typer.echo(
        f"{count} of {measured.n_heads} heads, found by {len(task.found)} samples, measured on {len(task.held)} others:"
        "\n"
        f"  {', '.join(f'{layer}.{head}' for layer, head in sorted(found.heads))}\n"
        f"log-probability of the answer: {measured.whole:.4f} as it is, {measured.inside:.4f} with these heads alone, "
        f"{measured.outside:.4f} without them,\n  {measured.nothing:.4f} without any head\n"
        f"kept {measured.kept:.1%} by these heads alone, lost {measured.lost:.1%} without them\n"
    )
    rows = [
        (size, *(f"{float(value):.1%}" for value in (graph, gradient, draws.mean(), draws.max())))
        for size, graph, gradient, draws in zip(drawn.sizes, drawn.graph, drawn.gradient, drawn.random.T, strict=True)
    ]
    headers = ("heads kept", "the graph", "gradient × activation", "random, mean", "random, best")
    show(headers, rows, right=headers)


def _write(out: Path, found: "Found", measured: "Faithfulness", drawn: "FaithfulnessCurves", title: str) -> None:
    from attribution.plots import curves, graph_map

    record = {
        "faithfulness": asdict(measured),
        "order": found.elimination.order,
        "curves": {
            "sizes": drawn.sizes,
            "graph": drawn.graph.tolist(),
            "gradient": drawn.gradient.tolist(),
            "random": drawn.random.tolist(),
        },
    }
    lines = {
        "the graph": drawn.graph.tolist(),
        "gradient × activation": drawn.gradient.tolist(),
        "random heads": drawn.random.tolist(),
    }
    try:
        (out / "faithfulness.json").write_text(json.dumps(record, indent=2) + "\n")
        curves(list(drawn.sizes), lines, f"What heads carry: {title}").savefig(out / "faithfulness.png", dpi=150)
        graph_map(found.graph, f"The graph: {title}").savefig(out / "graph.png", dpi=150)
    except OSError as error:
        raise StorageFailed(f"{out} could not be written: {error}") from error
    typer.echo(f"\nWritten to {out}: graph.json, graph.png, faithfulness.json, faithfulness.png")
