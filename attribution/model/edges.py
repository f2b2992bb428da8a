"""Attention with edges removed, inside a trace.

1. The mask that the model gave a layer, [row, 1, query, key], or the causal one that it left to the kernel, is repeated
   for every head.
2. The cut edges are masked in it as the future is: before the softmax, which spreads over the edges that are left.

A removed edge has the probability 0, not a small one: exp(score + finfo.min − highest score) is 0 in every dtype. Every
row of the batch takes this path, those without a cut too, so that they differ by their cuts alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from attribution.errors import UnsupportedModel
from attribution.model.block import family_of
from attribution.model.capture import Change, Feeding
from attribution.model.grouped import SDPA_GROUPED
from attribution.model.traced import TracedModel

MASKED = ("eager", "sdpa", SDPA_GROUPED)
"""The attentions that take a mask per head."""


@dataclass(frozen=True)
class Cut:
    """Edges removed in one row of a batch, in one layer.

    Attributes:
        row: of the batch.
        layer: of the model.
        heads: query heads; None is all of them.
        removed: True where an edge is removed, over the columns fed now and all columns, cached ones first.
    """

    row: int
    layer: int
    heads: tuple[int, ...] | None
    removed: Bool[Tensor, "fed column"]


def in_columns(removed: Bool[Tensor, "query key"], fed: int, columns: int) -> Bool[Tensor, "fed column"]:
    """Edges between positions as edges between the columns of a left-padded batch."""
    return pad(removed, (columns - removed.shape[1], 0, fed - removed.shape[0], 0))


def check_cuttable(model: TracedModel) -> None:
    """See that edges can be removed in this model.

    Raises:
        UnsupportedModel: its attention is not known, or it takes no mask per head.
    """
    family_of(model)
    if model.attn_implementation not in MASKED:
        raise UnsupportedModel(
            f"edges are removed in the attention mask, and {model.attn_implementation!r}, the attention of "
            f"{model.id!r}, takes none per head; load it with attn_implementation='sdpa' or 'eager'",
            param="model",
        )


def cut_layer(model: TracedModel, layer: int, cuts: Sequence[Cut], mask: Int[Tensor, "row column"], fed: int) -> None:
    """Inside a trace, before anything of this layer's attention is read: remove the edges of its `cuts`.

    Args:
        cuts: those of other layers are left out.
        mask: 1 for tokens and 0 for padding, over cached and fed columns: that of the forward being traced.
        fed: how many of the last columns are fed now.
    """
    family = family_of(model)
    attention: Any = model.envoy.get(f"{family.layers}.{layer}.{family.attention}")
    args, kwargs = attention.inputs
    additive = model.attn_implementation == "eager"
    seen = kwargs.get("attention_mask")
    if seen is None:
        seen = causal_mask(mask, fed)
    if additive and seen.dtype == torch.bool:
        seen = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, _lowest(model.dtype))
    chosen = [cut for cut in cuts if cut.layer == layer]
    attention.inputs = (args, {**kwargs, "attention_mask": cut_mask(seen, chosen, model.dimensions.n_heads)})


def causal_mask(mask: Int[Tensor, "row column"], fed: int) -> Bool[Tensor, "row 1 fed column"]:
    """What the last `fed` columns see: themselves and the tokens before them, no padding."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    before = columns[None, :] <= columns[-fed:, None]
    return (before[None] & mask.bool()[:, None, :])[:, None]


def cut_mask(seen: Tensor, cuts: Sequence[Cut], n_heads: int) -> Tensor:
    """A mask [row, 1, fed, column], of booleans (True is seen) or added to the scores, per head and with cuts."""
    found = seen.expand(-1, n_heads, -1, -1).clone()
    hidden = False if seen.dtype == torch.bool else _lowest(seen.dtype)
    for cut in cuts:
        if cut.removed.shape != found.shape[2:]:
            raise RuntimeError(f"a cut over {list(cut.removed.shape)} columns, and a mask over {list(found.shape[2:])}")
        heads = list(range(n_heads) if cut.heads is None else cut.heads)
        found[cut.row, heads] = found[cut.row, heads].masked_fill(cut.removed.to(found.device), hidden)
    return found


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def cut_change(model: TracedModel, cuts: Sequence[Cut]) -> Change:
    """The cuts as a block of a trace, for `capture.forward`."""

    def change(feeding: Feeding) -> None:
        for layer in sorted({cut.layer for cut in cuts}):
            cut_layer(model, layer, cuts, *feeding())

    return change
