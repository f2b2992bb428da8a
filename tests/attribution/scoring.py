"""Sessions with three stored samples, and the plain models that the oracles run: the same weights twice."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.model.load import trace_model
from attribution.operation import Operation
from attribution.operations import samples
from attribution.session import LocalSession
from tests.attribution.plain import prompts_of
from tests.models import D_MODEL, tiny_model, tiny_tokenizer, traced

DATASET = "puzzles"
PROMPTS = prompts_of([11, 8, 13])  # the samples 0, 1 and 2
LIMITS = {"float32": 1e-5, "float64": 1e-6}
"""Of the distance to an oracle: transformers computes norms and rotary tables in float32 whatever the dtype."""


@cache
def plain_model(family: str, dtype: str = "float32") -> Any:
    """What the oracles run."""
    return tiny_model(family).to(getattr(torch, dtype))


@cache
def _traced(family: str, dtype: str) -> Any:
    if dtype == "float32":
        return traced(family)
    return trace_model(f"tiny-{family}", tiny_model(family).to(getattr(torch, dtype)), tiny_tokenizer())


def stored_session(family: str, store: Path, dtype: str = "float32") -> LocalSession:
    """A session of a tiny model, in whose store the samples of `PROMPTS` are."""
    session = LocalSession(_traced(family, dtype), store=store)
    for number, tokens in enumerate(PROMPTS):
        ask(session, samples.forward, sample_id=number, token_ids=tokens)
    return session


def ask(session: LocalSession, operation: Operation[..., Any], **arguments: Any) -> Any:
    """Run an operation of sample 0, unless it is said otherwise."""
    given = {"dataset_id": DATASET, "sample_id": 0} | arguments
    if "sample_ids" in given:
        del given["sample_id"]
    return session.run(operation, given)


def random_grad(*shape: int, seed: int = 1) -> Tensor:
    """A gradient at the stream, [*shape, hidden], in float64."""
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
