"""sdpa for grouped-query attention on the CPU, as an attention that transformers can be told to use.

With a mask (any batch of unequal rows has one) transformers' sdpa first repeats keys and values for every query head.
torch's CPU kernel can group the heads itself, and at long contexts the copies cost many times the attention.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SDPA_GROUPED = "sdpa_grouped"


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is None or query.device.type != "cpu":
        return sdpa_attention_forward(  # pyright: ignore[reportReturnType]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA_GROUPED, _attend)
AttentionMaskInterface.register(SDPA_GROUPED, sdpa_mask)
