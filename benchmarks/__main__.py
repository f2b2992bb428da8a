"""`python -m benchmarks [PART …] [--rounds N] [--out DIR]`: all parts, or those that are named."""

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.table import Section, write

DEFAULT_OUT = Path(__file__).parent


def serving(rounds: int) -> Iterator[Section]:
    """Chat against plain generation and against another server."""
    from benchmarks import serving

    yield Section.of("Serving", serving.run(rounds), rounds, serving.NOTE)


def attribution(rounds: int) -> Iterator[Section]:
    """What scores cost, also against other libraries, and against the number of tokens."""
    from benchmarks import attribution, peers, tokens
    from benchmarks.subject import subject

    with subject() as model:
        yield Section.of("Attribution", attribution.run(model, rounds), rounds, attribution.note())
        yield Section.of("Attribution against other libraries", peers.run(model, rounds), rounds, peers.NOTE)
        yield Section.of("Attribution against the number of tokens", tokens.run(model, rounds), rounds, tokens.NOTE)


def concurrency(rounds: int) -> Iterator[Section]:
    """Chats and attribution on one served model."""
    from benchmarks import concurrency

    yield Section.of("Chats beside attribution", concurrency.run(rounds), rounds, concurrency.NOTE)


def clustering(rounds: int) -> Iterator[Section]:
    """The distances of a thousand heads."""
    from benchmarks import clustering

    yield Section.of("Clustering of heads", clustering.run(rounds), rounds, clustering.NOTE)


def graphs(rounds: int) -> Iterator[Section]:
    """The workflow of graphs, here and through a server."""
    from benchmarks import graphs

    yield Section.of("Graphs", graphs.run(rounds), rounds, graphs.NOTE)


def interventions(rounds: int) -> Iterator[Section]:
    """Sweeps of knockouts against one call each."""
    from benchmarks import interventions
    from benchmarks.subject import subject

    with subject() as model:
        yield Section.of("Interventions", interventions.run(model, rounds), rounds, interventions.NOTE)


def features(rounds: int) -> Iterator[Section]:
    """The strongest features of a text against sae-lens, and circuits."""
    from benchmarks import features

    yield Section.of("Features", features.run(rounds), rounds, features.NOTE)


PARTS: dict[str, Callable[[int], Iterator[Section]]] = {
    "serving": serving,
    "attribution": attribution,
    "concurrency": concurrency,
    "clustering": clustering,
    "graphs": graphs,
    "interventions": interventions,
    "features": features,
}


def main() -> None:
    """Run what was asked for; what was measured is written as soon as its section is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where RESULTS.md and results.json are")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    for part in options.parts or PARTS:
        for section in PARTS[part](options.rounds):
            write([section], options.out)


if __name__ == "__main__":
    main()
