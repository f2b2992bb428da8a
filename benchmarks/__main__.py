"""`python -m benchmarks [--rounds N] [--out DIR]`."""

import argparse
import os
import warnings
from pathlib import Path

from benchmarks import serving, table


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    table.write(serving.run(options.rounds), options.rounds, options.out)


if __name__ == "__main__":
    main()
