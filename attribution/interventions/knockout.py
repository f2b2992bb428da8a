"""Attention knockout: what the next-token distribution is without some edges of attention.

1. What lies before the first removed edge's query cannot change: it runs once, and its keys and values are kept.
2. From there on the sequence runs in rows of one batch: as it is, and once for each knockout. All rows share these keys
   and values and the mask path (`attribution.model.edges`), so that they differ by the removed edges alone.
3. Many knockouts are cut into batches of bounded size, those that begin early first; each has its own baseline row.

Knocking edges out to find where information flows: Geva et al., "Dissecting Recall of Factual Associations in
Auto-Regressive Language Models", EMNLP 2023, section 5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attribution.attention import attention_pattern, attention_scores
from attribution.errors import NotFinite
from attribution.interventions.edges import EdgeSpec, check_edges, removed_edges
from attribution.model.block import Block
from attribution.model.cache import growing_cache, pairs_of
from attribution.model.capture import Batch, forward
from attribution.model.decode import Prefill
from attribution.model.edges import Cut, check_cuttable, cut_change
from attribution.model.resolve import stream_of
from attribution.model.traced import TracedModel

BATCH_ROWS, BATCH_TOKENS, BATCH_BYTES = 64, 4096, 256 * 1024**2
"""The most rows of a batch, the most tokens fed to all rows together, and the most bytes of their keys, values, masks
and logits; two rows, the baseline and one knockout, are a batch in any case."""
PIECE = 1024
"""How many tokens of what all rows share are fed at once."""


@dataclass(frozen=True)
class Knockout:
    """Edges removed in some layers and heads; heads of None are all."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    edges: tuple[EdgeSpec, ...]


@dataclass(frozen=True)
class Outcome:
    """What one batch gave.

    Attributes:
        indices: which knockouts ran in it.
        baseline: the logits at the position, nothing removed.
        ablated: those of each knockout.
    """

    indices: list[int]
    baseline: Float[Tensor, "vocab"]
    ablated: Float[Tensor, "knockout vocab"]


@dataclass(frozen=True)
class Rows:
    """The pattern of the cut heads of one layer at the cut queries, without and with the knockout."""

    layer: int
    heads: list[int]
    queries: list[int]
    before: Float[Tensor, "head query key"]
    after: Float[Tensor, "head query key"]


def check_knockout(model: TracedModel, knockout: Knockout, length: int) -> None:
    """See that a knockout can be run on a sequence of `length` tokens.

    Raises:
        UnsupportedModel: edges cannot be removed in this model.
        OutOfRange, InvalidArgument, NoKeyLeft: as `check_edges`; a sliding layer runs out of keys earlier.
    """
    check_cuttable(model)
    check_edges(knockout.edges, length, windows={layer: Block(model, layer).window for layer in knockout.layers})


def run_knockouts(
    model: TracedModel, token_ids: list[int], knockouts: Sequence[Knockout], position: int
) -> Iterator[Outcome]:
    """Run checked knockouts of one sequence in batches, in any order; each batch when it is asked for.

    Raises:
        NotFinite: the model computes NaN or inf for this sequence.
    """
    length, tokens = len(token_ids), token_ids[: position + 1]  # nothing after the position reaches it
    starts = [min(position, *(edge.resolved(length)[0].start for edge in one.edges)) for one in knockouts]
    order = sorted(range(len(knockouts)), key=lambda index: starts[index])
    shared = Prefill(model, [tokens])
    while order:
        start = starts[order[0]]
        count = rows_at_once(model, len(tokens) - start, len(tokens)) - 1
        indices, order = order[:count], order[count:]
        while shared.fed < start:
            shared.advance(min(PIECE, start - shared.fed), 1, ())
        logits = _run(model, tokens, shared, [knockouts[index] for index in indices], length)
        yield Outcome(indices, logits[0], logits[1:])


def rows_at_once(model: TracedModel, fed: int, columns: int) -> int:
    """How many rows a batch has, the baseline's included, of which each feeds `fed` tokens and sees `columns`."""
    dims, width = model.dimensions, model.dtype.itemsize
    cached = 3 * dims.n_layers * dims.n_kv_heads * dims.d_head * columns * width  # keys and values, with room to grow
    masked = 2 * dims.n_heads * fed * columns * (1 + width)  # the kernel makes numbers of booleans
    bytes_per_row = cached + masked + 4 * 8 * dims.d_vocab
    return max(2, min(BATCH_ROWS, BATCH_TOKENS // fed, BATCH_BYTES // bytes_per_row))


def _run(
    model: TracedModel, tokens: list[int], shared: Prefill, knockouts: list[Knockout], length: int
) -> Float[Tensor, "row vocab"]:
    """The logits of the last token: nothing removed in row 0, the knockouts in the others."""
    rows, start = len(knockouts) + 1, shared.fed
    queries = range(start, len(tokens))
    pairs = [
        (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in pairs_of(shared.cache)
    ]
    batch = _batch(model, tokens, rows, start, growing_cache(pairs) if start else None)
    cuts = [cut for row, one in enumerate(knockouts, start=1) for cut in cuts_of(one, row, queries, length)]
    logits, _ = forward(model, batch, (), [cut_change(model, cuts)])
    return _finite(logits[:, 0])


def _batch(model: TracedModel, tokens: list[int], rows: int, start: int, cache: object | None, keep: int = 1) -> Batch:
    """The tokens from `start` on, in `rows` equal rows."""
    ids, positions = torch.tensor(tokens[start:]), torch.arange(start, len(tokens))
    mask, device = torch.ones(rows, len(tokens), dtype=torch.long), model.device
    return Batch(ids.expand(rows, -1).to(device), mask.to(device), positions.expand(rows, -1).to(device), cache, keep)


def cuts_of(knockout: Knockout, row: int, queries: range, length: int) -> list[Cut]:
    """The cuts of a row without padding that is fed the positions `queries`; `length` is that of the whole prompt."""
    removed = removed_edges(knockout.edges, queries, queries.stop, length, length)
    return [Cut(row, layer, knockout.heads, removed) for layer in knockout.layers]


def _finite(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise NotFinite("the model computes NaN or infinite logits for this prompt; nothing can be compared with them")
    return logits


def patterns(model: TracedModel, token_ids: list[int], knockout: Knockout) -> list[Rows]:
    """The pattern of each cut layer before and after, at the queries that lose an edge.

    Each is computed from the q and k that the model had in the run without and in the run with the knockout: in later
    layers these differ too.
    """
    length, dims = len(token_ids), model.dimensions
    heads = list(range(dims.n_heads) if knockout.heads is None else knockout.heads)
    removed = removed_edges(knockout.edges, range(length), length, length)
    queries = removed.any(-1).nonzero().flatten().tolist()
    layers = list(knockout.layers)
    q_stream, k_stream = (stream_of(model, name, layers) for name in "qk")
    batch = _batch(model, token_ids, 2, 0, None)
    change = cut_change(model, cuts_of(knockout, 1, range(length), length))
    _, captured = forward(model, batch, (q_stream, k_stream), [change])
    found = []
    for layer, q, k in zip(layers, captured[q_stream], captured[k_stream], strict=True):
        block = Block(model, layer)
        chosen = q[:, queries][:, :, heads].to(block.device), k[:, :, block.kv_heads_of(heads)].to(block.device)
        before = _pattern(block, chosen[0][0], chosen[1][0], queries, torch.zeros_like(removed[queries]))
        after = _pattern(block, chosen[0][1], chosen[1][1], queries, removed[queries])
        found.append(Rows(layer, heads, queries, before.cpu(), after.cpu()))
    return found


def _pattern(
    block: Block,
    q: Float[Tensor, "query heads d_head"],
    k: Float[Tensor, "key kv_heads d_head"],
    queries: list[int],
    removed: Bool[Tensor, "query key"],
) -> Float[Tensor, "heads query key"]:
    scores = attention_scores(block.rotate(q, queries), block.rotate(k, list(range(len(k)))), block.scaling)
    hidden = (block.hidden(queries, len(k)) | removed).to(q.device)
    return attention_pattern(scores, hidden, block.softcap)
