"""Activations as a shuffled stream of rows: what autoencoders are trained on and measured with.

1. Samples are taken a few at a time, sorted by length into batches, and run once; every place is captured in the same
   forward.
2. The rows that a sample keeps go into a buffer, at the same index for every place.
3. When the buffer is full it is shuffled, and half of it is handed out in batches; the other half stays, and mixes with
   what comes next.

Memory: `buffer_rows` rows of every place in float32, and one batch of the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attribution.activations import batches, padded
from attribution.errors import InvalidArgument
from attribution.features.places import Place, place_rows, place_stream
from attribution.model.capture import forward
from attribution.model.traced import TracedModel

BUFFER_ROWS = 1 << 16
"""Rows that are mixed with each other."""

_SAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class Sample:
    """A sequence of tokens, and whose rows are used.

    Attributes:
        keep: a flag for each token: whether its row is used. None is all of them.
        scored: a flag for each token: whether its prediction counts where a loss is measured. None is all but the
            first, which nothing predicts.
    """

    token_ids: list[int]
    keep: Sequence[bool] | None = None
    scored: Sequence[bool] | None = None

    def kept(self) -> Bool[Tensor, "pos"]:
        """The rows that are used."""
        return self._flags(self.keep)

    def counted(self) -> Bool[Tensor, "pos"]:
        """The tokens whose prediction counts."""
        flags = self._flags(self.scored)
        flags[:1] = False
        return flags

    def _flags(self, given: Sequence[bool] | None) -> Tensor:
        if given is not None and len(given) != len(self.token_ids):
            raise InvalidArgument(
                f"a sample of {len(self.token_ids)} tokens has {len(given)} flags; give one for each", param="samples"
            )
        return torch.tensor([True] * len(self.token_ids) if given is None else list(given), dtype=torch.bool)


def captured_rows(
    model: TracedModel, places: Sequence[Place], samples: Sequence[Sample]
) -> Iterator[tuple[int, dict[Place, Float[Tensor, "pos width"]]]]:
    """The index of each sample with its rows at each place, all positions, float32 on the CPU, in batches by length.

    Raises:
        UnsupportedModel: the points of the model are not proved.
    """
    streams = {place: place_stream(model, place) for place in places}
    for chosen in batches([len(sample.token_ids) for sample in samples]):
        prompts = [samples[index].token_ids for index in chosen]
        _, captured = forward(model, padded(model, prompts), streams.values())
        found = {place: place_rows(model, place, captured[stream][0]) for place, stream in streams.items()}
        for row, index in enumerate(chosen):
            length = len(prompts[row])
            yield index, {place: rows[row, -length:].float().cpu() for place, rows in found.items()}


def shuffled_rows(
    model: TracedModel,
    places: Sequence[Place],
    samples: Iterable[Sample],
    batch_rows: int,
    buffer_rows: int = BUFFER_ROWS,
    seed: int = 0,
) -> Iterator[dict[Place, Float[Tensor, "row width"]]]:
    """Batches of rows in random order, of the same tokens at every place, until the samples end.

    Every batch has `batch_rows` rows but the last, which has what is left.

    Raises:
        UnsupportedModel: the points of the model are not proved.
    """
    draw = torch.Generator().manual_seed(seed)
    parts: dict[Place, list[Tensor]] = {place: [] for place in places}
    held = 0
    source = iter(samples)
    while group := list(islice(source, _SAMPLES_AT_ONCE)):
        for index, rows in captured_rows(model, places, group):
            kept = group[index].kept()
            held += int(kept.sum())
            for place in places:
                parts[place].append(rows[place][kept])
        if held >= buffer_rows:
            buffer = _shuffled(parts, draw)
            given = held // 2 // batch_rows * batch_rows
            yield from _cut(buffer, given, batch_rows)
            parts = {place: [rows[given:]] for place, rows in buffer.items()}
            held -= given
    if held:
        yield from _cut(_shuffled(parts, draw), held, batch_rows)


def _shuffled(parts: dict[Place, list[Tensor]], draw: torch.Generator) -> dict[Place, Tensor]:
    whole = {place: torch.cat(rows) for place, rows in parts.items()}
    order = torch.randperm(len(next(iter(whole.values()))), generator=draw)
    return {place: rows[order] for place, rows in whole.items()}


def _cut(buffer: dict[Place, Tensor], count: int, batch_rows: int) -> Iterator[dict[Place, Tensor]]:
    for first in range(0, count, batch_rows):
        yield {place: rows[first : min(first + batch_rows, count)] for place, rows in buffer.items()}
