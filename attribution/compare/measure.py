"""What one model makes of texts: the log-probability and the rank of every token, and the features that fire on terms.

1. Texts go through the model in left-padded batches, similar lengths together, so many that their logits stay bounded.
2. Of each token: ln p(token | before), by a softmax in float64 over the whole vocabulary, and its rank, 1 plus the
   number of tokens with a higher logit.
3. Where the model has autoencoders, what they read is taken off the same forward; at each occurrence of a term a
   feature has the largest activation that it has at one of its tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.activations import BATCH_TOKENS, batches, padded
from attribution.compare.texts import Encoded, Span
from attribution.errors import CannotFit, NotFinite
from attribution.features.places import Place, place_rows, place_stream
from attribution.features.source import Source
from attribution.model.capture import Stream, forward
from attribution.model.traced import TracedModel

_MOST_LOGITS = 2**27  # of one batch
_MOST_NUMBERS = 2**22  # of one tensor over the vocabulary
_SPANS = 64  # whose features are computed at once


@dataclass(frozen=True)
class Scores:
    """A text as its model sees it.

    Attributes:
        logprobs: of each token of the text, in nats; None of the first one where nothing comes before it.
        ranks: 1 is the most likely token, and equal ones share the better rank; None as in `logprobs`.
        streams: what autoencoders read, [pos, width] over the tokens of the text, by place.
    """

    logprobs: list[float | None]
    ranks: list[int | None]
    streams: Mapping[Place, Tensor] = field(default_factory=dict, repr=False)


def scored(
    model: TracedModel, texts: Sequence[Encoded], places: Sequence[Place] = ()
) -> Iterator[list[tuple[int, Scores]]]:
    """Run some texts; yields, batch by batch, the index of each text with what was found.

    Raises:
        CannotFit: there is no memory for the logits of a text.
        NotFinite: the model computes NaN or inf for one.
        UnsupportedModel: there are places, and the points of the model are not proved.
    """
    streams = {place: place_stream(model, place) for place in dict.fromkeys(places)}
    most = min(BATCH_TOKENS, max(1, _MOST_LOGITS // model.dimensions.d_vocab))
    for batch in batches([len(text.ids) for text in texts], most):
        chosen = [texts[index] for index in batch]
        yield list(zip(batch, _run(model, chosen, streams), strict=True))


def _run(model: TracedModel, texts: list[Encoded], streams: Mapping[Place, Stream]) -> list[Scores]:
    batch = padded(model, [text.ids for text in texts])
    columns = batch.ids.shape[1]
    _check_room(model, columns * len(texts))
    logits, captured = forward(model, replace(batch, keep=columns), streams.values())
    found = []
    for row, text in enumerate(texts):
        own = slice(columns - len(text.spans), None)
        kept = {place: place_rows(model, place, captured[stream][0, row])[own] for place, stream in streams.items()}
        logprobs, ranks = token_scores(logits[row, columns - len(text.ids) :], text.ids)
        nothing = [] if text.start else [None]
        first = max(0, text.start - 1)
        found.append(Scores([*nothing, *logprobs[first:]], [*nothing, *ranks[first:]], kept))
    return found


def token_scores(logits: Float[Tensor, "pos vocab"], ids: list[int]) -> tuple[list[float], list[int]]:
    """The log-probability and the rank of each token but the first, given the logits at every token.

    Raises:
        NotFinite: a logit is NaN or inf.
    """
    size = max(1, _MOST_NUMBERS // logits.shape[-1])
    next_ids = torch.tensor(ids[1:], device=logits.device)
    logprobs: list[float] = []
    ranks: list[int] = []
    for rows, targets in zip(logits[:-1].split(size), next_ids.split(size), strict=True):
        if not rows.isfinite().all():
            where = len(logprobs) + int((~rows.isfinite().all(-1)).nonzero()[0])
            raise NotFinite(f"the model computes NaN or inf at token {where} of a text of {len(ids)} tokens")
        chosen = rows.gather(-1, targets[:, None])
        logprobs += rows.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()
        ranks += (1 + (rows > chosen).sum(-1)).tolist()
    return logprobs, ranks


def _check_room(model: TracedModel, tokens: int) -> None:
    needed = tokens * model.dimensions.d_vocab * model.dtype.itemsize
    there = (
        torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    )
    if needed > there:
        raise CannotFit(
            f"the logits of {tokens:,} tokens over {model.dimensions.d_vocab:,} take {needed:,} bytes and {there:,} "
            "are free: give shorter sentences",
            param="sentences",
        )


# --- texts and occurrences


def bits_from(logprobs: Sequence[float | None], token: int) -> float:
    """−Σ log2 p of the tokens of a text, from one on; these all have a log-probability."""
    return -math.fsum(value for value in logprobs[token:] if value is not None) / math.log(2)


@dataclass(frozen=True)
class Fired:
    """The features of one source that fire on a term.

    Attributes:
        indices: of the features that fire at one occurrence at least.
        activations: the mean over the occurrences of the largest activation at one.
        counts: at how many occurrences each fires.
    """

    indices: list[int]
    activations: list[float]
    counts: list[int]


def features_at(
    model: TracedModel, source: Source, text: Encoded, scores: Scores, spans: Sequence[Span]
) -> list[tuple[Tensor, Tensor]]:
    """For each of some spans of a text, the features that fire there: their indices and largest activations.

    Each span has at least one token.
    """
    autoencoder = source.autoencoder(model.device, model.work_dtype)  # as in `features_topk`, whatever its file has
    read = scores.streams[source.reads]
    found = []
    for first in range(0, len(spans), _SPANS):
        tokens = [text.tokens_of(span) for span in spans[first : first + _SPANS]]
        features = autoencoder.encode(read[[at for one in tokens for at in one]]).cpu()
        for rows in features.split([len(one) for one in tokens]):
            largest = rows.amax(0)
            indices = largest.nonzero()[:, 0]
            found.append((indices, largest[indices]))
    return found


def strongest(fired: Sequence[tuple[Tensor, Tensor]], count: int) -> Fired:
    """The `count` strongest features of a term, of equal ones the lower index first, by what fires where it occurs."""
    if not fired or not count:
        return Fired([], [], [])
    indices, where = torch.cat([indices for indices, _ in fired]).unique(return_inverse=True)
    values = torch.cat([values for _, values in fired]).double()
    sums = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, where, values)
    order = sums.sort(descending=True, stable=True).indices[:count]
    counts = where.bincount(minlength=len(indices))
    return Fired(indices[order].tolist(), (sums[order] / len(fired)).tolist(), counts[order].tolist())
