"""Which of a model's autoencoders a circuit is traced through, and by which method."""

from collections.abc import Sequence

from attribution.errors import InvalidArgument, SourceNotFound
from attribution.features.circuits.replacement import Transcoder
from attribution.features.source import Source
from attribution.features.sources import FeatureStore
from attribution.model.linearised import READ_AT
from attribution.model.traced import TracedModel

STREAM = ("resid_pre", "resid_post", "mlp_out")
"""Where an autoencoder of the stream can sit so that what it adds is added to the stream between two layers."""


def stands_for_mlp(source: Source) -> bool:
    """Whether it reads what an MLP reads and writes what that MLP writes."""
    return source.reads.point in READ_AT and (source.writes.point, source.writes.layer) == ("mlp_out", source.layer)


def of_stream(source: Source) -> bool:
    """Whether it takes apart a vector that is added to, or is, the stream between two layers."""
    return not source.is_transcoder and source.reads.point in STREAM


def choose_sources(features: FeatureStore, model: TracedModel, names: Sequence[str] | None) -> list[Source]:
    """The sources to trace through: transcoders, at most one for each layer, or one autoencoder of the stream.

    Args:
        names: None is the transcoders of the model, or where it has none, its one autoencoder of the stream.

    Raises:
        SourceNotFound: the model has none, or none of a name.
        InvalidArgument: they do not go together, or several fit.
    """
    if names is not None:
        if not names:
            raise InvalidArgument("sources is empty; leave it out, or name at least one", param="sources")
        return _checked([features.source(model, name) for name in dict.fromkeys(names)])
    has = features.of(model)
    if transcoders := [one for one in has if stands_for_mlp(one)]:
        return _checked(transcoders)
    streams = [one for one in has if of_stream(one)]
    if not streams:
        raise SourceNotFound(
            f"no transcoder and no autoencoder of the stream is loaded for {model.id!r}; it has "
            f"{_listed(has) or 'none'}. POST /features/load, or load_features(folder), adds one",
            param="sources",
        )
    return _checked(streams)


def _checked(chosen: list[Source]) -> list[Source]:
    transcoders = [one for one in chosen if stands_for_mlp(one)]
    if not transcoders:
        if len(chosen) == 1 and of_stream(chosen[0]):
            return chosen
        if all(of_stream(one) for one in chosen):
            raise InvalidArgument(
                "without transcoders a circuit goes through one autoencoder of the stream; name one of "
                f"{_listed(chosen)} with sources",
                param="sources",
            )
    if len(transcoders) < len(chosen):
        wrong = next(one for one in chosen if not stands_for_mlp(one) and (transcoders or not of_stream(one)))
        raise InvalidArgument(
            f"{wrong.name!r} reads {wrong.reads} and writes {wrong.writes}; a circuit goes through transcoders, which "
            f"read {', '.join(READ_AT)} and write mlp_out of the same layer, or through one autoencoder of "
            f"{', '.join(STREAM)} by itself",
            param="sources",
        )
    for one in transcoders:
        if len(same := [other for other in transcoders if other.layer == one.layer]) > 1:
            raise InvalidArgument(
                f"{_listed(same)} stand for the same MLP; name one of them for each layer with sources", param="sources"
            )
    return transcoders


def read_transcoders(model: TracedModel, sources: Sequence[Source]) -> dict[int, Transcoder]:
    """The transcoders by layer, in the dtype of the attribution."""
    return {
        one.layer: Transcoder(one.name, one.reads.point, one.autoencoder(model.device, model.work_dtype))
        for one in sources
    }


def _listed(sources: Sequence[Source]) -> str:
    return ", ".join(repr(one.name) for one in sources)
