"""What the workflow of graphs costs on the embedded model, here and through a server: the same script on both."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from attribution import Graph, LocalSession, Node, attribute_step, mr
from benchmarks.servers import sightline
from benchmarks.table import Row
from benchmarks.timing import Times, in_turn, milliseconds, ratio
from clients import ModelClient
from puzzles import Result, demo_model_path, gen_puzzle

NOTE = (
    "The embedded model, puzzles of 163 tokens, integrated gradients at 4 points; the server has a process of its own "
    "and shares the cores, also with the client's own torch threads, which spin for a while after each operation: with "
    "GOMP_SPINCOUNT=10000 for the client the ratios were 1.40 and 2.23. A step is the gradient of one node for one "
    "sample, and its residual attribution to every head and MLP. The ratio is the server over the same work here."
)
SAMPLES, GROWN_ON, NODES = 200, 20, 50


def run(rounds: int) -> list[Row]:
    """Steps, the mean over many samples, and a graph of fifty nodes."""
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder), demo_model_path()
        local = LocalSession(str(model), store=root / "local")
        tokenizer = local.model.tokenizer
        made = [gen_puzzle(n=3, m=3, n_train=4, seed=seed) for seed in range(SAMPLES)]
        results = [Result.from_puzzle(puzzle, tokenizer, number) for number, puzzle in enumerate(made)]
        with (
            sightline(model, root / "runs", "--store-dir", str(root / "store")) as server,
            ModelClient(server.url, server.model) as client,
        ):
            sessions = {"local": local, "remote": client}
            for session in sessions.values():
                session.forward_results("bench", results, show_progress=False)
            return _rows(sessions, results, rounds)


def _rows(sessions: dict[str, Any], results: list[Result], rounds: int) -> list[Row]:
    means = in_turn({name: lambda s=one: _mean(s, results) for name, one in sessions.items()}, rounds)
    graphs = in_turn({name: lambda s=one: _graph(s, results[:GROWN_ON]) for name, one in sessions.items()}, rounds)
    steps = ", ".join(f"{SAMPLES / statistics.median(one):.0f}" for one in means.values())
    nodes = ", ".join(f"{NODES * GROWN_ON / statistics.median(one):.0f}" for one in graphs.values())
    return [
        _row(f"mr(attribute_step) of lm_head over {SAMPLES} samples", "<= 1.3", means),
        Row("attribution steps per second, lm_head (local, remote)", "", None, steps),
        _row(f"a graph of {NODES} nodes on {GROWN_ON} samples, every gradient", "", graphs),
        Row("gradients per second in this graph (local, remote)", "", None, nodes),
    ]


def _row(name: str, aim: str, times: Times) -> Row:
    return Row(name, aim, ratio(times, "remote", "local"), milliseconds(times["local"], times["remote"]))


def _mean(session: Any, results: list[Result]) -> Any:
    status = session.status()
    graph = Graph(len(results), status["hidden_size"], current=False)
    top = graph.add_node(Node.of(graph, status["n_layers"], 0, "lm_head"))
    return mr(attribute_step)(results, session, [top], show_progress=False)


def _graph(session: Any, results: list[Result]) -> Graph:
    """The last fifty nodes of the whole graph: `lm_head`, then q, k and v of each head, layer by layer downwards."""
    status = session.status()
    graph = Graph(len(results), status["hidden_size"], current=False)
    graph.add_node(Node.of(graph, status["n_layers"], 0, "lm_head"))
    paths = [
        (layer, column, name)
        for layer in reversed(range(status["n_layers"]))
        for column, name in [
            *((status["n_heads"], name) for name in ("mlp_i", "mlp_g")),
            *((head, name) for head in range(status["n_heads"]) for name in ("attn_q", "attn_k", "attn_v")),
        ]
    ][: NODES - 1]
    for path in paths:
        node = Node.of(graph, *path)
        graph.add_node(node, [one for one in graph.nodes if one.type == "lm_head" or one.depth > node.depth])
    for r in results:
        graph.backward(r, session)
    return graph
