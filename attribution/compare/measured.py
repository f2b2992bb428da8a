"""What one model makes of sentences and terms, as JSON: the result of `measure_text`."""

import math
from typing import TYPE_CHECKING, Any

from attribution.compare.asked import Asked
from attribution.compare.measure import Fired, Scores, bits_from, features_at, scored, strongest
from attribution.compare.texts import Encoded, Span, borders, byte_count, encode, start_of
from attribution.features.source import Source
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps
from attribution.prompts import token_text

if TYPE_CHECKING:
    from attribution.session import LocalSession

NOTHING_BEFORE = "it begins the text, and this tokenizer has nothing that could come before it"
NO_TOKEN = "no token stands for it alone"
ONE_TOKEN = "the whole text is its first token, and this tokenizer has nothing that could come before it"

Seen = dict[int, tuple[Encoded, Scores]]
"""By sentence; those whose tokens do not stand for their text are not there."""
Fires = dict[tuple[int, Span], dict[str, Any]]
"""What fires where, by source."""


def measured(session: "LocalSession", given: Asked, count: int, *, descriptions: bool) -> Steps[dict[str, Any]]:
    """Run the sentences, and describe them and the terms; `count` is how many features of a term are shown.

    Raises:
        UnsupportedModel, ContextLengthExceeded, CannotFit, NotFinite: as `encode` and `scored`.
    """
    model = session.model
    texts = [encode(model, sentence, f"sentences.{index}") for index, sentence in enumerate(given.sentences)]
    sources = session.features.of(model) if count and given.terms else []
    runnable = [index for index, text in enumerate(texts) if text.problem is None]
    seen: Seen = {}
    fires: Fires = {}
    done = len(texts) - len(runnable)
    for batch in scored(model, [texts[index] for index in runnable], [source.reads for source in sources]):
        for at, scores in batch:
            index = runnable[at]
            _note_features(model, fires, sources, index, texts[index], scores, given.spans_in(index))
            seen[index] = texts[index], Scores(scores.logprobs, scores.ranks)
        done += len(batch)
        yield Progress(done, len(texts))
    return {
        "model_id": model.id,
        "vocabulary": model.dimensions.d_vocab,
        "dtype": str(model.dtype).removeprefix("torch."),
        "starts_with": start_of(model),
        "sources": [source.name for source in sources],
        "sentences": [_sentence(session, text, seen.get(index)) for index, text in enumerate(texts)],
        "terms": [
            _term(term, places, texts, seen) | {"features": _features(sources, fires, places, count, descriptions)}
            for term, places in zip(given.terms, given.found, strict=True)
        ],
    }


# --- sentences


def _sentence(session: "LocalSession", text: Encoded, found: tuple[Encoded, Scores] | None) -> dict[str, Any]:
    ids = text.ids[text.start :]
    whole = {
        "text": text.text,
        "bytes": byte_count(text.text),
        "scored_bytes": 0,
        "bits": None,
        "bits_per_byte": None,
        "n_tokens": len(ids),
        "note": text.problem,
        "token_ids": ids,
        "tokens": [token_text(session.model, token) for token in ids],
        "spans": [list(span) for span in text.spans],
        "logprobs": [None] * len(ids),
        "ranks": [None] * len(ids),
    }
    if found is None:
        return whole
    scores = found[1]
    whole |= {"logprobs": scores.logprobs, "ranks": scores.ranks}
    cuts = borders(text.spans, text.start)
    first = min(cuts, default=None)
    scored_bytes = 0 if first is None else byte_count(text.text[first:])
    if first is None or not scored_bytes:
        return whole | {"note": ONE_TOKEN}
    bits = bits_from(scores.logprobs, cuts[first])
    return whole | {"scored_bytes": scored_bytes, "bits": bits, "bits_per_byte": bits / scored_bytes}


# --- terms


def _term(term: str, places: list[tuple[int, Span]], texts: list[Encoded], seen: Seen) -> dict[str, Any]:
    found = [_occurrence(index, span, texts[index], seen.get(index)) for index, span in places]
    return {"term": term, "n_occurrences": len(found)} | means(found) | {"occurrences": found}


def means(occurrences: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of some occurrences were measured, and the means over these; None where none was."""
    kept = [one for one in occurrences if one["logprob"] is not None]
    names = ("n_tokens", "logprob", "mean_rank")
    return {"n_measured": len(kept)} | {
        name: sum(one[name] for one in kept) / len(kept) if kept else None for name in names
    }


def _occurrence(index: int, span: Span, text: Encoded, found: tuple[Encoded, Scores] | None) -> dict[str, Any]:
    tokens = text.tokens_of(span)
    said = {
        "sentence": index,
        "start": span[0],
        "end": span[1],
        "n_tokens": len(tokens),
        "covered": text.covered(tokens),
        "logprob": None,
        "mean_rank": None,
    }
    if found is None or not tokens:
        return said | {"note": text.problem or NO_TOKEN}
    logprobs = [one for at in tokens if (one := found[1].logprobs[at]) is not None]
    ranks = [one for at in tokens if (one := found[1].ranks[at]) is not None]
    if len(logprobs) < len(tokens):
        return said | {"note": NOTHING_BEFORE}
    return said | {"logprob": math.fsum(logprobs), "mean_rank": sum(ranks) / len(ranks), "note": None}


# --- features


def _note_features(
    model: TracedModel,
    fires: Fires,
    sources: list[Source],
    index: int,
    text: Encoded,
    scores: Scores,
    spans: list[Span],
) -> None:
    spans = [span for span in spans if text.tokens_of(span)]
    for source in sources:
        for span, found in zip(spans, features_at(model, source, text, scores, spans), strict=True):
            fires.setdefault((index, span), {})[source.name] = found


def _features(
    sources: list[Source], fires: Fires, places: list[tuple[int, Span]], count: int, descriptions: bool
) -> list[dict[str, Any]]:
    """The strongest features of each source on a term; the mean is over the occurrences that were run."""
    rows = []
    for source in sources:
        at = [fires[place][source.name] for place in places if place in fires]
        fired = strongest(at, count)
        rows += [_feature(source, fired, row, descriptions) for row in range(len(fired.indices))]
    return rows


def _feature(source: Source, fired: Fired, row: int, descriptions: bool) -> dict[str, Any]:
    index = fired.indices[row]
    said = {
        "source": source.name,
        "layer": source.layer,
        "index": index,
        "activation": fired.activations[row],
        "n_occurrences": fired.counts[row],
    }
    return said | ({"description": source.descriptions.of(index)} if descriptions else {})
