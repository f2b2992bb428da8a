"""A long `batch_forward`, to be killed: `python -m tests.attribution.long_batch STORE`."""

import sys
from pathlib import Path
from typing import Any

import beartype.door  # noqa: F401  before nnsight

from attribution.operations.samples import batch_forward
from attribution.session import LocalSession
from tests.attribution.plain import prompts_of
from tests.models import traced

PROMPTS = prompts_of([40 + i % 50 for i in range(300)])


def run(store: Path) -> dict[str, Any]:
    """Run the batch."""
    session = LocalSession(traced("qwen2"), store=store)
    return session.run(batch_forward, {"dataset_id": "long", "prompts": PROMPTS})


if __name__ == "__main__":
    run(Path(sys.argv[1]))
