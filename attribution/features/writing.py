"""Autoencoders written to disk in the directory format of SAELens: sae-lens reads them, and so do we."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from attribution.errors import InvalidArgument, StorageFailed
from attribution.features.autoencoder import Autoencoder
from attribution.features.configs import ARCHITECTURES, CENTRED_POINTS, NORMALISATIONS
from attribution.features.places import Place, hook_name
from attribution.features.reading import CONFIG, WEIGHTS
from attribution.sample_file import temporary_name

_VERSION = "6.54.0"
"""The version of SAELens whose format this is."""


def write_autoencoder(
    folder: Path | str,
    autoencoder: Autoencoder,
    *,
    reads: Place,
    writes: Place | None = None,
    model_name: str | None = None,
    prepend_bos: bool | None = None,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write an autoencoder, whole or not at all.

    Args:
        reads: where it reads.
        writes: where what it decodes belongs; None is where it reads. Another place makes it a transcoder.
        model_name: the model that it was trained on.
        prepend_bos: whether it was trained on texts that begin with the special token.
        metadata: what else is to be kept in the config's metadata.
        replace: whether a folder that is there is replaced.

    Raises:
        InvalidArgument: the format has no such autoencoder, or the folder is there.
        StorageFailed: it cannot be written, and why.
    """
    folder = Path(folder)
    config = _config(autoencoder, reads, writes or reads)
    config["metadata"] |= dict(metadata or {}) | {"model_name": model_name, "prepend_bos": prepend_bos}
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgument(f"{folder} is there already; name another folder, or remove it", param="folder")
    hidden, old = folder.parent / temporary_name(), folder.parent / temporary_name()
    try:
        hidden.mkdir(parents=True)
        save_file(_tensors(autoencoder), hidden / WEIGHTS)
        (hidden / WEIGHTS).chmod(0o644)  # it is made for its owner's eyes alone, and a server may run as another
        (hidden / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False))
        if folder.exists():
            folder.rename(old)
        hidden.rename(folder)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):
            old.rename(folder)
        raise StorageFailed(f"{folder} cannot be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _config(autoencoder: Autoencoder, reads: Place, writes: Place) -> dict[str, Any]:
    transcoder = writes != reads
    architecture = _architecture(autoencoder, transcoder)
    if autoencoder.normalisation != "none" and autoencoder.restores == transcoder:
        raise InvalidArgument(
            "a normalisation is undone after an autoencoder, and not after a transcoder", param="writes"
        )
    if transcoder and autoencoder.subtracts_b_dec:
        raise InvalidArgument("a transcoder takes no b_dec off what it reads", param="writes")
    if autoencoder.centred and reads.point not in CENTRED_POINTS:
        raise InvalidArgument(f"at {reads} nothing is centred; {', '.join(CENTRED_POINTS)} are", param="reads")
    kwargs = {"center_writing_weights": True} if autoencoder.centred else {}
    hook_out = {"hook_name_out": hook_name(writes)} if transcoder else {}
    return {
        "architecture": architecture,
        "d_in": autoencoder.d_in,
        "d_sae": autoencoder.n_features,
        **({"d_out": autoencoder.d_out} if transcoder else {}),
        **({"k": autoencoder.k} if autoencoder.activation == "topk" else {}),
        **({"rescale_acts_by_decoder_norm": autoencoder.rescaled} if autoencoder.activation == "topk" else {}),
        "dtype": str(autoencoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": autoencoder.subtracts_b_dec,
        "normalize_activations": next(
            theirs for theirs, ours in NORMALISATIONS.items() if ours == autoencoder.normalisation
        ),
        "reshape_activations": "hook_z" if reads.point == "z" and not transcoder else "none",
        "metadata": {
            "sae_lens_version": _VERSION,
            "hook_name": hook_name(reads),
            **hook_out,
            "model_from_pretrained_kwargs": kwargs,
        },
    }


def _architecture(autoencoder: Autoencoder, transcoder: bool) -> str:
    found = (autoencoder.activation, transcoder, autoencoder.W_skip is not None)
    for name, one in ARCHITECTURES.items():
        if one == found and (autoencoder.activation == "topk" or not autoencoder.rescaled):
            return name
    what = f"{'a transcoder' if transcoder else 'an autoencoder'} with {autoencoder.activation!r}"
    also = [" and a skip connection"] * found[2] + [" and rescaled activations"] * autoencoder.rescaled
    raise InvalidArgument(f"the format does not have {what}{''.join(also)}", param="autoencoder")


def _tensors(autoencoder: Autoencoder) -> dict[str, Tensor]:
    skip, gate = autoencoder.W_skip, autoencoder.gate
    tensors = {
        "W_enc": autoencoder.W_enc,
        "W_dec": autoencoder.W_dec,
        "b_dec": autoencoder.b_dec,
        "b_enc": autoencoder.b_enc,
        "threshold": autoencoder.threshold,
        "W_skip": None if skip is None else skip.T,
        **({} if gate is None else {"b_gate": gate.b_gate, "b_mag": gate.b_mag, "r_mag": gate.r_mag}),
    }
    # a clone, as the format takes no two tensors that share memory
    return {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items() if one is not None}
