"""Serving: chat against plain `generate`, many clients against one, and Sightline against `transformers serve`.

Every figure is a ratio of things measured in turn in the same run; the absolute numbers beside them say what this
machine did that day. All clients ask for 48 tokens, greedily;
"capture" is `resid_post[*]`, kept, written, and on disk when the answer arrives.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.model import build, prompt
from benchmarks.servers import Server, sightline, transformers_serve
from benchmarks.table import Row

TOKENS = 48
CLIENTS = 16
NOTE = (
    'All clients ask for 48 tokens, greedily; "capture" is `resid_post[*]`, on disk when the answer arrives. '
    "In a cell: the base first, then ours."
)
CAPTURE = {"savepoints": [{"name": "residual", "selector": "resid_post[*]"}]}


def chat(server: Server, index: int, capture: bool, tokens: int = TOKENS, words: int = 24) -> None:
    """One chat, not streamed."""
    extra = server.extra | (CAPTURE if capture else {})
    reply = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt(index, words)}],
        max_tokens=tokens,
        temperature=0,
        extra_body=extra,
    )
    assert reply.usage is None or reply.usage.completion_tokens == tokens, reply.usage
    if capture:
        files = reply.choices[0].message.activation_files  # type: ignore[attr-defined]
        assert Path(files["residual"]).is_file()


def first_token(server: Server, index: int, words: int = 24) -> float:
    """Seconds to the first piece of text of a streamed chat; the rest of it is read as well."""
    start = time.perf_counter()
    stream = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt(index, words)}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body=server.extra,
    )
    found = None
    for chunk in stream:
        if found is None and chunk.choices and chunk.choices[0].delta.content:
            found = time.perf_counter() - start
    assert found is not None
    return found


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def together(server: Server, clients: int, capture: bool) -> float:
    """Seconds until `clients` chats, sent at once, are all answered."""
    with ThreadPoolExecutor(clients) as pool:
        return seconds(lambda: list(pool.map(lambda i: chat(server, i, capture), range(clients))))


class Plain:
    """transformers' own `generate` on the same model, in this process."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def generate(self, rows: int = 1) -> None:
        """48 tokens for each of `rows` prompts."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt(i)}], add_generation_prompt=True, tokenize=False
            )
            for i in range(rows)
        ]
        batch = self.tokenizer(texts, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            output = self.model.generate(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=TOKENS,
                do_sample=False,
            )
        assert output.shape[1] == batch["input_ids"].shape[1] + TOKENS


def run(rounds: int = 5) -> list[Row]:
    """All serving benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = build(root / "model")
        plain = Plain(model)
        with sightline(model, root / "runs") as ours:
            rows = _single(plain, ours, rounds) + _many(plain, ours, rounds) + _arrival(ours, rounds)
            print(*rows, sep="\n", file=sys.stderr)
            for options in ((), ("--continuous-batching", "--cb-num-blocks", "256")):
                with transformers_serve(model, *options) as theirs:
                    rows += _against(ours, theirs, rounds)
                    print(*rows[-3:], sep="\n", file=sys.stderr)
    return rows


def _single(plain: Plain, ours: Server, rounds: int) -> list[Row]:
    times: dict[str, list[float]] = {"plain": [], "chat": [], "capture": []}
    work = {
        "plain": plain.generate,
        "chat": lambda: chat(ours, 0, False),
        "capture": lambda: chat(ours, 0, True),
    }
    for round_ in range(rounds + 1):
        for name, do in work.items():
            taken = seconds(do)
            if round_:
                times[name].append(taken)
    return [
        _ratio("one chat against plain generate (tokens/s)", "≥ 0.9", times["plain"], times["chat"]),
        _ratio("the same with capture", "≥ 0.8", times["plain"], times["capture"]),
    ]


def _many(plain: Plain, ours: Server, rounds: int) -> list[Row]:
    alone: list[float] = []
    all_: list[float] = []
    batch: list[float] = []
    single: list[float] = []
    for round_ in range(rounds + 1):
        taken = (
            seconds(lambda: [chat(ours, i, True) for i in range(4)]) * CLIENTS / 4,
            together(ours, CLIENTS, True),
            seconds(plain.generate) * CLIENTS,
            seconds(lambda: plain.generate(CLIENTS)),
        )
        if round_:
            for kept, one in zip((alone, all_, single, batch), taken, strict=True):
                kept.append(one)
    return [
        _ratio("16 chats at once with capture against one at a time (tokens/s)", "≥ 6", alone, all_, CLIENTS),
        _ratio("the ceiling: plain generate, a batch of 16 against one at a time", "", single, batch, CLIENTS),
    ]


def _arrival(ours: Server, rounds: int) -> list[Row]:
    """Time to the first token alone, and for one that comes while 15 others generate."""
    alone, busy, steps = [], [], []
    for round_ in range(rounds + 1):
        quiet = first_token(ours, 99)
        threads = [threading.Thread(target=chat, args=(ours, i, True, 4 * TOKENS)) for i in range(CLIENTS - 1)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        time.sleep(1.5)  # until all of them are being decoded
        late = first_token(ours, 99)
        for thread in threads:
            thread.join()
        step = (time.perf_counter() - start) / (4 * TOKENS)
        if round_:
            alone.append(quiet)
            busy.append(late)
            steps.append(2 * step + quiet)
    return [
        Row("first token alone", "", None, f"{statistics.median(alone) * 1000:.0f} ms"),
        _delay("first token while 15 others generate, against two steps and its own time alone", "≤ 1", steps, busy),
    ]


def _against(ours: Server, theirs: Server, rounds: int) -> list[Row]:
    pairs: dict[str, list[tuple[float, float]]] = {"1 client": [], "16 clients": [], "first token of 16": []}
    for round_ in range(rounds + 1):
        taken = {
            "1 client": (seconds(lambda: chat(theirs, 0, False)), seconds(lambda: chat(ours, 0, True))),
            "16 clients": (together(theirs, CLIENTS, False), together(ours, CLIENTS, True)),
            "first token of 16": (_first_tokens(theirs), _first_tokens(ours)),
        }
        if round_:
            for name, pair in taken.items():
                pairs[name].append(pair)
    rows = []
    for name, measured in pairs.items():
        their_times, our_times = [p[0] for p in measured], [p[1] for p in measured]
        if name.startswith("first"):
            row = _delay(f"against {theirs.name}: {name} clients, median", "< 1", their_times, our_times)
        else:
            count = CLIENTS if name == "16 clients" else 1
            row = _ratio(
                f"against {theirs.name}: {name}, our capture on (tokens/s)", "> 1", their_times, our_times, count
            )
        rows.append(row)
    return rows


def _first_tokens(server: Server) -> float:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return statistics.median(pool.map(lambda i: first_token(server, i), range(CLIENTS)))


def _ratio(name: str, aim: str, base: list[float], ours: list[float], clients: int = 1) -> Row:
    """How many times the tokens/s of `base` ours are, from times of the same rounds."""
    ratio = statistics.median(b / o for b, o in zip(base, ours, strict=True))
    first, second = (clients * TOKENS / statistics.median(times) for times in (base, ours))
    return Row(name, aim, ratio, f"{first:.0f}, {second:.0f} tokens/s")


def _delay(name: str, aim: str, base: list[float], ours: list[float]) -> Row:
    """How many times the delay of `base` ours is, from times of the same rounds."""
    ratio = statistics.median(o / b for b, o in zip(base, ours, strict=True))
    first, second = (statistics.median(times) * 1000 for times in (base, ours))
    return Row(name, aim, ratio, f"{first:.0f}, {second:.0f} ms")
