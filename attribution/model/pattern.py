"""The attention pattern of a layer, recomputed from q and k.

The model may run an attention that returns no pattern (sdpa). q (after its norm, before rotary) and k of all positions
give it exactly:

1. turn q and k by the model's own rotary embedding,
2. scores = scaling · q kᵀ, through the softcap where the family has one,
3. mask the future, and what lies outside the layer's sliding window,
4. softmax in float32, as the eager attention of transformers does, and back to the dtype of the model.
"""

import sys

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.traced import TracedModel


def pattern(
    model: TracedModel,
    layer: int,
    q: Float[Tensor, "query heads d_head"],
    k: Float[Tensor, "key kv_heads d_head"],
    queries: range,
) -> Float[Tensor, "heads query key"]:
    """The pattern of one sequence that starts at position 0 and is not padded.

    Args:
        queries: the positions of the rows of `q`; `k` holds every position from 0.
    """
    family = model.family
    assert family is not None
    attention = model.module.get_submodule(f"{family.layers}.{layer}.{family.attention}")
    query_positions = torch.tensor(list(queries), dtype=torch.long)
    key_positions = torch.arange(len(k))
    query, key = _rotate(model, attention, q, k, query_positions)
    key = key.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    scores = query @ key.transpose(-1, -2) * float(attention.scaling)  # pyright: ignore[reportArgumentType]
    softcap = getattr(attention, "attn_logit_softcapping", None)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = key_positions[None, :] > query_positions[:, None]
    window = sliding_window(model, layer)
    if window is not None:
        hidden = hidden | (key_positions[None, :] <= query_positions[:, None] - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def sliding_window(model: TracedModel, layer: int) -> int | None:
    """How many positions back a layer sees, itself included; None is all."""
    kinds = getattr(model.module.config, "layer_types", None)
    if kinds is None or kinds[layer] != "sliding_attention":
        return None
    return model.module.config.sliding_window


def _rotate(
    model: TracedModel, attention: torch.nn.Module, q: Tensor, k: Tensor, query_positions: Tensor
) -> tuple[Float[Tensor, "heads query d_head"], Float[Tensor, "kv_heads key d_head"]]:
    query, key = q.transpose(0, 1), k.transpose(0, 1)
    rotary = getattr(model.module.get_decoder(), "rotary_emb", None)
    if rotary is None:
        return query, key
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # the class's own forward: the instance's is nnsight's and belongs to a trace
    cos, sin = type(rotary).forward(rotary, k.to(model.device), torch.arange(len(k), device=model.device)[None])
    cos, sin = cos.cpu(), sin.cpu()
    turned_query, _ = apply(query[None], query[None], cos[:, query_positions], sin[:, query_positions])
    _, turned_key = apply(key[None], key[None], cos, sin)
    return turned_query[0], turned_key[0]
