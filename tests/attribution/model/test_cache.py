"""The growing cache against concatenation, and grouped sdpa against repeated keys and values."""

from pathlib import Path

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attribution.model.cache import GrowingLayer, growing_cache, pairs_of
from attribution.model.grouped import SDPA_GROUPED, _attend
from attribution.model.load import LoadSpec, load
from tests.attribution.plain import prompts_of
from tests.attribution.running import Watcher, step_loop
from tests.models import save_tiny


def test_a_growing_layer_holds_what_concatenation_holds_past_its_room() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    layer = GrowingLayer(keys, values)
    for columns in [1] * 130 + [7, 300, 1]:
        more = torch.randn(2, 3, 2, columns, 4)
        keys, values = torch.cat([keys, more[0]], dim=2), torch.cat([values, more[1]], dim=2)
        found = layer.update(more[0], more[1])
        assert torch.equal(found[0], keys)
        assert torch.equal(found[1], values)
        assert layer.get_seq_length() == keys.shape[2]


def test_a_step_does_not_write_into_the_tensors_that_a_cache_was_made_from() -> None:
    keys, values = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    cache = growing_cache([(keys, values)])
    cache.update(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 3), 0)
    assert not keys.any()
    assert not values.any()
    assert pairs_of(cache)[0][0].sum() == 3


@pytest.mark.parametrize("queries", [1, 4])
def test_grouped_sdpa_equals_sdpa_over_repeated_heads(queries: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    query, key, value = torch.randn(2, 6, queries, 10), torch.randn(2, 2, 9, 10), torch.randn(2, 2, 9, 10)
    mask = torch.rand(2, 1, queries, 9) > 0.3
    mask[..., 0] = True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = _attend(module, query, key, value, mask, scaling=0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    other, _ = _attend(module, query, key, value, mask.roll(1, -1), scaling=0.3)
    assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_rows_of_unequal_length_give_the_same_tokens_with_grouped_heads(family: str, tmp_path: Path) -> None:
    folder = str(save_tiny(family, tmp_path))
    grouped, plain = load(LoadSpec(folder)), load(LoadSpec(folder, attn_implementation="sdpa"))
    assert (grouped.attn_implementation, plain.attn_implementation) == (SDPA_GROUPED, "sdpa")
    assert grouped.note is None
    groups = [[Watcher(prompt, 80) for prompt in prompts_of([3, 11, 6])] for _ in range(2)]
    for model, (first, second, third) in zip((grouped, plain), groups, strict=True):
        step_loop(model, [[first, second], [], [third]])
    assert [watcher.tokens for watcher in groups[0]] == [watcher.tokens for watcher in groups[1]]
