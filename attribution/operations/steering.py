"""Steering vectors: computed from examples, kept by name, listed, read and deleted. See `docs/steering.md`."""

import hashlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from attribution.arguments import DatasetId
from attribution.contrast import Examples, contrast, direction_site, example_means, scaled
from attribution.errors import InvalidArgument
from attribution.features.places import place_stream
from attribution.operation import Steps, operation
from attribution.operations.devices import on_device
from attribution.positions import parse_window
from attribution.prompts import Prompt, check_tokens, tokens_of
from attribution.steering import SteeringVector
from attribution.stored import created_and_versions

if TYPE_CHECKING:
    from attribution.session import LocalSession

_KEPT_CHARACTERS = 64 * 1024  # of the examples themselves; of more, their hash alone is kept


def _norm(value: object) -> object:
    if value is None or value == "unit":
        return value
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError("None, 'unit' or a norm above 0 is expected")
    return float(value)  # type: ignore[arg-type]


Normalise = Annotated[
    Literal["unit"] | float | None,
    BeforeValidator(_norm, json_schema_input_type=Literal["unit"] | float | None),
]
"""The norm that a vector is scaled to: None leaves it, "unit" is 1."""


@operation(safe=False, path="steering/vectors")
def create_steering_vector(
    session: "LocalSession",
    name: DatasetId,
    positive: list[Prompt],
    negative: list[Prompt],
    selector: str,
    positions: str | dict[str, Any] = "last",
    normalise: Normalise = None,
    overwrite: bool = False,
    add_special_tokens: bool = True,
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """Compute a steering vector, the mean over positive examples minus that over negative ones, and keep it.

    Args:
        name: under which it is kept.
        positive, negative: texts, conversations or token ids, as in `forward`; not necessarily as many.
        selector: where, as of a savepoint: a point such as "resid_post[2]", or a module's path. Of several layers each
            gets its own direction.
        positions: the window of each example whose mean counts, as of a savepoint: "last" (its last token), "all",
            {"start", "stop", "step"}.
        normalise: the norm that each direction is scaled to; "unit" is 1, None leaves the difference as it is.
        overwrite: replace the vector that has this name.
        add_special_tokens: whether a text gets the tokenizer's own special tokens; False for templated texts.

    Returns:
        name, selector, layers, shape, dtype, norms (of what is kept, per layer), statistics (per layer: layer,
        positive_norm, negative_norm, difference_norm, cosine, auc, auc_held_out) and provenance.
    """
    model = session.model
    if not overwrite:
        session.vectors.check_free(name)
    site, window = direction_site(model, selector), parse_window(positions)
    examples = _examples(session, positive, negative, special=add_special_tokens)
    found = yield from example_means(model, site, examples, window)
    layers = list(site.layers) or [None]
    made = contrast(found, examples.positive, layers)
    direction = scaled(made.direction, 1.0 if normalise == "unit" else normalise).to(model.work_dtype)
    how = {"positions": positions, "normalise": normalise, "add_special_tokens": add_special_tokens}
    prompts = {"positive": positive, "negative": negative}
    vector = SteeringVector(
        name=name,
        vector=direction if site.stacked else direction[0],
        selector=selector,
        layers=site.layers,
        stacked=site.stacked,
        provenance=_provenance(session, how, prompts, examples),
        statistics=tuple(made.statistics),
    )
    return session.vectors.write(vector, overwrite=overwrite).describe()


@operation(safe=False, path="steering/features")
def save_feature_vector(
    session: "LocalSession",
    name: DatasetId,
    index: int,
    source: str | None = None,
    layer: int | None = None,
    normalise: Normalise = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Keep what one unit of a feature writes as a steering vector, to be added or projected out by name.

    Of an autoencoder that normalises the rows it reads, this is the direction before that is undone: what a unit really
    writes is as many times longer as the row is, which an intervention of type "feature" accounts for.

    Args:
        name: under which it is kept.
        index: of the feature.
        source, layer: its autoencoder, as in `features_topk`; both may be left out where there is one alone.
        normalise: the norm that it is scaled to; "unit" is 1, None leaves it.
        overwrite: replace the vector that has this name.

    Returns:
        As `create_steering_vector`, with no statistics.
    """
    model = session.model
    if not overwrite:
        session.vectors.check_free(name)
    found = session.features.source(model, source, layer)
    found.check_index(index)
    direction = found.autoencoder("cpu", model.work_dtype).directions([index])
    if not bool(direction.ne(0).any()):
        raise InvalidArgument(f"the feature {index} of {found.name!r} writes nothing", param="index")
    stream = place_stream(model, found.writes)
    kept = scaled(direction, 1.0 if normalise == "unit" else normalise).to(model.work_dtype)[0]
    return session.vectors.write(
        SteeringVector(
            name=name,
            vector=stream.cut(kept),
            selector=str(found.writes),
            layers=(found.writes.layer,),
            stacked=False,
            provenance={
                "model": session.identity.record(),
                "method": "feature",
                "source": found.name,
                "folder": str(found.folder),
                "index": index,
                "description": found.descriptions.of(index),
                "normalise": normalise,
                **created_and_versions(),
            },
        ),
        overwrite=overwrite,
    ).describe()


def _provenance(
    session: "LocalSession", how: dict[str, Any], prompts: dict[str, list[Any]], examples: Examples
) -> dict[str, Any]:
    """Where a vector comes from: the model, the method, the examples, the time and the versions."""
    tokens = {"positive": examples.tokens[: examples.positive], "negative": examples.tokens[examples.positive :]}
    return {
        "model": session.identity.record(),
        "method": "difference of means",
        **how,
        "chat_template_sha256": session.model.template_hash,
        **{group: _record(prompts[group], tokens[group]) for group in prompts},
        **created_and_versions(),
    }


@operation(path="steering/list")
def list_steering_vectors(session: "LocalSession") -> dict[str, Any]:
    """The steering vectors, whichever model's.

    Returns:
        vectors: each as `create_steering_vector` returns it, and with `of_this_model`; count.
    """
    fingerprint, vectors = session.identity.fingerprint, session.vectors.list()
    for vector in vectors:
        vector["of_this_model"] = vector["provenance"]["model"]["fingerprint"] == fingerprint
    return {"vectors": vectors, "count": len(vectors)}


@operation(path="steering/get")
def get_steering_vector(
    session: "LocalSession", name: DatasetId, any_model: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """A steering vector: what `create_steering_vector` returned, and `vector`, `[*width]` or `[layers, *width]`.

    Args:
        any_model: read it even if it was computed with other weights, about which it says nothing.
    """
    found = session.vectors.read(name, None if any_model else session.identity)
    return found.describe() | {"vector": on_device(found.vector, device)}


@operation(safe=False, path="steering/delete")
def delete_steering_vector(session: "LocalSession", name: DatasetId) -> dict[str, Any]:
    """Delete a steering vector, whichever model's. Returns deleted, name, and the bytes freed."""
    return {"deleted": True, "name": name, "bytes_freed": session.vectors.delete(name)}


def _examples(session: "LocalSession", positive: list[Any], negative: list[Any], *, special: bool) -> Examples:
    tokens, names = [], []
    for group, prompts in (("positive", positive), ("negative", negative)):
        if not prompts:
            raise InvalidArgument(f"{group} is empty; give at least one example", param=group)
        for index, prompt in enumerate(prompts):
            names.append(f"{group}.{index}")
            tokens.append(tokens_of(session.model, prompt, special=special, name=names[-1]))
            check_tokens(session.model, tokens[-1], names[-1])
    return Examples(tokens, names, len(positive))


def _record(prompts: list[Any], tokens: list[list[int]]) -> dict[str, Any]:
    """What is kept of a group of examples: themselves while they are short, and the hash of their tokens."""
    try:
        short = len(json.dumps(prompts)) <= _KEPT_CHARACTERS
    except (TypeError, ValueError):  # a conversation may hold what is no JSON
        short = False
    return {
        "count": len(prompts),
        "tokens": sum(len(one) for one in tokens),
        "token_ids_sha256": hashlib.sha256(repr(tokens).encode()).hexdigest(),
        "examples": prompts if short else None,
    }
