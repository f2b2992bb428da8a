"""`python -m benchmarks.completeness`: completeness errors of integrated gradients on the embedded model, as a table.

For a few puzzles: the log-probability of the answer at every cell (`lm_head`), and with its gradient every MLP and head
of the model. Heads and MLPs whose objective hardly changes along the path are left out (below 1 % of the largest): of
next to nothing every error is large.
"""

import argparse
import tempfile
from collections import defaultdict
from statistics import median
from typing import Any

from attribution.session import LocalSession
from puzzles import Result, gen_puzzle

STEPS = (4, 8, 16, 32)
_LEAST_SHARE = 0.01


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=4)
    parser.add_argument("--rule", choices=("gauss_legendre", "uniform"), default="gauss_legendre")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        session = LocalSession("demo", store=folder, dtype=options.dtype)
        for seed in range(options.puzzles):
            puzzle = gen_puzzle(n=4, m=4, n_train=4, seed=seed)
            result = Result.from_puzzle(puzzle, session.model.tokenizer, seed)
            session.forward("puzzles", seed, prompt=result.prompt, add_special_tokens=False)
            _measure(session, result, options.rule, errors)
    print(_table(errors))


def _measure(session: LocalSession, result: Result, rule: Any, errors: dict[str, dict[int, list[float]]]) -> None:
    layers, sample, positions = session.model.dimensions.n_layers, result.index, result.query_positions
    scored = {"pos_ids": positions, "labels": result.labels}
    candidates = {"lm_head, over the candidates": result.candidate_ids, "lm_head, over the vocabulary": None}
    gradient = session.compute_node_gradient(
        "puzzles", sample, "lm_head", layers, **scored, candidate_ids=result.candidate_ids, steps=32
    )
    for steps in STEPS:
        for name, ids in candidates.items():
            report = session.node_gradient_report(
                "puzzles", sample, "lm_head", layers, **scored, candidate_ids=ids, steps=steps, rule=rule
            )
            errors[name][steps].append(report["completeness_error"])
        for kind in ("mlp_i", "attn_q", "attn_k", "attn_v"):
            reports = [
                session.node_gradient_report(
                    "puzzles", sample, kind, layer, pos_ids=positions, output_grad=gradient, steps=steps, rule=rule
                )
                for layer in range(layers)
            ]
            errors[_LABELS[kind]][steps] += _telling(reports)


_LABELS = {
    "mlp_i": "MLPs (both branches)",
    "attn_q": "attn_q, every head",
    "attn_k": "attn_k, every head",
    "attn_v": "attn_v, every head",
}


def _telling(reports: list[dict[str, Any]]) -> list[float]:
    """The errors of those whose objective changes along the path."""
    rows = []
    for report in reports:
        fields = (report["completeness_error"], report["objective"], report["objective_at_zero"])
        rows += zip(*fields, strict=True) if isinstance(fields[0], list) else [fields]
    largest = max(abs(at_x - at_zero) for _, at_x, at_zero in rows)
    return [error for error, at_x, at_zero in rows if abs(at_x - at_zero) >= _LEAST_SHARE * largest]


def _table(errors: dict[str, dict[int, list[float]]]) -> str:
    lines = [
        "| node | " + " | ".join(f"{steps} points" for steps in STEPS) + " |",
        "|---|" + "---|" * len(STEPS),
    ]
    for name, by_steps in errors.items():
        cells = [f"{median(by_steps[steps]):.0e} ({max(by_steps[steps]):.0e})" for steps in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
