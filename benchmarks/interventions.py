"""What a sweep of attention knockouts costs, against one call per knockout, on the embedded model and a larger one."""

import tempfile
from collections.abc import Iterable
from typing import Any

from attribution.session import LocalSession
from benchmarks.subject import Subject, token_ids
from benchmarks.table import Row
from benchmarks.timing import in_turn, milliseconds, ratio
from puzzles import gen_prompt, gen_puzzle

NOTE = (
    "The ratio is one call per knockout (base) over one sweep (ours). A single call runs its baseline beside it, and "
    "what lies before the removed edge once for both. Edges from every query leave nothing before them: what is gained "
    "there is a baseline less per knockout, and fewer calls."
)
SOURCES = 4
_TOKENS = 120  # of the prompt of the model of the benchmarks


def run(subject: Subject, rounds: int) -> list[Row]:
    """Every head and several source tokens, on the embedded model and on that of the benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        demo = LocalSession("demo", store=folder)
        text, _, _ = gen_prompt(gen_puzzle("paint right", n=3, m=3, n_train=3, seed=63))
        puzzle: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        tokens: dict[str, Any] = {"token_ids": token_ids(_TOKENS, subject.vocabulary)}
        every, last, all_queries = _sweep(demo, -1, range(4)), _sweep(subject.session, -1, [7]), _sweep(demo, "*", [2])
        return [
            _compare("embedded model, every layer, edges from the last token", ">= 5", demo, puzzle, every, rounds),
            _compare("24 M model, one layer, edges from the last token", ">= 5", subject.session, tokens, last, rounds),
            _compare("embedded model, one layer, edges from every query", "", demo, puzzle, all_queries, rounds),
        ]


def _sweep(session: LocalSession, query: Any, layers: Iterable[int]) -> Any:
    """Every head of some layers, and the edges from `query` to each of the first tokens but one."""
    return [
        {"layers": layer, "heads": [head], "edges": [[query, key]]}
        for layer in layers
        for head in range(session.model.dimensions.n_heads)
        for key in range(1, SOURCES + 1)
    ]


def _compare(name: str, aim: str, session: LocalSession, prompt: dict[str, Any], sweep: Any, rounds: int) -> Row:
    times = in_turn(
        {
            "single": lambda: [session.knockout(**prompt, **one) for one in sweep],
            "sweep": lambda: session.knockout_sweep(sweep, **prompt),
        },
        rounds,
    )
    label = f"{len(sweep)} knockouts of {_length(session, prompt)} tokens: {name}"
    return Row(label, aim, ratio(times, "single", "sweep"), milliseconds(times["single"], times["sweep"]))


def _length(session: LocalSession, prompt: dict[str, Any]) -> int:
    return len(session.knockout(**prompt)["token_ids"])
