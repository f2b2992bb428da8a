"""Circuits: one on the embedded model, and the memory of one with twenty thousand active features.

Memory is measured in a process of its own (`python -m benchmarks.circuits`), as `benchmarks.memory` says.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.writing import write_autoencoder
from attribution.model.load import trace_model
from attribution.session import LocalSession
from benchmarks.memory import peak
from benchmarks.table import Row
from benchmarks.timing import in_turn
from puzzles import demo_model_path, gen_prompt, gen_puzzle

WIDTH, LAYERS, FEATURES, TOKENS = 64, 4, 1024, 10  # half of the features are active: 4 · 1,024 · 10 / 2
CEILINGS = ((2048, 2**30), (20_000, 2**28))  # of features that are nodes, and of bytes
LOGITS = 10
NOTE = (
    f"Memory: a random model ({LAYERS} layers, width {WIDTH}) with random transcoders of {FEATURES:,} features, half "
    f"of them active at each of {TOKENS} tokens; how far resident memory of a process of its own rises, the model's "
    "own forward included; the dense matrix of effects of every active feature, error, token and logit on every other, "
    "in float32, is what is not made. Circuits run on one thread of torch: their matrices are small, and a second "
    "thread waits more than it works where the machine is busy."
)


def run(rounds: int) -> list[Row]:
    """A circuit's time and its checks, and what a large one takes."""
    return [*_demo(rounds), *_large()]


# --- the embedded model


def _demo(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as store:
        torch.set_num_threads(1)
        session = LocalSession("demo", store=store)
        text, _, _ = gen_prompt(gen_puzzle("paint right", n=3, m=3, n_train=3, seed=63))
        given: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "show_progress": False}
        times = in_turn({"circuit": lambda: session.trace_circuit(**given)}, rounds)["circuit"]
        found = session.trace_circuit(**given)
    counts, check = found["counts"], found["self_check"]
    shown = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items())
    scores = ", ".join(f"{name} {value:.3f}" for name, value in found["scores"].items() if value is not None)
    return [
        Row("a circuit on the embedded model", "", None, f"{statistics.median(times):.2f} s"),
        Row("its size", "", None, shown),
        Row("its scores", "", None, scores),
        Row(
            f"its {len(check['edges'])} verified edges, largest error relative to the largest edge",
            f"≤ {check['tolerance']:g}",
            None,
            f"{check['relative_error']:.1e}",
        ),
    ]


# --- memory


def _large() -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.circuits"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    found = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for one in found:
        name = f"{one['active']:,} active features, {one['asked']:,} nodes asked for, {one['traced']:,} traced"
        dense = 4 * one["nodes"] ** 2
        rows += [
            _against(f"{name}: memory against its ceiling", "≤ 1", one["ceiling"], one["peak"]),
            _against("the same against the dense matrix", "", dense, one["peak"]),
            Row("its time", "", None, f"{one['seconds']:.1f} s"),
        ]
    return rows


def _against(name: str, aim: str, base: int, ours: int) -> Row:
    return Row(name, aim, ours / base, f"{base / 2**20:.0f}, {ours / 2**20:.0f} MiB")


def _peaks(folder: Path) -> list[dict[str, Any]]:
    """What each ceiling takes; in this process."""
    torch.set_num_threads(1)
    session = LocalSession(_model(), store=folder / "store")
    _load_transcoders(session, folder)
    tokens = list(range(10, 10 + TOKENS))
    session.trace_circuit(token_ids=tokens[:2], show_progress=False)  # whatever is set up once
    return [_taken(session, tokens, nodes, ceiling) for nodes, ceiling in CEILINGS]


def _taken(session: LocalSession, tokens: list[int], nodes: int, ceiling: int) -> dict[str, Any]:
    found: dict[str, int] = {}
    given: dict[str, Any] = {"max_feature_nodes": nodes, "max_bytes": ceiling, "checks": 0, "show_progress": False}
    started = time.perf_counter()
    taken = peak(lambda: found.update(session.trace_circuit(token_ids=tokens, **given)["counts"]))
    return {
        "asked": nodes,
        "ceiling": ceiling,
        "peak": taken,
        "seconds": time.perf_counter() - started,
        "active": found["active_features"],
        "traced": found["traced_features"],
        "nodes": found["active_features"] + len(tokens) * (LAYERS + 1) + LOGITS,
    }


def _model() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 2 * WIDTH}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **heads)
    return trace_model("random", Qwen3ForCausalLM(config), tokenizer)


def _load_transcoders(session: LocalSession, folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        made = Autoencoder(
            activation="relu",
            W_enc=torch.randn(WIDTH, FEATURES, generator=draw) / WIDTH**0.5,
            b_enc=torch.zeros(FEATURES),
            W_dec=torch.randn(FEATURES, WIDTH, generator=draw) / FEATURES,
            b_dec=torch.zeros(WIDTH),
        )
        path = folder / f"{layer}"
        write_autoencoder(path, made, reads=Place("mlp_in", layer), writes=Place("mlp_out", layer))
        session.load_features(str(path), f"{layer}-transcoder")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(_peaks(Path(directory))))
