"""The strongest features of each token.

1. The activations at the places of the sources are those that a run or a stored sample holds; where it holds none, one
   forward over the tokens gives them, of several texts in left-padded batches.
2. Only the rows of the positions asked for are encoded, those of a batch together, and the k largest are taken.
3. Features whose activation is 0 are not active and not listed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from attribution.activations import batches, padded
from attribution.errors import CannotFit, InvalidArgument, NotFinite
from attribution.features.places import Place, place_rows, place_stream
from attribution.features.source import Source
from attribution.model.capture import Stream, forward
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps
from attribution.prompts import token_text
from attribution.recorded import RecordedAnswer, recorded_rows
from attribution.stored import StoredSample

MOST_FEATURES = 1_000_000
"""The most features that one reply lists."""

Held = Callable[[Place, list[int]], Tensor | None]
"""What is held of a sequence at a place and some positions, [pos, *width]; None where it is not held."""


@dataclass(frozen=True)
class Tokens:
    """Tokens whose features are asked for.

    Attributes:
        token_ids: those that the model is given.
        positions: those that are asked for.
        held: activations that need not be computed.
        intervened: whether something was changed inside the model, so that a forward would give others.
    """

    token_ids: list[int]
    positions: list[int]
    held: Held = field(default=lambda place, positions: None, repr=False)
    intervened: bool = False


@dataclass(frozen=True)
class Found:
    """The strongest features of a sequence's positions by one source, strongest first, 0 where fewer are active."""

    source: Source
    activations: Literal["recorded", "computed"]
    values: Tensor
    indices: Tensor


def held_by_answer(model: TracedModel, answer: RecordedAnswer) -> Held:
    """The activations that a recorded answer holds."""
    return lambda place, positions: recorded_rows(model, answer, place_stream(model, place), positions)


def held_by_sample(model: TracedModel, sample: StoredSample) -> Held:
    """The activations that a stored sample holds: the streams between layers, z, and what MLPs write."""
    last = model.dimensions.n_layers

    def held(place: Place, positions: list[int]) -> Tensor | None:
        name, layer = {
            "resid_pre": ("resid", place.layer),
            "resid_post": ("resid", min(place.layer + 1, last)),
            "z": ("z", place.layer),
            "mlp_out": ("mlp_out", place.layer),
        }.get(place.point, ("", 0))
        return sample.read(name, layer, positions) if name else None

    return held


def strongest(
    model: TracedModel, sources: Sequence[Source], sequences: Sequence[Tokens], k: int
) -> Steps[list[list[Found]]]:
    """The k strongest features of every sequence by every source; one step per batch.

    Raises:
        InvalidArgument: the reply would be too large, or a steered answer does not hold what would have to be computed.
        CannotFit: there is no memory for the activations or the weights.
        NotFinite: an activation is NaN or inf.
    """
    _check_size(sources, sequences, k)
    rows: list[dict[Place, Tensor]] = [_held_rows(sources, one) for one in sequences]
    missing = [_missing(sources, held) for held in rows]
    recorded = [set(held) for held in rows]
    found: list[list[Found]] = [[] for _ in sequences]
    done = 0
    for batch in batches([len(one.token_ids) for one in sequences]):
        places = sorted({place for index in batch for place in missing[index]}, key=str)
        if places:
            captured = _captured(model, [sequences[index] for index in batch], places)
            for index, computed in zip(batch, captured, strict=True):
                rows[index] = {place: computed[place] for place in missing[index]} | rows[index]
        for source in sources:
            encoded = _encoded(model, source, [rows[index][source.reads] for index in batch], k)
            for index, (values, indices) in zip(batch, encoded, strict=True):
                origin = "recorded" if source.reads in recorded[index] else "computed"
                found[index].append(Found(source, origin, values, indices))
        for index in batch:
            rows[index] = {}
        done += len(batch)
        yield Progress(done, len(sequences))
    return found


def _held_rows(sources: Sequence[Source], sequence: Tokens) -> dict[Place, Tensor]:
    held = {source.reads: sequence.held(source.reads, sequence.positions) for source in sources}
    return {place: rows for place, rows in held.items() if rows is not None}


def _missing(sources: Sequence[Source], held: dict[Place, Tensor]) -> list[Place]:
    return list(dict.fromkeys(source.reads for source in sources if source.reads not in held))


def _check_size(sources: Sequence[Source], sequences: Sequence[Tokens], k: int) -> None:
    listed = sum(len(one.positions) for one in sequences) * len(sources) * k
    if listed > MOST_FEATURES:
        raise InvalidArgument(
            f"the reply would list up to {listed:,} features, and {MOST_FEATURES:,} is the most: ask for fewer "
            "positions, texts or layers at a time, or for a smaller k",
            param="k",
        )


def _captured(model: TracedModel, sequences: Sequence[Tokens], places: Sequence[Place]) -> list[dict[Place, Tensor]]:
    """One forward: for each sequence the rows of its positions at each place."""
    for sequence in sequences:
        if sequence.intervened:
            raise InvalidArgument(
                f"this answer was given with interventions, and its savepoints do not hold {places[0]} at these "
                "positions; a forward without the interventions would give other activations. Record the place with "
                "the chat, or give the tokens as token_ids to see them without the interventions",
                param="run_id",
            )
    streams = {place: place_stream(model, place) for place in places}
    _check_room(model, list(streams.values()), sequences)
    _, captured = forward(model, padded(model, [one.token_ids for one in sequences]), streams.values())
    found = []
    for row, one in enumerate(sequences):
        at = torch.tensor(one.positions)
        found.append({place: captured[stream][0, row, -len(one.token_ids) :][at] for place, stream in streams.items()})
    return found


def _check_room(model: TracedModel, streams: Sequence[Stream], sequences: Sequence[Tokens]) -> None:
    """The activations are in memory twice for a moment: as they were caught, and stacked."""
    widths = sum(torch.Size(model.sites[stream.sites[0]].shape).numel() for stream in streams)
    tokens = len(sequences) * max(len(one.token_ids) for one in sequences)
    needed, there = 2 * widths * tokens * model.dtype.itemsize, psutil.virtual_memory().available
    if needed > there:
        raise CannotFit(
            f"the activations of {tokens} tokens at {len(streams)} places take {needed:,} bytes and {there:,} are "
            "free: name one layer at a time, or give a shorter text",
            param="layer",
        )


@torch.no_grad()
def _encoded(model: TracedModel, source: Source, rows: list[Tensor], k: int) -> list[tuple[Tensor, Tensor]]:
    """The k strongest features of the rows of several sequences, encoded together, on the CPU."""
    read = place_rows(model, source.reads, torch.cat(rows))
    values, indices = source.autoencoder(model.device, model.work_dtype).topk(read, k)
    values, indices = values.cpu(), indices.cpu()
    if not (read.isfinite().all() and values.isfinite().all()):
        raise NotFinite(f"the activations at {source.reads} hold NaN or inf, which have no features")
    lengths = [len(one) for one in rows]
    return list(zip(values.split(lengths), indices.split(lengths), strict=True))


# --- in words


def described(
    model: TracedModel, sequences: Sequence[Tokens], found: Sequence[Sequence[Found]], *, include_descriptions: bool
) -> list[list[dict[str, Any]]]:
    """The tokens of every sequence with their features, as JSON."""
    special = special_tokens(model)
    asked = {one.token_ids[position] for one in sequences for position in one.positions}
    said = {
        token: {"token": token_text(model, token), "token_id": token, "is_special": token in special} for token in asked
    }
    return [
        _tokens(one, mine, said, include_descriptions=include_descriptions)
        for one, mine in zip(sequences, found, strict=True)
    ]


def special_tokens(model: TracedModel) -> set[int]:
    """The ids of the special tokens: those with a role (bos, eos, …) and all others that the vocabulary calls special.

    The marks of a chat template are often only the latter, as <|eot_id|> of Llama 3.
    """
    tokenizer: Any = model.tokenizer
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def _tokens(
    sequence: Tokens, found: Sequence[Found], said: dict[int, dict[str, Any]], *, include_descriptions: bool
) -> list[dict[str, Any]]:
    columns = [(one.source, one.values.tolist(), one.indices.tolist()) for one in found]
    tokens = []
    for row, position in enumerate(sequence.positions):
        features = [
            _feature(source, index, value, include_descriptions=include_descriptions)
            for source, values, indices in columns
            for value, index in zip(values[row], indices[row], strict=True)
            if value > 0
        ]
        tokens.append({"position": position, **said[sequence.token_ids[position]], "features": features})
    return tokens


def _feature(source: Source, index: int, value: float, *, include_descriptions: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"index": index, "activation": value}
    if include_descriptions:
        said["description"] = source.descriptions.of(index)
    return said | {"layer": source.layer, "source": source.name}
