"""Before a model is loaded: whether there is one of this name, and whether memory holds it."""

from pathlib import Path

import psutil
import torch
from transformers.utils.hub import cached_file

from attribution.errors import CannotFit, ModelNotFound
from attribution.model.hub import needed_bytes, resolve_alias
from attribution.model.load import LoadSpec


def check_known(names: list[str]) -> None:
    """See that each name is a folder with a model, one of the cache, or one that the hub gives out.

    Raises:
        ModelNotFound: naming all that are none, each with the reason.
    """
    reasons = {name: reason for name in names if (reason := _unknown(name)) is not None}
    if reasons:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        raise ModelNotFound(f"there is no such model, and nothing was loaded: {told}", param="models")


def _unknown(name: str) -> str | None:
    try:
        _config_file(name)
        return None
    except (OSError, ValueError) as error:  # ValueError: a name that no repository can have
        return " ".join(str(error).split())[:300]


def _config_file(name: str) -> Path:
    """The config of a folder, of the cache, or fetched from the hub.

    Raises:
        OSError, ValueError: there is none.
    """
    source = Path(resolve_alias(name))
    if source.is_dir():
        if not (file := source / "config.json").is_file():
            raise FileNotFoundError(f"the folder {str(source)!r} has no config.json")
        return file
    found = cached_file(str(source), "config.json")
    if found is None:
        raise FileNotFoundError("it has no config.json")
    return Path(found)


def check_fits(spec: LoadSpec) -> None:
    """See that the free memory holds a model, as far as the headers of its files tell.

    Raises:
        CannotFit: it does not.
    """
    needed = needed_bytes(_config_file(spec.model_id).parent, spec.dtype)
    there = psutil.virtual_memory().available
    if torch.cuda.is_available() and spec.device_map != "cpu":
        there += sum(torch.cuda.mem_get_info(one)[0] for one in range(torch.cuda.device_count()))
    if needed is not None and needed > there:
        raise CannotFit(
            f"{spec.model_id!r} takes about {needed:,} bytes and {there:,} are free; unload another model first",
            param="models",
        )
