"""Features: which are active on each token, and the autoencoders that say so. `docs/features.md`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import InvalidArgument
from attribution.features.asked import Asked, Where, tokens_asked
from attribution.features.declared import Declaration
from attribution.features.details import feature_details
from attribution.features.source import Source
from attribution.features.topk import Found, described, strongest
from attribution.operation import Steps, operation
from attribution.prompts import Message

if TYPE_CHECKING:
    from attribution.session import LocalSession


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
    given = Asked(text, messages, token_ids, run_id, choice, dataset_id, sample_id, positions)
    asked = tokens_asked(session, given, sources, prepend_bos, add_special_tokens=add_special_tokens)
    found = yield from strongest(model, sources, asked, k)
    tokens = described(model, asked, found, include_descriptions=include_descriptions)
    replies = [
        {"model_id": model.id, "layer": layer, "source": None, "k": k} | _said(one) | {"tokens": rows}
        for one, rows in zip(found, tokens, strict=True)
    ]
    return {"model_id": model.id, "results": replies} if isinstance(text, list) else replies[0]


def _check_k(k: int, sources: Sequence[Source]) -> None:
    fewest = min(sources, key=lambda one: one.n_features)
    if not 1 <= k <= fewest.n_features:
        allowed = f"1 to {fewest.n_features} is expected, as many as {fewest.name!r} has features"
        raise checks.out_of_range("k", k, allowed)


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
        overwrite: take it in place of another autoencoder of this name, or of this one with descriptions when none
            are given now.

    Returns:
        name, model_id, layer, reads, writes, architecture, n_features, d_in, d_out, dtype, k (None when the number of
        active features is not fixed), prepend_bos, folder, and descriptions: source (whose they are,
        where they say it), n_described (features), n_problems (lines that were left out) and problems (the first of
        them, with the reason).
    """
    declared = Declaration(
        model=session.model.id,
        folder=_absolute(folder),
        name=name,
        point=point,
        writes=writes,
        descriptions=None if descriptions is None else _absolute(descriptions),
        source_id=source_id,
        model_name=model_name,
    )
    return session.features.load(session.model, declared, overwrite=overwrite).describe()


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


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


@operation(path="features/describe")
def describe_feature(session: "LocalSession", source: str, index: Index, top_k: Index = 10) -> dict[str, Any]:
    """One feature: what it is said to be about, what it writes, and which others write alike.

    Args:
        source: the name of the autoencoder.
        top_k: how many tokens and neighbours are listed.

    Returns:
        index, source, model_id, layer, reads, writes; description (the first, or None) and descriptions: text,
        explainer and method of each; decoder_norm, encoder_norm, bias (of the pre-activation) and threshold (None where
        there is none);
        promoted and suppressed: the tokens (token, token_id, logit) whose logits one unit of the feature moves most, up
        and down, by its direct path alone: through the final norm's weight at a scale of 1 and the output head, the
        mean over the vocabulary taken off; None where what it writes is not added to the stream;
        neighbours: the features (index, cosine, description) whose decoder directions have the largest cosine with its.
    """
    found = session.features.source(session.model, source)
    found.check_index(index)
    if top_k < 1:
        raise checks.out_of_range("top_k", top_k, "at least 1 is expected")
    return feature_details(session.model, found, index, top_k)


@operation(path="features/search")
def search_features(
    session: "LocalSession",
    query: str,
    *,
    layer: Index | None = None,
    source: str | None = None,
    limit: Index = 50,
) -> dict[str, Any]:
    """The features whose descriptions have all these words, or parts of words, in upper or lower case.

    Args:
        layer, source: of the autoencoders; None is all.
        limit: how many are listed; all are counted.

    Returns:
        features: index, description (the one that fits), layer and source, by layer, source and index; count (of all
        that fit), and n_described: how many features were searched.
    """
    if not (words := query.casefold().split()):
        raise InvalidArgument("query has no word; give at least one", param="query")
    if limit < 1:
        raise checks.out_of_range("limit", limit, "at least 1 is expected")
    sources = session.features.choose(session.model, source, layer)
    found = [
        {"index": index, "description": text, "layer": one.layer, "source": one.name}
        for one in sources
        for index, text in one.descriptions.search(words)
    ]
    described = sum(len(one.descriptions) for one in sources)
    return {"features": found[:limit], "count": len(found), "n_described": described}
