"""From a folder to a source of a model: read what it says of itself, and refuse what does not fit.

1. The config and the header of the weights say where it reads and writes, its widths, and the model it was trained on.
2. What the caller says fills in what the config leaves open; where both say something they must agree.
3. The places must be in the model, of the widths that the weights have.
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from attribution.errors import InvalidArgument, SourceMismatch
from attribution.features.descriptions import Descriptions, read_descriptions
from attribution.features.places import Place, parse_place, place_stream
from attribution.features.reading import read_sizes
from attribution.features.source import Source
from attribution.features.weights import KeptWeights
from attribution.model.hub import resolve_alias
from attribution.model.traced import TracedModel

_LAYER = re.compile(r"(\d{1,4})-")  # Neuronpedia's ids of sources begin with the layer
_CACHED = re.compile(r"models--(.+?)/snapshots/")


@dataclass(frozen=True)
class Declaration:
    """A source as it was declared, before it is held against its model.

    Attributes:
        model: the model it is for, as it is loaded: a hub id, an alias, a folder, or "demo".
        folder: of the weights.
        name: of the source; None makes one of layer and point, as "2-resid_post".
        point, writes: where it reads and writes; None is what its config says.
        descriptions: a file or a folder; None is none.
        source_id: whose rows of the descriptions are meant.
        model_name: the name that its config has for this model, when that is none of the model's own.
        origin: who declared it, for people.
    """

    model: str
    folder: Path
    name: str | None = None
    point: str | None = None
    writes: str | None = None
    descriptions: Path | None = None
    source_id: str | None = None
    model_name: str | None = None
    origin: str = "load_features"

    def is_for(self, model: TracedModel) -> bool:
        """Whether it was declared for this model."""
        asked = resolve_alias(self.model)
        return asked in (model.id, model.source) or (Path(asked).is_dir() and _same_folder(asked, model.source))


def _same_folder(one: str, other: str) -> bool:
    return Path(other).is_dir() and Path(one).samefile(other)


def read_source(model: TracedModel, declared: Declaration, weights: KeptWeights) -> Source:
    """The source that is declared, once it is seen to fit the model.

    Raises:
        SourceMismatch: it is of another model, or its places or widths are not the model's.
        InvalidArgument: a place is missing or is none, or the descriptions cannot be read.
        StorageFailed, InvalidArgument: its folder cannot be read.
        UnsupportedModel: the points of the model are not proved.
    """
    sizes = read_sizes(declared.folder)
    check_model(model, sizes.model_name, declared.model_name)
    reads = _agreed("point", declared.point, sizes.reads, sizes.hook)
    if reads is None:
        raise InvalidArgument(
            f"{declared.folder} does not say where it reads in words that are known (it says {sizes.hook!r}); give "
            "point, as 'resid_post[2]'",
            param="point",
        )
    writes = _agreed("writes", declared.writes, sizes.writes if sizes.is_transcoder else None, None)
    if writes is None and sizes.is_transcoder:
        raise InvalidArgument(
            f"{declared.folder} is a transcoder and does not say where it writes; give writes, as "
            f"'mlp_out[{reads.layer}]'",
            param="writes",
        )
    if writes not in (None, reads) and not sizes.is_transcoder:
        raise SourceMismatch(
            f"writes is {writes}, and {declared.folder} is no transcoder: it writes where it reads, at {reads}",
            param="writes",
        )
    found = Source(
        name=declared.name or f"{reads.layer}-{reads.point}",
        model_id=model.id,
        folder=declared.folder,
        reads=reads,
        writes=writes or reads,
        n_features=sizes.n_features,
        d_in=sizes.d_in,
        d_out=sizes.d_out,
        architecture=sizes.architecture,
        dtype=sizes.dtype,
        k=sizes.k,
        prepend_bos=sizes.prepend_bos,
        descriptions=_described(declared, sizes.n_features, reads),
        weights=weights,
    )
    check_source(model, found)
    return found


def _described(declared: Declaration, n_features: int, reads: Place) -> Descriptions:
    if declared.descriptions is None and declared.source_id is None:
        return Descriptions()
    if declared.descriptions is None:
        raise InvalidArgument(
            f"source_id is {declared.source_id!r}, and there are no descriptions: give them, or leave it out",
            param="source_id",
        )
    found = read_descriptions(declared.descriptions, n_features, declared.source_id)
    layer = _LAYER.match((found.source or "").rpartition("/")[2])
    if declared.source_id is None and layer is not None and int(layer[1]) != reads.layer:
        raise InvalidArgument(
            f"{declared.descriptions} describes the features of {found.source!r}, and the autoencoder reads at "
            f"{reads}; if they belong together, say so with source_id={found.source!r}",
            param="descriptions",
        )
    return found


def _agreed(param: str, given: str | None, said: Place | None, hook: str | None) -> Place | None:
    """The place that the caller names, that the config names, or both."""
    place = None if given is None else parse_place(given, param)
    if place is not None and said is not None and place != said:
        where = "" if hook is None else f" ({hook!r} in its cfg.json)"
        raise SourceMismatch(
            f"{param} is {place}, and the autoencoder is of {said}{where}; leave {param} out, or take another folder",
            param=param,
        )
    return place or said


# --- the model


def check_model(model: TracedModel, said: str | None, model_name: str | None = None) -> None:
    """See that the model an autoencoder was trained on, as its config names it, is this one.

    Args:
        said: the name in the config; None says nothing, and only places and widths can be checked.
        model_name: the caller's word that this name is the model's, however it is spelled.

    Raises:
        SourceMismatch: it is another's, or the config has another name than the caller says.
    """
    if model_name is not None:
        if said != model_name:
            raise SourceMismatch(
                f"model_name is {model_name!r}, and the autoencoder's config says {said!r}; give the name as the "
                "config has it, or leave model_name out",
                param="model_name",
            )
        return
    if said is None:
        return
    names = _names_of(model)
    own = resolve_alias(said)
    bare = own.rsplit("/", 1)[-1].lower()
    if not any(own.lower() == name.lower() or _bare_matches(own, bare, name) for name in names):
        raise SourceMismatch(
            f"the autoencoder was trained on {said!r}, and this model is {model.id!r}; load it for that model, or, "
            f"if this is the same model under another name, say so with model_name={said!r}",
            param="folder",
        )


def _names_of(model: TracedModel) -> set[str]:
    """The names of a model: its id, and the hub id or the folder it came from. Aliases stand for their hub ids."""
    names = {resolve_alias(model.id), model.source}
    names |= {found[1].replace("--", "/") for name in names if (found := _CACHED.search(f"{name}/"))}
    return names


def _bare_matches(own: str, bare: str, name: str) -> bool:
    """Whether two names differ only in what stands before the last slash, and one of them names no owner on the hub."""
    is_hub_id = name.count("/") == 1 and not Path(name).is_dir()
    return bare == name.rstrip("/").rsplit("/", 1)[-1].lower() and not ("/" in own and is_hub_id)


# --- the places


def check_source(model: TracedModel, source: Source) -> None:
    """See that the places of an autoencoder are in a model, and of its widths.

    Raises:
        SourceMismatch: its layer is not in the model, or a width is another one.
        UnsupportedModel: the points of the model are not proved.
    """
    _check_place(model, source, "reads", source.reads, source.d_in)
    _check_place(model, source, "writes", source.writes, source.d_out)


def _check_place(model: TracedModel, source: Source, does: str, place: Place, width: int) -> None:
    layers = model.dimensions.n_layers
    if not 0 <= place.layer < layers:
        raise SourceMismatch(
            f"the autoencoder {source.name!r} {does} at {place}, and {model.id!r} has the layers 0 to {layers - 1}",
            param="folder",
        )
    there = width_of(model, place)
    if there != width:
        raise SourceMismatch(
            f"the autoencoder {source.name!r} {does} rows of width {width}, and {place} of {model.id!r} has the width "
            f"{there}; is it an autoencoder of this model and place?",
            param="folder",
        )


def width_of(model: TracedModel, place: Place) -> int:
    """The width of the rows at a place of a model.

    Raises:
        SourceMismatch: the model has no rows there.
        UnsupportedModel: the points of the model are not proved.
    """
    stream = place_stream(model, place)
    seen = model.sites.get(stream.sites[0])
    if seen is None or not seen.tokenwise:
        raise SourceMismatch(f"{model.id!r} has no rows per token at {place}", param="point")
    shape: Any = stream.cut(torch.empty(seen.shape, device="meta")).shape
    return prod(shape)
