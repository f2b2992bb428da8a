"""Chats beside attribution: 8 clients of each kind on one served model, over real sockets.

1. What every client is to get is computed first, one call at a time, by the same server.
2. In every round the chats run alone, the attribution runs alone, and both run at once; chats come one after the
   other from each client, and attribution goes on until the last chat is answered.
3. Every answer is compared with that of step 1: texts must be the same, tensors equal up to rounding.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import attribution.model  # noqa: F401  before nnsight

# isort: split
import torch
from torch import Tensor

from benchmarks.model import build, prompt
from benchmarks.servers import Server, sightline
from benchmarks.subject import DATASET, TOKENS, gradient, token_ids
from benchmarks.table import Row
from clients import ModelClient

CLIENTS = 8
CHATS = 2  # of each client in a round
NEW_TOKENS = 48
ALONE_SECONDS = 3.0
AT = [100, 254]
NOTE = (
    "8 clients with the OpenAI SDK (2 streamed chats of 48 tokens each per round, greedy) and 8 with ModelClient, each "
    "on samples of its own of 256 tokens, one call after the other: a forward that is stored, the lm_head gradient, "
    "residual attribution of it, mlp_i at all positions, attn_q of all heads at 2 positions, an attention pattern; "
    "gradients are integrated. The clients share the cores with the server. In a cell: alone first, then beside the "
    "other kind."
)


@dataclass
class Tally:
    """What clients got in one phase; appended to from their threads."""

    first_tokens: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    seconds: float = 0.0


def run(rounds: int) -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = build(root / "model")
        with sightline(model, root / "runs", "--store-dir", str(root / "store")) as server:
            return _rows(_measure(server, rounds))


def _measure(server: Server, rounds: int) -> list[dict[str, Tally]]:
    found: list[dict[str, Tally]] = []
    with ExitStack() as stack:
        clients = [stack.enter_context(ModelClient(server.url, server.model)) for _ in range(CLIENTS)]
        texts = [_chat(server, index)[1] for index in range(CLIENTS)]
        expected = [list(_scores(client, f"quiet-{index}", index)) for index, client in enumerate(clients)]
        bench = Bench(server, clients, texts, expected)
        for round_ in range(rounds + 1):
            phases = {"chats": bench.chats(), "scores": bench.scores(ALONE_SECONDS), "both": bench.both()}
            if round_:
                found.append(phases)
    return found


@dataclass(frozen=True)
class Bench:
    """The clients, and what they must get."""

    server: Server
    clients: list[ModelClient]
    texts: list[str]
    expected: list[list[tuple[str, Tensor]]]

    def chats(self) -> Tally:
        """The chats alone."""
        tally = Tally()
        self._chats(tally)
        return tally

    def scores(self, seconds: float) -> Tally:
        """Attribution alone, for some seconds."""
        tally, stop = Tally(), threading.Event()
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        self._scores(tally, stop)
        return tally

    def both(self) -> Tally:
        """Both at once."""
        tally, stop = Tally(), threading.Event()
        attributing = threading.Thread(target=self._scores, args=(tally, stop))
        attributing.start()
        time.sleep(0.5)  # until all of them are at work
        try:
            self._chats(tally)
        finally:
            stop.set()
            attributing.join()
        return tally

    def _chats(self, tally: Tally) -> None:
        def one(index: int) -> None:
            for _ in range(CHATS):
                first, text = _chat(self.server, index)
                tally.first_tokens.append(first)
                _count(tally, f"chat {index}", text == self.texts[index])

        start = time.perf_counter()
        _all(one)
        tally.seconds = time.perf_counter() - start

    def _scores(self, tally: Tally, stop: threading.Event) -> None:
        def one(index: int) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                # a sample that nobody stored yet: each of these runs the model
                name = f"{index}-{turn}-{time.time_ns()}"
                self._one_sample(tally, index, name)

        _all(one)

    def _one_sample(self, tally: Tally, index: int, name: str) -> None:
        start = time.perf_counter()
        got = _scores(self.clients[index], name, index)
        for (what, ours), (_, theirs) in zip(got, self.expected[index], strict=True):
            end = time.perf_counter()
            tally.calls.append(end - start)
            _count(tally, f"{what} {index}", ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-4, 1e-5))
            start = time.perf_counter()


def _all(work: Callable[[int], None]) -> None:
    """Run `work` for every client at once; what one of them raises is raised."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, range(CLIENTS)))


def _count(tally: Tally, what: str, right: bool) -> None:
    tally.answers += 1
    if not right:
        tally.wrong.append(what)


def _chat(server: Server, index: int) -> tuple[float, str]:
    """Seconds to the first piece of text of a streamed chat, and its whole text."""
    start = time.perf_counter()
    stream = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt(index)}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body=server.extra,
    )
    first, text = None, ""
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            text += chunk.choices[0].delta.content
    assert first is not None, "a chat without text"
    return first, text


def _scores(client: ModelClient, sample: str, index: int) -> Iterator[tuple[str, Tensor]]:
    """One attribution client's calls, each with the tensor that it answers."""
    tokens = token_ids(TOKENS + index, 512)[:TOKENS]
    stored = client.forward(DATASET, sample, token_ids=tokens)
    assert stored["stored"], stored
    yield "forward", torch.tensor(stored["token_ids"])
    grad = client.compute_node_gradient(DATASET, sample, "lm_head", 8, pos_ids=AT, labels=[7, 11])
    yield "lm_head", grad
    yield "residual", client.attribute_residual(DATASET, sample, AT, [grad], [8.0])
    everywhere, grad = list(range(TOKENS)), gradient(TOKENS)
    yield "mlp_i", client.compute_node_gradient(DATASET, sample, "mlp_i", 4, pos_ids=everywhere, output_grad=grad)
    yield "attn_q", client.compute_node_gradient(DATASET, sample, "attn_q", 4, pos_ids=AT, output_grad=gradient(2))
    yield "pattern", client.get_attn_weights(DATASET, sample, 3, head=1)


def _rows(rounds: list[dict[str, Tally]]) -> list[Row]:
    def median(number: Callable[[dict[str, Tally]], float]) -> float:
        return statistics.median(number(phases) for phases in rounds)

    def longest(phase: str, which: str) -> float:
        return max(max(getattr(phases[phase], which)) for phases in rounds)

    tokens = CLIENTS * CHATS * NEW_TOKENS
    alone, beside = median(lambda one: tokens / one["chats"].seconds), median(lambda one: tokens / one["both"].seconds)
    answers = sum(tally.answers for phases in rounds for tally in phases.values())
    wrong = [what for phases in rounds for tally in phases.values() for what in tally.wrong]
    first = {
        phase: median(lambda one, phase=phase: statistics.median(one[phase].first_tokens))
        for phase in ("chats", "both")
    }
    wait = {phase: longest(phase, "first_tokens") for phase in ("chats", "both")}
    call = {phase: median(lambda one, phase=phase: statistics.median(one[phase].calls)) for phase in ("scores", "both")}
    shown = f"{answers - len(wrong)} of {answers}" + (f"; wrong: {', '.join(sorted(set(wrong)))}" if wrong else "")
    return [
        Row("answers equal to those of a quiet run, none lost", "= 1", (answers - len(wrong)) / answers, shown),
        Row(
            "8 chats at once, beside attribution against alone (tokens/s)",
            "",
            median(lambda one: one["chats"].seconds / one["both"].seconds),
            f"{alone:.0f}, {beside:.0f} tokens/s",
        ),
        _delay("first token of a chat, median", first["chats"], first["both"]),
        _delay("first token of a chat, the longest wait of all rounds", wait["chats"], wait["both"]),
        _delay("one call for attribution, median", call["scores"], call["both"]),
        _delay(
            "one call for attribution, the longest of all rounds", longest("scores", "calls"), longest("both", "calls")
        ),
    ]


def _delay(name: str, base: float, ours: float) -> Row:
    return Row(name, "", ours / base, f"{base * 1000:.0f}, {ours * 1000:.0f} ms")
