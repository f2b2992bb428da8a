"""Attention as functions of tensors: pattern, what lies hidden, heads."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def hidden_edges(
    queries: Int[Tensor, "query"], keys: Int[Tensor, "key"], window: int | None
) -> Bool[Tensor, "query key"]:
    """The edges that a causal layer does not see: the future, and what lies `window` or more positions back."""
    back = queries[:, None] - keys[None, :]
    return (back < 0) if window is None else (back < 0) | (back >= window)


def attention_pattern(
    q: Float[Tensor, "*#rows query heads d_head"],
    k: Float[Tensor, "*#rows key heads d_head"],
    hidden: Bool[Tensor, "query key"],
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "*#rows heads query key"]:
    """softmax(scaling · q kᵀ), through the softcap where there is one; q and k are turned (rotary) already.

    The softmax is computed in float32, as transformers' eager attention does, or in float64 when q is.
    """
    # einsum would give the layout [head, query, row · key] when only k has rows, and every later step would copy
    scores = (q * scaling).transpose(-2, -3) @ k.transpose(-2, -3).mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # added, not filled in: the backward of a sum costs nothing
    scores += torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)


def repeat_heads(kv: Float[Tensor, "*rows kv_heads d_head"], heads: list[int], n_heads: int) -> Tensor:
    """The key/value head of each of some query heads: [..., heads, d_head]. Head h reads h // (n / n_kv)."""
    group = n_heads // kv.shape[-2]
    return kv[..., [head // group for head in heads], :]
