"""Random autoencoders on disk, and what they give by arithmetic of its own: what the tests of features read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place, parse_place
from attribution.features.writing import write_autoencoder
from tests.models import D_MODEL

N_FEATURES = 70


def random_autoencoder(d_in: int = D_MODEL, n_features: int = N_FEATURES, seed: int = 0, **changes: Any) -> Autoencoder:
    """A jumprelu autoencoder of random numbers, of which a part of the features is active on random rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values: dict[str, Any] = {
        "activation": "jumprelu",
        "W_enc": draw(d_in, n_features) / d_in**0.5,
        "b_enc": draw(n_features) / 3,
        "W_dec": draw(n_features, changes.pop("d_out", d_in)),
        "b_dec": draw(changes.pop("d_dec", d_in)) / 3,
        "threshold": draw(n_features).abs() / 3,
        "subtracts_b_dec": True,
    }
    return Autoencoder(**(values | changes))


def save_random(
    folder: Path, point: str = "resid_post[1]", writes: str | None = None, name: str | None = None, **changes: Any
) -> Path:
    """The folder of a random autoencoder that reads at `point`; one that writes elsewhere subtracts no b_dec."""
    prepend_bos = changes.pop("prepend_bos", None)
    if writes is not None:
        changes |= {"subtracts_b_dec": False}
    made = random_autoencoder(**changes)
    place: Place = parse_place(point)
    out = None if writes is None else parse_place(writes)
    return write_autoencoder(
        folder, made, reads=place, writes=out, model_name=name, prepend_bos=prepend_bos, replace=True
    )


def numpy_features(folder: Path, rows: Any) -> Any:
    """The activations of a saved jumprelu autoencoder: relu(p) where p = (x − b_dec) W + b is above the threshold."""
    weights = {name: tensor.double().numpy() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    subtracts = json.loads((folder / "cfg.json").read_text())["apply_b_dec_to_input"]
    x = np.asarray(rows, dtype=np.float64)
    pre = (x - weights["b_dec"] * subtracts) @ weights["W_enc"] + weights["b_enc"]
    return np.where((pre > weights["threshold"]) & (pre > 0), pre, 0.0)
