"""Published autoencoders, fetched by sae-lens once and kept in the format that is read without it.

1. sae-lens fetches a release, or reads a folder that we do not, and saves it for inference.
2. What we read of that is held against sae-lens itself on rows that make features fire, in float64.
3. Only what agrees is left in the folder.

A folder that we read (of SAELens or eai-sparsify) is written anew without sae-lens, and held against the original.
"""

import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.checks import mismatch
from attribution.errors import InvalidArgument, LibraryMissing, ModelLoadFailed, SourceNotFound, StorageFailed
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.reading import CONFIG, Read, read_autoencoder
from attribution.features.writing import write_autoencoder
from attribution.sample_file import temporary_name

_AGREES = 1e-8
"""The largest difference that is taken for rounding in float64, relative to the largest value."""


def convert_release(release: str, sae_id: str, folder: Path | str) -> Read:
    """Fetch an autoencoder that sae-lens knows by its release and id, and keep it in a folder.

    Raises:
        LibraryMissing: sae-lens is not installed.
        SourceNotFound: there is no such release or id.
        ModelLoadFailed: it could not be fetched or read; the message carries the reason.
        InvalidArgument: it computes what is not done, or the folder is there.
        StorageFailed: it cannot be written.
    """
    folder = _free(folder)
    library = _library()
    try:
        sae = _quietly(lambda: library.SAE.from_pretrained(release, sae_id, device="cpu"))
    except Exception as error:
        # the hub's error for a file that is neither here nor to be had is a ValueError as well
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise SourceNotFound(f"sae-lens finds no {sae_id!r} of {release!r}: {error}", param="release") from error
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelLoadFailed(f"{sae_id!r} of {release!r} could not be fetched: {reason[0]}") from error
    return _saved(sae.save_model, folder, sae)


def convert_folder(
    source: Path | str, folder: Path | str, *, reads: Place | None = None, writes: Place | None = None
) -> Read:
    """Write the autoencoder of a folder anew, in the format of SAELens.

    Args:
        reads, writes: its places, where its config does not say them.

    Raises:
        InvalidArgument: it computes what is not done, its place is not known, or the folder is there.
        LibraryMissing: only sae-lens reads it, and is not installed.
        ModelLoadFailed: sae-lens does not read it either; the message carries the reason.
        StorageFailed: a file cannot be read or written.
    """
    folder, source = _free(folder), Path(source)
    try:
        found = read_autoencoder(source)
    except InvalidArgument as error:
        if not (source / CONFIG).is_file():  # nothing that sae-lens could read either
            raise
        return _resaved(source, folder, error)
    reads, writes = reads or found.reads, writes or found.writes
    if reads is None or (found.is_transcoder and writes is None):
        raise InvalidArgument(
            f"the config in {source} does not say where it {'reads' if reads is None else 'writes'} ({found.hook!r}); "
            "name the place, as in --reads 'resid_post[2]'",
            param="writes" if reads else "reads",
        )
    hidden = folder.parent / temporary_name()
    try:
        write_autoencoder(
            hidden,
            found.autoencoder,
            reads=reads,
            writes=writes if found.is_transcoder else None,
            model_name=found.model_name,
            prepend_bos=found.prepend_bos,
        )
        again = read_autoencoder(hidden)
        _check_same(again.autoencoder, found.autoencoder.to(dtype=torch.float64).encode, "the folder that it came from")
        return _kept(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _resaved(source: Path, folder: Path, refused: InvalidArgument) -> Read:
    """The autoencoder of a folder that sae-lens reads and we do not, when saving it for inference mends that."""
    try:
        library = _library()
    except LibraryMissing as error:
        raise LibraryMissing(f"{refused.message}; {error.message}") from error
    for kind, save in ((library.SAE, "save_model"), (library.TrainingSAE, "save_inference_model")):
        with suppress(Exception):
            sae = _quietly(lambda kind=kind: kind.load_from_disk(str(source), device="cpu"))
            return _saved(getattr(sae, save), folder)
    raise refused


def _saved(save: Callable[[str], Any], folder: Path, original: Any = None) -> Read:
    """What sae-lens saves, when we read it and both compute the same; what was trained on is read anew by sae-lens."""
    hidden = folder.parent / temporary_name()
    try:
        hidden.mkdir(parents=True)
        save(str(hidden))
        found = read_autoencoder(hidden)
        own = original or _quietly(lambda: _library().SAE.load_from_disk(str(hidden), device="cpu"))
        own = own.to(dtype=torch.float64)
        heads = getattr(own.cfg, "reshape_activations", "none") == "hook_z"

        def encode(x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True) if found.centred else x  # which sae-lens leaves to the model
            return own.encode(x[:, None] if heads else x)

        _check_same(found.autoencoder, encode, "sae-lens")
        return _kept(hidden, folder)
    except OSError as error:
        raise StorageFailed(f"{folder} cannot be written: {error}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelLoadFailed(f"sae-lens could not save it: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _check_same(one: Autoencoder, encode: Callable[[Tensor], Tensor], whose: str) -> None:
    """See that two encoders agree, on random rows of several sizes and on rows that each make a feature fire."""
    one = one.to(dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(8, one.d_in, generator=draw, dtype=torch.float64) * 10.0 ** torch.arange(-1, 3).repeat(2)[:, None]
    )
    columns = one.W_enc[:, torch.randint(one.n_features, (8,), generator=draw)].T
    rows = torch.cat([rows, 100 * columns / columns.norm(dim=-1, keepdim=True).clamp(min=1e-8)])
    with torch.no_grad():
        expected, found = encode(rows).view(len(rows), -1), one.encode(rows)
    if expected.shape != found.shape:
        raise mismatch("autoencoder", f"activations of {list(found.shape)}", f"{list(expected.shape)}, as {whose} has")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-8))
    if not difference <= _AGREES:
        raise ModelLoadFailed(
            f"what was converted does not compute what {whose} computes (activations differ by {difference:.1e} of the "
            "largest), and was not kept; please report it with the release and id"
        )


def _free(folder: Path | str) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgument(f"{folder} is there already; name another folder, or remove it", param="folder")
    return folder


def _kept(hidden: Path, folder: Path) -> Read:
    try:
        hidden.rename(folder)
    except OSError as error:
        raise StorageFailed(f"{folder} cannot be written: {error}") from error
    return read_autoencoder(folder)


def _library() -> Any:
    try:
        return _quietly(lambda: __import__("sae_lens"))
    except ImportError as error:
        raise LibraryMissing("this is done with sae-lens: pip install 'sightline[sae]'") from error


def _quietly(work: Callable[[], Any]) -> Any:
    """sae-lens warns of much that is no concern of who converts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()
