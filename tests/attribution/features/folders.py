"""Folders of autoencoders, written by hand in the formats that others write."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from attribution.features.autoencoder import Autoencoder

METADATA = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small", "prepend_bos": True}


def saelens_tensors(one: Autoencoder) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder under the names of SAELens."""
    tensors = {"W_enc": one.W_enc, "W_dec": one.W_dec, "b_dec": one.b_dec}
    if one.b_enc is not None:
        tensors["b_enc"] = one.b_enc
    if one.threshold is not None:
        tensors["threshold"] = one.threshold
    if one.gate is not None:
        tensors |= {"b_gate": one.gate.b_gate, "b_mag": one.gate.b_mag, "r_mag": one.gate.r_mag}
    if one.W_skip is not None:
        tensors["W_skip"] = one.W_skip.T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def saelens_config(one: Autoencoder, architecture: str = "standard", **changes: Any) -> dict[str, Any]:
    """The cfg.json of SAELens 6; a change to None leaves a key out."""
    config = {
        "architecture": architecture,
        "d_in": one.d_in,
        "d_sae": one.n_features,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": one.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.1.0", **METADATA},
    }
    return {name: value for name, value in (config | changes).items() if value is not None}


def write_folder(folder: Path, config: Any, tensors: dict[str, torch.Tensor], weights: str = "sae_weights") -> Path:
    """A folder of a config, or of the text that is in its place, and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / f"{weights}.safetensors")
    return folder


def sparsify_config(one: Autoencoder, **changes: Any) -> dict[str, Any]:
    """The cfg.json of eai-sparsify."""
    return {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": one.n_features,
        "k": one.k,
        "multi_topk": False,
        "skip_connection": one.W_skip is not None,
        "transcode": False,
        "d_in": one.d_in,
    } | changes


def sparsify_tensors(one: Autoencoder) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder under the names of eai-sparsify."""
    assert one.b_enc is not None
    tensors = {"encoder.weight": one.W_enc.T, "encoder.bias": one.b_enc, "W_dec": one.W_dec, "b_dec": one.b_dec}
    if one.W_skip is not None:
        tensors["W_skip"] = one.W_skip.T
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
