"""Features: the strongest ones of a thousand tokens against sae-lens, over a socket, and circuits.

sae-lens and what the other benchmarks compare with need different versions of TransformerLens: this part has an
environment of its own (`make bench PART=features`).
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

import attribution.model  # noqa: F401  before nnsight
from attribution.features.reading import read_autoencoder
from attribution.session import LocalSession
from benchmarks import circuits
from benchmarks.servers import Server, sightline
from benchmarks.table import Row
from benchmarks.timing import Times, in_turn, milliseconds, ratio
from clients import ModelClient
from puzzles import Result, gen_puzzle

TOKENS, D_IN, FEATURES, K, TEXTS, CHAT_TOKENS = 1000, 768, 24_576, 10, 16, 48
FEATURE = {"type": "feature", "source": "2-resid_post", "index": 161}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "a feature added": [FEATURE | {"operation": "add", "strength": 1.0}],
    "a feature clamped": [FEATURE | {"operation": "clamp", "value": 10.0}],
}
NOTE = (
    f"Top-k: {TOKENS:,} tokens, width {D_IN}, {FEATURES:,} features (1.5 % of them active with relu and jumprelu, 64 "
    f"of top-k), the {K} strongest, float32; sae-lens' side is its own `encode` and then `torch.topk`, the bare "
    "product is x W_enc and nothing else; random weights, which sae-lens wrote and both sides read, and equal values "
    "are seen to. Over the socket: the embedded model, puzzles of 163 tokens, its autoencoder of layer 2, one thread "
    "of torch on each side; the server has a process of its own. Sixteen texts are 26,000 features, 3.8 MB: packing "
    "and reading these takes twice as long as finding them. Circuits: the embedded model's transcoders, a puzzle of "
    f"118 tokens, its first answer cell. {circuits.NOTE}"
)


def run(rounds: int) -> list[Row]:
    """All rows."""
    return [*_topk(rounds), *_socket(rounds), *circuits.run(rounds)]


# --- the strongest features, against sae-lens


def _topk(rounds: int) -> list[Row]:
    rows = []
    for architecture in ("standard", "topk", "jumprelu"):
        times = _measured(architecture, rounds)
        name = f"top {K} of {TOKENS:,} tokens, {architecture}"
        measured = [milliseconds(times[base], times["ours"]) for base in ("theirs", "product")]
        rows += [
            Row(f"{name}, against sae-lens", "< 1", ratio(times, "ours", "theirs"), measured[0]),
            Row(f"{name}, against the bare product", "≤ 1.5", ratio(times, "ours", "product"), measured[1]),
        ]
    return rows


@torch.no_grad()
def _measured(architecture: str, rounds: int) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        _random(architecture).save_model(folder)
        theirs: Any = SAE.load_from_disk(folder)
        ours = read_autoencoder(folder).autoencoder
        x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1))
        works = {
            "product": lambda: x @ ours.W_enc,
            "theirs": lambda: torch.topk(theirs.encode(x), K, dim=-1),
            "ours": lambda: ours.topk(x, K),
        }
        expected = works["theirs"]()
        torch.testing.assert_close(works["ours"]()[0], expected.values, atol=1e-4, rtol=1e-4)
        assert expected.values.gt(0).all(), "fewer features are active than are compared"
        return in_turn(works, rounds)


def _random(architecture: str) -> Any:
    """Weights with which pre-activations are standard normal, less 2.17: 1.5 % are above 0."""
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "apply_b_dec_to_input": False,
        "metadata": {"hook_name": "blocks.0.hook_resid_post"},
    }
    extra = {"k": 64, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    sae: Any = SAE.from_dict(config | extra)
    draw = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(D_IN, FEATURES, generator=draw) / D_IN**0.5
    sae.W_dec.data = torch.randn(FEATURES, D_IN, generator=draw) / D_IN**0.5
    sae.b_enc.data.fill_(0.0 if architecture == "jumprelu" else -2.17)
    if architecture == "jumprelu":
        sae.threshold.data.fill_(2.17)
    return sae


# --- over a socket


def _socket(rounds: int) -> list[Row]:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        local = LocalSession("demo", store=root / "local")
        texts = [
            Result.from_puzzle(gen_puzzle(n=3, m=3, n_train=4, seed=seed), local.model.tokenizer).prompt
            for seed in range(TEXTS)
        ]
        with (
            sightline(Path("demo"), root / "runs", "--store-dir", str(root / "store")) as server,
            ModelClient(server.url, server.model) as client,
        ):
            sessions = {"local": local, "remote": client}
            single, batch = (
                in_turn({name: _calls(one, given) for name, one in sessions.items()}, rounds)
                for given in (texts[0], texts)
            )
            steered = in_turn({name: _chat(server, changes) for name, changes in CHANGES.items()}, rounds)
    tokens = sum(len(local.model.tokenizer.encode(text)) for text in texts)
    speeds = ", ".join(f"{tokens / statistics.median(batch[name]):.0f}" for name in ("local", "remote"))
    return [
        _over("top 10 of one text, POST /features/topk over a socket against in process", single),
        _over(f"the same for {TEXTS} texts in one call", batch),
        Row("tokens per second in these calls (local, remote)", "", None, speeds),
        *(
            Row(
                f"a chat of {CHAT_TOKENS} tokens: {name}, against none",
                "",
                ratio(steered, name, "none"),
                milliseconds(steered["none"], steered[name]),
            )
            for name in CHANGES
            if name != "none"
        ),
    ]


def _calls(session: Any, given: Any) -> Any:
    return lambda: session.features_topk(given, layer=2, source="2-resid_post", k=K, show_progress=False)


def _chat(server: Server, changes: list[dict[str, Any]]) -> Any:
    """One chat, greedy, of so many tokens whatever it says."""
    messages: Any = [{"role": "user", "content": "hello"}]
    extra = server.extra | ({"interventions": changes} if changes else {})
    return lambda: server.client.chat.completions.create(
        model=server.model, messages=messages, temperature=0, max_tokens=CHAT_TOKENS, extra_body=extra
    )


def _over(name: str, times: Times) -> Row:
    return Row(name, "", ratio(times, "remote", "local"), milliseconds(times["local"], times["remote"]))
