"""Edges removed in a trace: held against scores masked by hand, to the bit where nothing may change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attribution.errors import UnsupportedModel
from attribution.interventions.edges import EdgeSpec, removed_edges
from attribution.model.capture import Batch, forward
from attribution.model.edges import Cut, causal_mask, check_cuttable, cut_change, cut_layer, cut_mask, in_columns
from attribution.model.resolve import stream_of
from attribution.model.traced import TracedModel
from tests.attribution.by_hand import Removed, run_by_hand
from tests.models import FAMILIES, N_HEADS, N_LAYERS, traced

KINDS = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")]
IDS = [[5, 100, 7, 42, 200, 9, 13, 77, 31], [250, 3, 90, 14, 8, 61]]
CUTS = {  # per row of the batch: (layer, heads, edge)
    0: [(1, None, [-1, 0]), (1, (4,), [3, 2]), (2, (0, 5), ["5:", "4:6"])],
    1: [(0, (1, 2), ["*", "2:"]), (1, (3,), [-2, 1])],
}


def batch_of(rows: list[list[int]], cache: object | None = None, fed: int | None = None) -> Batch:
    """Rows left-padded together; logits of every column, or of the last `fed`, which alone are fed."""
    columns = max(map(len, rows))
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    fed = columns if fed is None else fed
    return Batch(ids[:, -fed:], mask, positions[:, -fed:], cache, fed)


def cuts_of(row: int, row_in_batch: int, batch: Batch) -> list[Cut]:
    """The cuts of a row in the columns of a batch."""
    columns, fed, length = batch.mask.shape[1], batch.ids.shape[1], int(batch.mask[row_in_batch].sum())
    queries = range(max(0, length - fed), length)
    return [
        Cut(
            row_in_batch,
            layer,
            heads,
            in_columns(removed_edges([EdgeSpec.parse(edge)], queries, length, len(IDS[row])), fed, columns),
        )
        for layer, heads, edge in CUTS[row]
    ]


def removed_of(row: int) -> list[Removed]:
    """The same as (layer, head, query, key), by hand."""
    edges = {
        0: {(1, None): [(8, 0)], (1, (4,)): [(3, 2)], (2, (0, 5)): [(q, k) for q in (5, 6, 7, 8) for k in (4, 5)]},
        1: {(0, (1, 2)): [(q, k) for q in range(2, 6) for k in range(2, q + 1)], (1, (3,)): [(4, 1)]},
    }
    return [
        (layer, head, query, key)
        for (layer, heads), pairs in edges[row].items()
        for head in (range(N_HEADS) if heads is None else heads)
        for query, key in pairs
    ]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_the_oracle_is_the_model_when_nothing_is_removed(family: str, kind: str):
    model = traced(family, attn_implementation=kind)
    with torch.no_grad():
        expected = model.module(torch.tensor([IDS[0]]), use_cache=False).logits[0]
    assert torch.allclose(run_by_hand(model.module, IDS[0]).logits, expected.double(), atol=2e-5)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_logits_are_those_of_scores_masked_by_hand_in_a_left_padded_batch(family: str, kind: str):
    model = traced(family, attn_implementation=kind)
    batch = batch_of(IDS)
    logits, _ = forward(
        model, batch, (), [cut_change(model, [cut for row in (0, 1) for cut in cuts_of(row, row, batch)])]
    )
    for row, ids in enumerate(IDS):
        expected = run_by_hand(model.module, ids, removed_of(row)).logits
        uncut = run_by_hand(model.module, ids).logits
        assert torch.allclose(logits[row, -len(ids) :].double(), expected, atol=1e-4)
        assert not torch.allclose(uncut, expected, atol=1e-2), "the cuts of this test change something"


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_one_unpadded_sequence_where_sdpa_is_given_no_mask(family: str, kind: str):
    model = traced(family, attn_implementation=kind)
    batch = batch_of(IDS[:1])
    logits, _ = forward(model, batch, (), [cut_change(model, cuts_of(0, 0, batch))])
    expected = run_by_hand(model.module, IDS[0], removed_of(0)).logits
    assert torch.allclose(logits[0].double(), expected, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_with_a_cache_a_prompt_and_the_steps_after_it_lose_the_same_edges(family: str, kind: str):
    model = traced(family, attn_implementation=kind)
    cache, found = DynamicCache(), []
    for stop, fed in ((5, 5), (7, 2), (8, 1), (9, 1)):
        batch = batch_of([IDS[0][:stop], IDS[1][: stop - 3]], cache, fed)
        cuts = [cut for row in (0, 1) for cut in cuts_of(row, row, batch)]
        found.append(forward(model, batch, (), [cut_change(model, cuts)])[0])
    logits = torch.cat(found, dim=1)
    for row, ids in enumerate(IDS):
        expected = run_by_hand(model.module, ids, removed_of(row)).logits
        assert torch.allclose(logits[row, -len(ids) :].double(), expected, atol=1e-4)


def pattern_of(model: TracedModel, ids: list[int], cuts: list[Cut], layer: int) -> Tensor:
    """The pattern [head, query, key] that the model's own attention used in one of two equal rows, the first: with
    one-hot vectors as values, what a head puts out is its pattern."""
    dims, batch = model.dimensions, batch_of([ids, ids])
    values = torch.eye(len(ids), dims.d_head)[None, :, None].expand(2, -1, dims.n_kv_heads, -1).flatten(2)
    family = model.family
    assert family is not None
    place, z = family.points["v"], family.points["z"]
    base = f"{family.layers}.{layer}"
    with torch.no_grad(), model.envoy.trace(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False):
        cut_layer(model, layer, cuts, batch.mask, batch.ids.shape[1])
        projection: Any = model.envoy.get(f"{base}.{place.module}")
        written = projection.output.clone()
        if place.third is None:
            written[:] = values
        else:
            written.chunk(3, dim=-1)[place.third][:] = values
        projection.output = written
        found = model.envoy.get(f"{base}.{z.module}").input.save()  # type: ignore[union-attr]
    return found[0].unflatten(-1, (dims.n_heads, -1)).transpose(0, 1)[..., : len(ids)]


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_removed_edge_has_probability_0_rows_sum_to_1_and_other_heads_and_rows_keep_every_bit(
    family: str, kind: str, layer: int
):
    model, ids = traced(family, attn_implementation=kind), IDS[0][:7]
    edges = [EdgeSpec.parse([5, 1]), EdgeSpec.parse([-1, "3:6"])]
    removed = removed_edges(edges, range(7), 7, 7)
    before = pattern_of(model, ids, [Cut(1, layer, (2, 3), removed)], layer)  # the cut is in the other row
    after = pattern_of(model, ids, [Cut(0, layer, (2, 3), removed)], layer)
    assert (before[2:4, removed] > 0).any(), "the test removes something"
    assert (after[2:4, removed] == 0).all()
    assert torch.allclose(after.sum(-1), torch.ones(()), atol=1e-6)
    others = [0, 1, 4, 5]
    assert torch.equal(after[others], before[others])
    assert torch.equal(after[2:4, [0, 1, 2, 3, 4]], before[2:4, [0, 1, 2, 3, 4]])
    left = before[2:4].masked_fill(removed, 0)
    assert torch.allclose(after[2:4], left / left.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_what_lies_before_the_query_keeps_every_bit_and_what_lies_behind_does_not(family: str, kind: str):
    # 2 rows · 8 tokens fill whole vector registers: what is left over, torch computes by other code, to other last bits
    model, ids = traced(family, attn_implementation=kind), IDS[0][:8]
    cut = Cut(1, 1, (4,), removed_edges([EdgeSpec.parse([5, 2])], range(8), 8, 8))
    streams = {name: stream_of(model, name, list(range(N_LAYERS))) for name in ("z", "resid_post")}
    logits, captured = forward(model, batch_of([ids, ids]), streams.values(), [cut_change(model, [cut])])
    assert torch.equal(logits[0, :5], logits[1, :5])
    assert not torch.equal(logits[0, 5], logits[1, 5])
    for stream in streams.values():
        assert torch.equal(captured[stream][:, 0, :5], captured[stream][:, 1, :5])
        assert torch.equal(captured[stream][0, 0], captured[stream][0, 1])
    one, other = captured[streams["z"]][1]
    assert torch.equal(one[:, [0, 1, 2, 3, 5]], other[:, [0, 1, 2, 3, 5]])
    assert not torch.equal(one[5, 4], other[5, 4])
    assert torch.equal(one[6:, 4], other[6:, 4]), "in this layer the later queries are untouched as well"


def test_a_mask_of_booleans_and_one_of_numbers_hide_the_same():
    seen = causal_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), 2)
    assert seen.tolist() == [[[[False, True, False], [False, True, True]]], [[[True, True, False], [True, True, True]]]]
    cut = Cut(1, 0, (3,), torch.tensor([[False, True, False], [True, False, False]]))
    found = cut_mask(seen, [cut], N_HEADS)
    assert found.shape == (2, N_HEADS, 2, 3)
    assert found[1, 3].tolist() == [[True, False, False], [False, True, True]]
    assert torch.equal(found[1, 2], seen[1, 0])
    lowest = torch.finfo(torch.float32).min
    added = cut_mask(torch.where(seen, 0.0, lowest), [cut], N_HEADS)
    assert torch.equal(added, torch.where(found, 0.0, lowest))


def test_a_cut_over_other_columns_than_the_mask_is_an_error():
    with pytest.raises(RuntimeError, match="columns"):
        cut_mask(torch.ones(1, 1, 2, 4, dtype=torch.bool), [Cut(0, 0, None, torch.ones(2, 3, dtype=torch.bool))], 6)


def test_models_whose_attention_takes_no_mask_per_head_are_refused_by_name():
    model = traced("qwen3")
    check_cuttable(model)
    with pytest.raises(UnsupportedModel, match="'tiny-qwen3'"):
        check_cuttable(replace(model, family=None, note="why not"))

    class Flash(TracedModel):
        attn_implementation = "flash_attention_2"  # type: ignore[assignment]

    with pytest.raises(UnsupportedModel, match=r"'flash_attention_2'.*attn_implementation='sdpa' or 'eager'"):
        check_cuttable(Flash(**{name: getattr(model, name) for name in TracedModel.__dataclass_fields__}))
