"""The logit lens as an operation. `docs/lens.md`."""

from typing import TYPE_CHECKING, Any

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import InvalidArgument
from attribution.interventions.edges import Selection, selected
from attribution.interventions.lens import Cell, Streams, final_log_probs, lens_cells, pieces_of, streams_of
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps, operation
from attribution.prompts import Message, given_tokens, only_given, token_id_of, token_text

if TYPE_CHECKING:
    from attribution.session import LocalSession


@operation(path="interventions/lens")
def lens(
    session: "LocalSession",
    prompt: str | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    dataset_id: DatasetId | None = None,
    sample_id: SampleId | None = None,
    layers: Selection | None = None,
    positions: Selection | None = None,
    top_k: Index = 5,
    tokens: list[Index | str] | None = None,
    add_special_tokens: bool = True,
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """What the model would say next if the stream entering a layer were the final one: the logit lens.

    Args:
        prompt: a text; this, `messages` (put through the chat template), `token_ids` and a stored sample (`dataset_id`
            and `sample_id`) exclude each other.
        layers: layer ℓ is the stream entering it and the number of layers the final stream, as in `get_hidden_states`:
            one, a list, a range as "3:7", or "all"; None is all.
        positions: which tokens' next-token distributions, in the same ways; negative numbers count from the end.
        top_k: how many of the most likely tokens are returned.
        tokens: by id or by a text of one token; their probabilities and ranks are returned too.
        add_special_tokens: whether a text gets the tokenizer's own special tokens; False for templated texts.

    Returns:
        model_id, n_layers, layers, positions, token_ids and tokens (of the whole prompt), and cells: for each layer and
        then each position, kl (of the final distribution from this one, nats), entropy (nats), top (token, token_id,
        probability), asked (token, token_id, probability, rank; rank 1 is the most likely).
    """
    model = session.model
    last = model.dimensions.n_layers
    if not 1 <= top_k <= model.dimensions.d_vocab:
        raise checks.out_of_range("top_k", top_k, f"{model.id} has 1 to {model.dimensions.d_vocab} tokens to show")
    asked = [token_id_of(model, token, "tokens") for token in tokens or []]
    chosen = _chosen("layers", layers, last + 1)
    if dataset_id is None and sample_id is None:
        ids = given_tokens(model, prompt, messages, token_ids, special=add_special_tokens)
        streams = None
    else:
        only_given({"dataset_id": dataset_id, "prompt": prompt, "messages": messages, "token_ids": token_ids})
        ids, streams = _stored(session, dataset_id, sample_id)
    at = _chosen("positions", positions, len(ids))
    rows = yield from _rows(model, streams or streams_of(model, ids, chosen), chosen, at, top_k, asked)
    said = {"model_id": model.id, "n_layers": last, "layers": chosen, "positions": at, "token_ids": ids}
    texts = [token_text(model, token) for token in ids]
    return said | {"tokens": texts, "cells": [[_described(model, cell) for cell in row] for row in rows]}


def _stored(session: "LocalSession", dataset_id: str | None, sample_id: int | str | None) -> tuple[list[int], Streams]:
    """The tokens of a stored sample, and its streams."""
    if dataset_id is None or sample_id is None:
        raise InvalidArgument("a stored sample has a dataset_id and a sample_id; one is missing", param="sample_id")
    sample = session.sample(dataset_id, sample_id)
    return sample.token_ids, lambda layer, positions: sample.read("resid", layer, positions)


def _rows(
    model: TracedModel, streams: Streams, layers: list[int], positions: list[int], top_k: int, asked: list[int]
) -> Steps[list[list[Cell]]]:
    """The cells of each layer; one step per layer and piece of the positions."""
    rows: list[list[Cell]] = [[] for _ in layers]
    done = 0
    for piece in pieces_of(positions, model.dimensions.d_vocab):
        final = final_log_probs(model, streams, piece)
        for row, layer in zip(rows, layers, strict=True):
            row += lens_cells(model, streams, layer, piece, final, top_k, asked)
            done += len(piece)
            yield Progress(done, len(layers) * len(positions))
    return rows


def _chosen(name: str, given: Any, count: int) -> list[int]:
    """The numbers that a selection names among 0 … count − 1, in its order; None is all of them."""
    if given is None:
        return list(range(count))
    return checks.positions(name, selected(given, count, name, param=name), count)


def _described(model: TracedModel, cell: Cell) -> dict[str, Any]:
    return {
        "kl": cell.kl,
        "entropy": cell.entropy,
        "top": [
            {"token": token_text(model, token), "token_id": token, "probability": probability}
            for token, probability in cell.top
        ],
        "asked": [
            {"token": token_text(model, token), "token_id": token, "probability": probability, "rank": rank}
            for token, probability, rank in cell.asked
        ],
    }
