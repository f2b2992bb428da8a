"""Draws the pictures of the front page, on the embedded model: `python -m examples.pictures --out docs`.

1. One puzzle of each of the sixteen rules is run, and a graph is grown from its answers.
2. The head that looks at the neighbour which the rule uses is drawn over the grids of one puzzle: `grid.png`.
3. The graph is drawn with its strongest edges: `graph.png`.
"""

import argparse
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from attribution import Graph, LocalSession, get_attn_weights
from attribution.plots import graph_map, grid_attention
from puzzles import Result, gen_puzzle, side_neighbor_relations

LAYER, HEAD = 3, 5  # the head that follows the rule; `minarc_local.ipynb` shows how it is found
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
    """What the answers of all sixteen puzzles were made from."""
    grown = Graph(len(results), model.status()["hidden_size"])
    grown.expand(results, model, k=8, threshold=0.8, budget=14, order="depth")
    return graph_map(grown, "what wrote the answers of sixteen puzzles: heads (layer.head) and MLPs", most=40)


if __name__ == "__main__":
    main()
