"""Attribution: cost and peak memory against the number of tokens.

Memory is measured in a process of its own (`python -m benchmarks.tokens MODEL`), where nothing else allocates: before
each call the heap is trimmed and the kernel's high-water mark of resident memory is set back; the peak is how far the
mark rises above what was resident. Temporaries of torch count, and so do results and samples kept in memory.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.memory import peak
from benchmarks.subject import DATASET, Subject, gradient, load
from benchmarks.table import Row
from benchmarks.timing import Work, in_turn

LENGTHS = (128, 512, 2048)
NOTE = (
    "Median time, and how far resident memory rises above what it was before the call (high-water mark of a process of "
    'its own, weights and stored samples not counted; "forward that stores" keeps its sample in memory). The ratio is '
    "the time at 2048 tokens to that at 512: 4 is linear, 16 quadratic."
)


def operations(subject: Subject, tokens: int) -> dict[str, Work]:
    """What is measured, on a sample of this length."""
    sample, session = subject.forward(tokens), subject.session
    two, everywhere = [tokens // 2, tokens - 2], list(range(tokens))
    node = partial(session.compute_node_gradient, DATASET, sample)
    return {
        "forward (plain transformers)": partial(subject.run_plain, tokens),
        "forward that stores": partial(subject.forward, tokens),
        "lm_head, integrated, 2 positions": partial(node, "lm_head", 8, pos_ids=two, labels=[7, 7]),
        "residual attribution, 1 gradient, 2 positions": lambda: session.attribute_residual(
            DATASET, sample, two, [gradient(2)], [8.0]
        ),
        "mlp_i, integrated, all positions": partial(node, "mlp_i", 4, pos_ids=everywhere, output_grad=gradient(tokens)),
        "attn_q, integrated, all heads, 2 positions": partial(node, "attn_q", 4, pos_ids=two, output_grad=gradient(2)),
    }


def run(subject: Subject, rounds: int) -> list[Row]:
    """One row per operation."""
    works: dict[str, Work] = {}
    for tokens in LENGTHS:
        works |= {f"{name} {tokens}": work for name, work in operations(subject, tokens).items()}
    times, peaks = in_turn(works, rounds), _peaks_of_a_child(subject.folder)
    rows = []
    for name in peaks:
        medians = [statistics.median(times[f"{name} {tokens}"]) for tokens in LENGTHS]
        cells = [
            f"{tokens}: {median * 1000:.1f} ms, {peaks[name][str(tokens)] / 2**20:.0f} MiB"
            for tokens, median in zip(LENGTHS, medians, strict=True)
        ]
        rows.append(Row(f"cost against tokens: {name}", "", medians[2] / medians[1], "; ".join(cells)))
    return rows


def _peaks_of_a_child(model: Path) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "benchmarks.tokens", str(model)]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads(found.stdout.splitlines()[-1])


def peaks(subject: Subject) -> dict[str, dict[int, int]]:
    """Bytes by operation and length; in this process."""
    for work in operations(subject, 64).values():
        work()  # whatever is set up once
    found: dict[str, dict[int, int]] = {}
    for tokens in LENGTHS:
        for name, work in operations(subject, tokens).items():
            found.setdefault(name, {})[tokens] = peak(work)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        print(json.dumps(peaks(load(Path(sys.argv[1]), Path(store)))))
