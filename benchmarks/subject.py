"""What the attribution benchmarks work on: the model in a local session, plain transformers beside it, one sample."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import attribution.model  # noqa: F401  before nnsight

# isort: split
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from attribution.model.load import LoadSpec
from attribution.model.load import load as load_model
from attribution.session import LocalSession
from attribution.store import ActivationStore
from benchmarks.model import build

TOKENS = 256
DATASET = "bench"
RAM = 2**30


@dataclass(frozen=True)
class Subject:
    """The model of the benchmarks, three times.

    Attributes:
        session: a local session whose store keeps samples in memory beside their files.
        from_disk: one with the same folder and nothing kept in memory.
        plain: transformers' own model, which nothing wraps.
        numbers: for names of samples that were not stored yet.
    """

    folder: Path
    session: LocalSession
    from_disk: LocalSession
    plain: Any
    tokenizer: Any
    numbers: Iterator[int]

    def forward(self, tokens: int = TOKENS) -> int:
        """Run a new sample and store it; its id."""
        sample = next(self.numbers)
        self.session.forward(DATASET, sample, token_ids=token_ids(tokens, self.vocabulary))
        return sample

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.session.model.dimensions.d_vocab

    @torch.no_grad()
    def run_plain(self, tokens: int = TOKENS) -> Tensor:
        """One forward of transformers; the logits."""
        return self.plain(torch.tensor([token_ids(tokens, self.vocabulary)]), use_cache=False).logits


@contextmanager
def subject() -> Iterator[Subject]:
    """Build and load the model."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = build(root / "model")
        yield load(model, root / "store")


def load(model: Path, store: Path) -> Subject:
    """Load a model that was built."""
    traced = load_model(LoadSpec(str(model), dtype="float32"))
    session = LocalSession(traced, store=ActivationStore(store, RAM))
    from_disk = LocalSession(traced, store=ActivationStore(store, 0))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    return Subject(model, session, from_disk, plain, AutoTokenizer.from_pretrained(model), count())


def token_ids(tokens: int, vocabulary: int) -> list[int]:
    """A text of this length: the same tokens every time."""
    return torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def gradient(positions: int, width: int = 512) -> Tensor:
    """A downstream gradient."""
    return torch.randn(1, positions, width, generator=torch.Generator().manual_seed(positions))
