"""Features: which are active on each token, and the autoencoders that say so. `docs/features.md`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import BadPositions, InvalidArgument
from attribution.features.declared import Declaration
from attribution.features.source import Source
from attribution.features.topk import Found, Tokens, described, held_by_answer, held_by_sample, strongest
from attribution.model.traced import TracedModel
from attribution.operation import Steps, operation
from attribution.positions import parse_window
from attribution.prompts import Message, check_tokens, only_given, tokens_of
from attribution.recorded import read_answer

if TYPE_CHECKING:
    from attribution.session import LocalSession


def _listed(value: object) -> object:
    return list(value) if isinstance(value, range | tuple) else getattr(value, "tolist", lambda: value)()


Where = Annotated[
    str | dict[str, Any] | list[Index] | None,
    BeforeValidator(_listed, json_schema_input_type=str | dict[str, Any] | list[int] | None),
]
"""A window, as of a savepoint, or a list of positions; negative ones count from the end."""


@operation(path="features/topk")
def features_topk(
    session: "LocalSession",
    text: str | list[str] | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    run_id: str | None = None,
    choice: Index = 0,
    dataset_id: DatasetId | None = None,
    sample_id: SampleId | None = None,
    layer: Index | None = None,
    source: str | None = None,
    k: Index = 10,
    positions: Where = None,
    include_descriptions: bool = True,
    prepend_bos: bool | None = None,
    add_special_tokens: bool = True,
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """The k strongest features of every token, by the autoencoders of one layer or of all.

    Args:
        text: one text or several; this, `messages` (put through the chat template), `token_ids`, a recorded chat answer
            (`run_id` and its `choice`) and a stored sample (`dataset_id` and `sample_id`) exclude each other.
        layer: of the autoencoders; None is all layers that have one.
        source: the name of one autoencoder; None is all of the layer.
        k: how many features of each token and autoencoder are listed at most.
        positions: a window as of a savepoint, "all", "prompt", "generated", "last" (of the prompt) or {"start",
            "stop", "step"}, or a list of positions, in which negative ones count from the end; None is all. Of a
            recorded answer the last generated token is not among them: the model never read it.
        include_descriptions: whether features have a "description", null where there is none.
        prepend_bos: whether a text begins with the tokenizer's special first token, if it has one; None is what the
            autoencoders were trained with, and where they do not say it, what the tokenizer does.
        add_special_tokens: whether a text gets the tokenizer's own special tokens; False for templated texts.

    Returns:
        model_id; layer and source (null when there are several); k; activations: "recorded" when they were read from
        the run or the sample, "computed" when a forward gave them, "mixed" for some of each; sources: name, layer,
        prepend_bos and activations of each; tokens: position, token, token_id, is_special and features: index,
        activation (above 0), description, layer, source, strongest first for each autoencoder.
        Of several texts: model_id, and results, one such reply for each.
    """
    model = session.model
    if layer is not None:
        checks.in_range("layer", layer, model.dimensions.n_layers, f"the layers of {model.id}")
    sources = session.features.choose(model, source, layer)
    _check_k(k, sources)
    given = {"text": text, "messages": messages, "token_ids": token_ids, "run_id": run_id, "dataset_id": dataset_id}
    name = only_given(given)
    if (sample_id is None) != (dataset_id is None):
        raise InvalidArgument("a stored sample has a dataset_id and a sample_id; one is missing", param="sample_id")
    if run_id is not None:
        asked = [_answer(session, run_id, choice, positions)]
    elif dataset_id is not None and sample_id is not None:
        asked = [_sample(session, dataset_id, sample_id, positions)]
    elif text is not None:
        special, bos = _beginning(model, sources, prepend_bos, add_special_tokens=add_special_tokens)
        asked = _texts(model, text, positions, special=special, bos=bos)
    else:
        asked = [_given(model, tokens_of(model, given[name] or [], special=False, name=name), positions, name)]
    found = yield from strongest(model, sources, asked, k)
    replies = [
        {"model_id": model.id, "layer": layer, "source": None, "k": k}
        | _said(one)
        | {"tokens": described(model, tokens, one, include_descriptions=include_descriptions)}
        for tokens, one in zip(asked, found, strict=True)
    ]
    return {"model_id": model.id, "results": replies} if isinstance(text, list) else replies[0]


# --- tokens


def _check_k(k: int, sources: Sequence[Source]) -> None:
    fewest = min(sources, key=lambda one: one.n_features)
    if not 1 <= k <= fewest.n_features:
        allowed = f"1 to {fewest.n_features} is expected, as many as {fewest.name!r} has features"
        raise checks.out_of_range("k", k, allowed)


def _beginning(
    model: TracedModel, sources: Sequence[Source], prepend_bos: bool | None, *, add_special_tokens: bool
) -> tuple[bool, int | None]:
    """Whether texts get the tokenizer's own special tokens, and the token that they are to begin with, if any."""
    wanted = {one.prepend_bos for one in sources} - {None} if prepend_bos is None else {prepend_bos}
    if len(wanted) > 1:
        apart = ", ".join(f"{one.name!r} {one.prepend_bos}" for one in sources if one.prepend_bos is not None)
        raise InvalidArgument(
            f"the autoencoders were trained with different prepend_bos ({apart}): name one with source, or say "
            "prepend_bos yourself",
            param="prepend_bos",
        )
    begins = next(iter(wanted), None)
    bos: Any = model.tokenizer.bos_token_id if begins else None
    return add_special_tokens and begins is not False, bos


def _texts(
    model: TracedModel, text: str | list[str], positions: Any, *, special: bool, bos: int | None
) -> list[Tokens]:
    if text == []:
        raise InvalidArgument("text is an empty list; give at least one text", param="text")
    asked = []
    for number, one in enumerate([text] if isinstance(text, str) else text):
        name = "text" if isinstance(text, str) else f"text.{number}"
        ids = tokens_of(model, one, special=special, name=name)
        if not one:
            raise InvalidArgument(f"{name} has no token; give a text", param=name)
        ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        asked.append(_given(model, ids, positions, name))
    return asked


def _given(model: TracedModel, ids: list[int], positions: Any, name: str) -> Tokens:
    check_tokens(model, ids, name)
    return Tokens(ids, _positions(positions, len(ids), len(ids), name))


def _answer(session: "LocalSession", run_id: str, choice: int, positions: Any) -> Tokens:
    model = session.model
    answer = read_answer(model, session.runs_dir, run_id, choice)
    fed = answer.token_ids[: answer.fed]
    check_tokens(model, fed, "run_id")
    at = _positions(positions, answer.prompt, len(fed), f"the run {run_id!r}")
    return Tokens(fed, at, held_by_answer(model, answer), answer.intervened)


def _sample(session: "LocalSession", dataset_id: str, sample_id: int | str, positions: Any) -> Tokens:
    sample = session.sample(dataset_id, sample_id)
    ids = sample.token_ids
    at = _positions(positions, len(ids), len(ids), f"sample {sample_id!r}")
    return Tokens(ids, at, held_by_sample(session.model, sample))


def _positions(given: Any, prompt: int, count: int, name: str) -> list[int]:
    """The positions that a window or a list names among those of a sequence of `count` tokens."""
    if isinstance(given, list):
        for position in given:
            if not -count <= position < count:
                allowed = f"{name} has the positions 0 to {count - 1}, and -1 to -{count} from its end"
                raise checks.out_of_range("positions", position, allowed)
        return checks.positions("positions", [position % count for position in given], count)
    window = parse_window(given)
    if window.stop is not None and window.stop > count:
        raise BadPositions(f"positions.stop is {window.stop}, and {name} has {count} tokens", param="positions")
    found = list(window.span(prompt, count))
    if not found:
        raise BadPositions(
            f"positions select no token of {name}, which has {count}, {prompt} of them the prompt", param="positions"
        )
    return found


# --- the reply


def _said(found: Sequence[Found]) -> dict[str, Any]:
    """Which autoencoders were asked, and where their activations are from."""
    origins = {one.activations for one in found}
    said: dict[str, Any] = {"activations": "mixed" if len(origins) > 1 else next(iter(origins))}
    if len(found) == 1:
        said |= {"layer": found[0].source.layer, "source": found[0].source.name}
    rows = [
        {
            "name": one.source.name,
            "layer": one.source.layer,
            "prepend_bos": one.source.prepend_bos,
            "activations": one.activations,
        }
        for one in found
    ]
    return said | {"sources": rows}


# --- the autoencoders


@operation(path="features/load")
def load_features(
    session: "LocalSession",
    folder: str,
    name: DatasetId | None = None,
    *,
    point: str | None = None,
    writes: str | None = None,
    descriptions: str | None = None,
    source_id: str | None = None,
    model_name: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Take an autoencoder for this model; the same one again is read anew.

    Args:
        folder: of cfg.json and the weights, as SAELens or eai-sparsify write it, where the model is.
        name: under which it is asked for; None makes one of layer and point, as "2-resid_post".
        point: where it reads, as "resid_post[2]" or "blocks.2.hook_resid_post"; needed when its config does not say it.
        writes: where a transcoder writes, as "mlp_out[2]"; likewise.
        descriptions: a file or a folder of Neuronpedia's exports, or of lines {"index", "description"}.
        source_id: whose rows of these are meant, as "5-res-jb" or "gpt2-small/5-res-jb".
        model_name: the name that the config has for this model, when that is none of its own; a word that two models
            share their weights.
        overwrite: take it in place of another autoencoder of this name.

    Returns:
        name, model_id, layer, reads, writes, architecture, n_features, d_in, d_out, dtype, k (None when the number of
        active features is not fixed), prepend_bos, folder, and descriptions: n_described (features), n_problems (lines
        that were left out) and problems (the first of them, with the reason).
    """
    declared = Declaration(
        model=session.model.id,
        folder=Path(folder),
        name=name,
        point=point,
        writes=writes,
        descriptions=None if descriptions is None else Path(descriptions),
        source_id=source_id,
        model_name=model_name,
    )
    return session.features.load(session.model, declared, overwrite=overwrite).describe()


@operation(path="features/list")
def list_features(session: "LocalSession") -> dict[str, Any]:
    """The autoencoders that were declared, whichever model's.

    Returns:
        sources: each as `load_features` returns it, with `status` "ready"; or name, model_id, folder, status "waiting"
        (for its model to be loaded) or "failed", and the reason; count.
    """
    session.features.of(session.model)
    rows = session.features.status()
    return {"sources": rows, "count": len(rows)}


@operation(safe=False, path="features/unload")
def unload_features(session: "LocalSession", source: str) -> dict[str, Any]:
    """Forget an autoencoder of this model and free its memory; its files stay. Returns unloaded and source."""
    session.features.of(session.model)
    session.features.remove(session.model.id, source)
    return {"unloaded": True, "source": source}
