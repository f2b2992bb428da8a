"""Comparing models: what one model makes of texts, and several side by side. `docs/compare.md`."""

import gc
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch

from attribution import checks
from attribution.arguments import Index
from attribution.compare.asked import asked
from attribution.compare.measured import measured
from attribution.compare.plan import Plan, check_models
from attribution.compare.together import combined
from attribution.errors import OutOfMemory, SightlineError
from attribution.model.hub import canonical
from attribution.model.known import check_fits
from attribution.model.load import load
from attribution.operation import Progress, Steps, operation

if TYPE_CHECKING:
    from attribution.session import LocalSession

MOST_FEATURES = 1000


@operation(path="compare/measure")
def measure_text(
    session: "LocalSession",
    sentences: list[str],
    domain_terms: list[str] | None = None,
    *,
    case_sensitive: bool = True,
    whole_words: bool = False,
    top_features: Index = 5,
    include_descriptions: bool = True,
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """What this model makes of some sentences, and of terms in them, in numbers that other models can be held against.

    Args:
        sentences: texts, each run by itself, after the tokenizer's bos token where it has one.
        domain_terms: looked for in the sentences, by characters; occurrences may overlap.
        case_sensitive: whether a term is found in its own spelling only.
        whole_words: whether no letter, digit or underscore may stand beside a term.
        top_features: how many features of each term and autoencoder are returned; 0 is none.
        include_descriptions: whether they come with their descriptions.

    Returns:
        model_id, vocabulary, dtype, starts_with (the tokens before each sentence, as texts; [] is none), sources (the
        names of the autoencoders), and:
        sentences: for each sentence, text, bytes, bits (−Σ log2 p(token | before)), scored_bytes (all of them after a
        start; without one, those behind the first token), bits_per_byte (bits / scored_bytes), n_tokens, note (why a
        number is None), and of each token token_ids, tokens, spans (characters), logprobs (nats) and ranks.
        terms: for each term, term, n_occurrences, n_measured, over these the means n_tokens, logprob (summed over the
        tokens) and mean_rank (rank 1 is the most likely); occurrences (sentence, start, end, n_tokens, covered,
        logprob, mean_rank, note); and features (source, layer, index, activation, n_occurrences, description).
    """
    _check_features(top_features)
    given = asked(sentences, domain_terms or [], case_sensitive=case_sensitive, whole_words=whole_words)
    return (yield from measured(session, given, top_features, descriptions=include_descriptions))


@operation(path="compare", of_model=False)
def compare(
    session: "LocalSession",
    models: list[str],
    sentences: list[str],
    domain_terms: list[str] | None = None,
    *,
    case_sensitive: bool = True,
    whole_words: bool = False,
    top_features: Index = 5,
    include_descriptions: bool = True,
    dtype: str = "auto",
    device_map: str = "auto",
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """Several models side by side: bits per byte of sentences, and how each takes the terms of a domain.

    What is not loaded is loaded for this alone, one model after the other, and let go after it. A name of no model is
    refused before anything is loaded; a model that fails otherwise is told in its row.

    Args:
        models: hub ids, aliases, folders, "demo", or the ids of loaded models; none of them twice.
        sentences, domain_terms, case_sensitive, whole_words, top_features, include_descriptions: as `measure_text`.
        dtype, device_map: with which models are loaded that are not.

    Returns:
        models: for each model_id, vocabulary, dtype, starts_with, sources, error (code and message; None is none),
        bits_per_byte over all n_sentences that every model has measured.
        sentences: for each text, bytes, compared_from (a character), compared_bytes, note, best (names) and, by model,
        bits, bits_per_byte of the bytes that are compared, and own (what `measure_text` says).
        terms: for each term, n_occurrences, n_compared, by model n_measured, n_tokens, logprob, mean_rank, features;
        and occurrences: sentence, start, end, compared, and by model what `measure_text` says.
    """
    here = None if session.loaded is None else canonical(session.loaded.id)
    plan = planned(
        models=models,
        sentences=sentences,
        domain_terms=domain_terms,
        case_sensitive=case_sensitive,
        whole_words=whole_words,
        top_features=top_features,
        include_descriptions=include_descriptions,
        dtype=dtype,
        device_map=device_map,
        loaded=() if here is None else (here,),
    )
    found: dict[str, dict[str, Any] | SightlineError] = {}
    for number, name in enumerate(plan.models):
        yield plan.progress(number)
        steps = plan.steps(session) if canonical(name) == here else _loaded_for_this(session, plan, name)
        try:
            found[name] = yield from plan.counted(number, steps)
        except SightlineError as error:
            found[name] = type(error)(error.message, param=error.param)  # without the frames that hold the model
        free_memory()
    return combined(plan.given, found)


def planned(
    *,
    models: list[str],
    sentences: list[str],
    domain_terms: list[str] | None,
    case_sensitive: bool,
    whole_words: bool,
    top_features: int,
    include_descriptions: bool,
    dtype: str,
    device_map: str,
    loaded: tuple[str, ...],
) -> Plan:
    """The arguments of `compare`, checked; `loaded` are the canonical names of the models that are there already.

    Raises:
        InvalidArgument, OutOfRange, InvalidRequest, ModelNotFound: what is wrong with them.
    """
    _check_features(top_features)
    given = asked(sentences, domain_terms or [], case_sensitive=case_sensitive, whole_words=whole_words)
    check_models(models, dtype, loaded)
    return Plan(models, given, top_features, include_descriptions, dtype, device_map)


def free_memory() -> None:
    """Collect what a model has left, and give GPU memory back that torch holds in reserve."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loaded_for_this(session: "LocalSession", plan: Plan, name: str) -> Generator[Progress, None, dict[str, Any]]:
    """Load a model beside that of the session, measure it, and let go of it with this frame."""
    check_fits(spec := plan.spec(name))
    try:
        return (yield from plan.steps(session.beside(load(spec))))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{name!r} ran out of memory: {error}", param="models") from None
    finally:
        session.features.drop(name)


def _check_features(count: int) -> None:
    checks.in_range("top_features", count, MOST_FEATURES + 1, "numbers of features that can be shown")
