"""How the embedded model solves a puzzle, in tables: `python -m examples.story` prints what docs/story.md shows.

1. Three puzzles of each of the sixteen rules are run; at every cell of the answer it is noted where each head looks,
   and heads that look alike are clustered.
2. Each head is ablated alone (its mean at each position over all rules takes its place), and what the answer loses is
   split by the direction and the verb of the rule.
3. For some rules a graph of 40 % of the heads is found, and measured on puzzles with other seeds, beside the heads that
   greedy elimination leaves of all of them.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attribution import LocalSession, cluster_heads, eliminate, faithfulness, find_graph
from attribution.heads import label_by_source
from puzzles import Puzzle, Result, gen_puzzle, side_neighbor_relations

SIDE, EACH, KEPT = 4, 3, 12
THRESHOLD = 0.2  # of the mean Jensen–Shannon divergence in a group, in nats; ln 2 is the most there can be
HELD = 24  # puzzles of a rule that a graph is measured on
STEPS = {(0, 0): "the same cell", (0, -1): "its left", (0, 1): "its right", (-1, 0): "above it", (1, 0): "below it"}
SOURCES = {"right": (0, -1), "left": (0, 1), "down": (-1, 0), "up": (1, 0)}
RULES = ("paint right", "shift left", "cover up", "erase down", "any")
KINDS = ("an example's input", "an example's output")
ABLATION = {"mode": "position_mean", "source_dataset_id": "reference"}

console = Console(width=120, highlight=False)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rules", nargs="*", default=list(RULES), help="rules of the third table; 'any' is all of them"
    )
    parser.add_argument(
        "--puzzles", type=int, default=16, help="puzzles that a graph is found by (of 'any': three times)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        session = LocalSession("demo", store=store)
        results = run(session, "story", side_neighbor_relations * EACH, SIDE, 3, 7000)
        looks(session, results)
        losses(session, results)
        carried(session, options.rules, options.puzzles)


def run(session: LocalSession, dataset: str, rules: Iterable[str], side: int, examples: int, seed: int) -> list[Result]:
    """A stored result for each rule."""
    tokenizer, results = session.model.tokenizer, []
    for number, rule in enumerate(rules):
        puzzle = gen_puzzle(side_neighbor_relations if rule == "any" else rule, side, side, examples, seed + number)
        results.append(Result.from_puzzle(puzzle, tokenizer, number))
    session.forward_results(dataset, results)
    return results


def looks(session: LocalSession, results: list[Result]) -> None:
    """What heads look at when they predict a cell, cluster by cluster."""
    dims = session.model.dimensions
    samples, queries = [r.index for r in results], results[0].query_positions  # puzzles of one shape are aligned
    patterns = {
        (layer, head): session.get_attn_weights_batch("story", samples, layer, head, queries, show_progress=False)
        for layer in range(dims.n_layers)
        for head in range(dims.n_heads)
    }
    sources, on_sources = by_source(patterns, names(results))
    groups, *_ = cluster_heads(on_sources, threshold=THRESHOLD)
    labels = label_by_source(groups, on_sources, [sources] * len(results))
    rows = []
    for group, label in sorted(zip(groups, labels, strict=True), key=lambda one: (-len(one[0]), one[0])):
        shares = torch.stack([on_sources[head] for head in group]).mean((0, 1, 2))
        order = shares.argsort(descending=True)[:3].tolist()
        shown = ", ".join(f"{sources[at]} {float(shares[at]):.0%}" for at in order)
        rows.append((listed(group), f"{label.name} ({label.share:.0%})", shown))
    table("Where heads look from the answer's cells", ("heads", "most often first", "share of their attention"), rows)


def by_source(
    patterns: dict[tuple[int, int], Tensor], name: Callable[[int, int, int], str]
) -> tuple[list[str], dict[tuple[int, int], Tensor]]:
    """Patterns [sample, query, source]: what a head gives to each kind of place, and the names of these."""
    samples, queries, keys = next(iter(patterns.values())).shape
    named = [[[name(s, q, k) for k in range(keys)] for q in range(queries)] for s in range(samples)]
    sources = sorted({one for sample in named for query in sample for one in query})
    number = {source: at for at, source in enumerate(sources)}
    index = torch.tensor([[[number[one] for one in query] for query in sample] for sample in named])
    empty = torch.zeros(samples, queries, len(sources))
    return sources, {head: empty.scatter_add(2, index, pattern) for head, pattern in patterns.items()}


def names(results: list[Result]) -> Callable[[int, int, int], str]:
    """What a key is to a query, both counted as `label_by_source` does."""
    cells = [places(r.puzzle) for r in results if r.puzzle is not None]

    def name(sample: int, query: int, key: int) -> str:
        puzzle, found = results[sample].puzzle, cells[sample].get(key)
        assert puzzle is not None
        if found is None:
            return "between cells"
        grid, row, column = found
        step = (row - query // SIDE, column - query % SIDE)
        if grid == "test" and step == SOURCES[puzzle.relation.split()[1]]:
            return "test: the rule's source"
        return f"{grid}: {STEPS.get(step, 'elsewhere')}" if grid in ("test", "answer") else grid

    return name


def places(puzzle: Puzzle) -> dict[int, tuple[str, int, int]]:
    """Token → (grid, row, column)."""
    assert puzzle.ranges is not None
    grids = [(kind, grid) for pair in puzzle.ranges.examples for kind, grid in zip(KINDS, pair, strict=True)]
    grids += [("test", puzzle.ranges.test_input), ("answer", puzzle.ranges.answer)]
    return {
        start: (kind, row, column)
        for kind, grid in grids
        for row, line in enumerate(grid)
        for column, (start, _) in enumerate(line)
    }


def losses(session: LocalSession, results: list[Result]) -> None:
    """What is lost without each head, as a share of what is lost without all of them, by direction and verb."""
    lost: dict[str, list[Tensor]] = defaultdict(list)
    dims = session.model.dimensions
    every = [(layer, head) for layer in range(dims.n_layers) for head in range(dims.n_heads)]
    for r in results:
        assert r.puzzle is not None
        found = session.ablate_sweep(
            "story",
            r.index,
            [{"heads": every}, *({"heads": [head]} for head in every)],
            "position_mean",
            r.labels,
            r.candidate_ids,
            r.query_positions,
        )
        for group in ("all", *r.puzzle.relation.split()):
            lost[group].append(found["before"] - found["after"])
    columns = ("all", "right", "left", "down", "up", "shift", "paint", "cover", "erase")
    share = {group: torch.stack(lost[group]).mean(0) for group in columns}
    share = {group: one[1:] / one[0] for group, one in share.items()}
    order = share["all"].argsort(descending=True)[:KEPT].tolist()
    rows = [(listed([every[at]]), *(f"{float(share[group][at]):.0%}" for group in columns)) for at in order]
    table("What is lost without one head, of what is lost without all", ("head", *columns), rows)


def carried(session: LocalSession, rules: list[str], count: int) -> None:
    """What a graph of few heads carries, beside greedy elimination."""
    run(session, "reference", side_neighbor_relations * 4, 3, 4, 20_000)
    rows = []
    for number, rule in enumerate(rules):
        known = run(session, f"known{number}", [rule] * (count * (3 if rule == "any" else 1)), 3, 4, 1000 * number)
        held = run(session, f"held{number}", [rule] * HELD, 3, 4, 1000 * number + 500)
        found = find_graph(known, session, KEPT, candidates=24, at_once=2, steps=2, **ABLATION)
        greedy = eliminate(known, session, KEPT, at_once=2, **ABLATION).order[:KEPT]
        kept, best = (faithfulness(one, held, session, **ABLATION).kept for one in (found.heads, greedy))
        fewer = faithfulness(found.heads[:8], held, session, **ABLATION).kept
        rows.append((rule, f"{kept:.1%}", f"{best:.1%}", f"{fewer:.1%}", listed(sorted(found.heads))))
    table("What a few heads keep of the answer, on held-out puzzles", ("rule", "12", "greedy 12", "8", "heads"), rows)


def listed(heads: Iterable[tuple[int, int]]) -> str:
    """Heads as layer.head."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table."""
    shown = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print()


if __name__ == "__main__":
    main()
