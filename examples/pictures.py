"""Draws the pictures of the front page, on the embedded model: `python -m examples.pictures --out docs`.

1. One puzzle of each of the sixteen rules is run.
2. The head that looks at the neighbour which the rule uses is drawn over the grids of one puzzle: `grid.png`.
3. Heads are eliminated until twelve are left, and the graph of these is drawn with its strongest edges: `graph.png`.
"""

import argparse
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from attribution import Graph, LocalSession, eliminate, get_attn_weights
from attribution.plots import graph_map, grid_attention
from puzzles import Result, gen_puzzle, side_neighbor_relations

LAYER, HEAD = 3, 5  # the head that follows the rule; `minarc_local.ipynb` shows how it is found
KEPT = 12  # heads of the graph
SHOWN = "paint up"
CELL = 5  # of the answer, row by row: the second cell of the second row


def main() -> None:
    """Draw both pictures into the folder that `--out` names."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the front page on the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where they go (default: docs)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as store:
        model = LocalSession("demo", store=store)
        results = sixteen(model)
        for name, figure in (("grid", grid(model, results)), ("graph", graph(model, results))):
            figure.savefig(out / f"{name}.png", dpi=110)
            print(out / f"{name}.png")


def sixteen(model: LocalSession) -> list[Result]:
    """One puzzle of every rule, run and stored."""
    numbered = enumerate(side_neighbor_relations)
    puzzles = [gen_puzzle(rule, n=4, m=4, n_train=3, seed=number) for number, rule in numbered]
    results = [Result.from_puzzle(puzzle, model.model.tokenizer, number) for number, puzzle in enumerate(puzzles)]
    model.forward_results("pictures", results)
    return results


def grid(model: LocalSession, results: list[Result]) -> Figure:
    """What the head looks at when it predicts a cell."""
    result = results[side_neighbor_relations.index(SHOWN)]
    assert result.puzzle is not None  # it was made from one
    query = result.query_positions[CELL : CELL + 1]
    attention = get_attn_weights(model, result, layer=LAYER, head=HEAD, pos_ids=query)[0]
    return grid_attention(result.puzzle, attention, query, f"'{SHOWN}': where head {LAYER}.{HEAD} looks")


def graph(model: LocalSession, results: list[Result]) -> Figure:
    """The heads that carry the answers, and what flows between them."""
    heads = eliminate(results[::2], model, keep=KEPT, at_once=4, mode="position_mean").order[:KEPT]
    status = model.status()
    carrying, most = Graph(len(results), status["hidden_size"]), status["n_layers"] * (status["n_heads"] + 1)
    carrying.expand(results[::4], model, k=most, threshold=1.0, budget=most, order="depth", heads=heads, steps=2)
    title = f"the {KEPT} heads (layer.head) that carry the answers, and the MLPs between them"
    return graph_map(carrying, title, most=40)


if __name__ == "__main__":
    main()
