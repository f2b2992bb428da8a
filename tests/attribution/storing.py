"""Made-up samples for the tests of the store: no model runs."""

from pathlib import Path

import torch
from torch import Tensor

from attribution.store import ActivationStore
from attribution.stored import Identity, StoredSample

LAYERS, D_MODEL, HEADS, D_HEAD = 3, 8, 2, 5
MODEL = Identity("toy", "/models/toy", "abc", "float32", "f" * 64)
OTHER = Identity("other", "/models/other", None, "float32", "0" * 64)
WIDTHS = {"resid": (D_MODEL,), "z": (HEADS, D_HEAD), "mlp_out": (D_MODEL,)}
TOKEN_BYTES = 4 * ((LAYERS + 1) * D_MODEL + LAYERS * HEADS * D_HEAD + LAYERS * D_MODEL)  # in float32


def tensors(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What is stored of a sample, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(LAYERS + (name == "resid"), tokens, *width, generator=generator).to(dtype)
        for name, width in WIDTHS.items()
    }


def written(
    store: ActivationStore, sample_id: int | str = 0, tokens: int = 6, identity: Identity = MODEL, dataset: str = "set"
) -> StoredSample:
    """Write a made-up sample; its seed is its length."""
    return store.write(dataset, sample_id, identity, list(range(tokens)), tensors(tokens, tokens))


def file_of(store: ActivationStore, sample_id: int | str = 0, dataset: str = "set") -> Path:
    """Where a sample lies."""
    return store.root / dataset / f"{sample_id}.safetensors"
