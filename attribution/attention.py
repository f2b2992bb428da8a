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


def attention_scores(
    q: Float[Tensor, "*#rows query heads d_head"], k: Float[Tensor, "*#rows key kv_heads d_head"], scaling: float
) -> Float[Tensor, "*#rows heads query key"]:
    """scaling · q kᵀ of turned q and k; heads that share a key/value head stand together, as in the model."""
    queries, heads = q.shape[-3:-1]
    # [rows, kv_heads, heads of it · query, d_head] against [rows, kv_heads, d_head, key]: no head is copied
    grouped = (q * scaling).transpose(-2, -3).reshape(*q.shape[:-3], k.shape[-2], -1, q.shape[-1])
    scores = grouped @ k.transpose(-2, -3).mT
    return scores.reshape(*scores.shape[:-3], heads, queries, k.shape[-3])


def attention_pattern(
    scores: Float[Tensor, "*rows heads query key"], hidden: Bool[Tensor, "query key"], softcap: float | None
) -> Float[Tensor, "*rows heads query key"]:
    """softmax of the scores that are not hidden, through the softcap where there is one.

    The softmax is computed in float32, as transformers' eager attention does, or in float64 when the scores are.
    """
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # added, not filled in: the backward of a sum costs nothing
    scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, float("-inf"))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def kv_heads_of(heads: list[int], n_heads: int, n_kv_heads: int) -> list[int]:
    """The key/value heads that `attention_scores` needs for some query heads: all for all, else one for each."""
    if heads == list(range(n_heads)):
        return list(range(n_kv_heads))
    return [head // (n_heads // n_kv_heads) for head in heads]


def repeat_heads(kv: Float[Tensor, "*rows kv_heads d_head"], heads: list[int], n_heads: int) -> Tensor:
    """The key/value head of each of some query heads: [..., heads, d_head]. Head h reads h // (n / n_kv)."""
    group = n_heads // kv.shape[-2]
    return kv[..., [head // group for head in heads], :]
