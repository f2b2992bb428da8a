"""Several models side by side: what `measure_text` says of each, cut to what all of them have measured.

1. A sentence is compared from the first border (`attribution.compare.texts`) that all models share: where every model
   has something to begin with, that is its first character, and the whole sentence counts. The bits of the tokens
   behind it are divided by the bytes behind it, the same bytes for every model.
2. Means of a term are taken over the occurrences that every model has measured.
3. A model that could not measure a sentence is left out there, and the others are compared; likewise one that measured
   a term nowhere.
"""

import math
from collections.abc import Mapping
from typing import Any

from attribution.compare.asked import Asked
from attribution.compare.measure import bits_from
from attribution.compare.measured import means
from attribution.compare.texts import borders, byte_count
from attribution.errors import SightlineError

Measured = Mapping[str, dict[str, Any] | SightlineError]
"""By the name of a model: the result of `measure_text`, or why there is none."""

SHORTER = "not every model has something to begin with: compared behind the first token, from a border that they share"
NO_BORDER = "not every model has something to begin with, and behind their first tokens they share no border"
_OWN = ("n_tokens", "bits", "bits_per_byte", "scored_bytes", "note")


def combined(given: Asked, found: Measured) -> dict[str, Any]:
    """The result of `compare`.

    Raises:
        SightlineError: no model could be measured: of the class that the first of them raised.
    """
    errors = {name: one for name, one in found.items() if isinstance(one, SightlineError)}
    if len(errors) == len(found):
        raise _together(errors)
    measured = {name: one for name, one in found.items() if not isinstance(one, SightlineError)}
    sentences = [
        _sentence({name: one["sentences"][index] for name, one in measured.items()})
        for index in range(len(given.sentences))
    ]
    terms = [
        _term({name: one["terms"][index] for name, one in measured.items()}, term)
        for index, term in enumerate(given.terms)
    ]
    models = [_model(name, one) | _total(name, sentences) for name, one in found.items()]
    return {"models": models, "sentences": sentences, "terms": terms}


def _together(errors: Mapping[str, SightlineError]) -> SightlineError:
    first, *others = errors.values()
    if not others:
        return first
    told = "; ".join(f"{name}: {error.message}" for name, error in errors.items())
    return type(first)(f"no model could be measured: {told}", param=first.param)


def _model(name: str, found: dict[str, Any] | SightlineError) -> dict[str, Any]:
    names = ("vocabulary", "dtype", "starts_with", "sources")
    if isinstance(found, SightlineError):
        error = {"code": found.code, "message": found.message}
        return {"model_id": name, "error": error} | dict.fromkeys(names)
    return {"model_id": name, "error": None} | {one: found[one] for one in names}


def _total(name: str, sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the sentences that every model has a number for; one that has none for any is left out."""
    having = {one for row in sentences for one, cell in row["models"].items() if cell["bits"] is not None}
    kept = [row for row in sentences if all(row["models"][one]["bits"] is not None for one in having)]
    if name not in having:
        kept = []
    size = sum(one["compared_bytes"] for one in kept)
    bits = math.fsum(one["models"][name]["bits"] for one in kept)
    return {"n_sentences": len(kept), "bits_per_byte": bits / size if size else None}


# --- sentences


def _sentence(cells: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    text = next(iter(cells.values()))["text"]
    readable = {name: cell for name, cell in cells.items() if cell["bits"] is not None}
    cuts = {name: borders(cell["spans"], int(cell["logprobs"][0] is not None)) for name, cell in readable.items()}
    shared = set.intersection(*(set(one) for one in cuts.values())) - {len(text)} if cuts else set()
    first = min(shared, default=None)
    size = 0 if first is None else byte_count(text[first:])
    note = None if first == 0 or not readable else SHORTER if size else NO_BORDER
    models = {}
    for name, cell in cells.items():
        bits = None
        if first is not None and name in cuts:
            bits = bits_from(cell["logprobs"], cuts[name][first])
        models[name] = {
            "bits": bits,
            "bits_per_byte": None if bits is None else bits / size,
            "own": {one: cell[one] for one in _OWN},
        }
    return {
        "text": text,
        "bytes": byte_count(text),
        "compared_from": first,
        "compared_bytes": size,
        "note": note,
        "best": _best(models),
        "models": models,
    }


def _best(models: Mapping[str, dict[str, Any]]) -> list[str]:
    """The models with the fewest bits, of two or more: several where they are equal, none where one stands alone."""
    values = {name: cell["bits"] for name, cell in models.items() if cell["bits"] is not None}
    return [name for name, bits in values.items() if bits == min(values.values())] if len(values) > 1 else []


# --- terms


def _term(cells: Mapping[str, dict[str, Any]], term: str) -> dict[str, Any]:
    count = next(iter(cells.values()))["n_occurrences"]
    measuring = [cell for cell in cells.values() if cell["n_measured"]]
    compared = [
        bool(measuring) and all(cell["occurrences"][at]["logprob"] is not None for cell in measuring)
        for at in range(count)
    ]
    models = {}
    for name, cell in cells.items():
        kept = [one for one, counts in zip(cell["occurrences"], compared, strict=True) if counts]
        over = means(kept)
        over.pop("n_measured")
        models[name] = {"n_measured": cell["n_measured"]} | over | {"features": cell["features"]}
    occurrences = [
        _occurrence({name: cell["occurrences"][at] for name, cell in cells.items()}, compared[at])
        for at in range(count)
    ]
    said = {"term": term, "n_occurrences": count, "n_compared": sum(compared)}
    return said | {"models": models, "occurrences": occurrences}


def _occurrence(cells: Mapping[str, dict[str, Any]], compared: bool) -> dict[str, Any]:
    one = next(iter(cells.values()))
    place = {name: one[name] for name in ("sentence", "start", "end")}
    own = {name: {key: value for key, value in cell.items() if key not in place} for name, cell in cells.items()}
    return place | {"compared": compared, "models": own}
