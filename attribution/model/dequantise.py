"""Dense weights of quantised linear layers: GPTQ from the tensors of its checkpoint, bitsandbytes from the live module.

GPTQ packs P = 32 / bits codes into an int32, the first in the lowest bits. For input i and output o of a layer:

1. code(i, o) from qweight [in / P, out], packed along i.
2. stored(g, o) from qzeros [groups, out / P], packed along o; the zero is stored + 1 modulo 2^bits in version 1 of the
   format ("gptq") and stored itself in version 2 ("gptq_v2").
3. W[o, i] = scales[g_idx[i], o] · (code − zero), rounded in the dtype of the scales.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from attribution.errors import GradientsRefused

_WORD = 32
_AT_ONCE = 2**24  # weights that are unpacked together: their codes take four bytes each for a moment
_BITSANDBYTES = ("Params4bit", "Int8Params")


class GPTQTensors(NamedTuple):
    """One layer as a GPTQ checkpoint holds it; see the head of this module."""

    qweight: Int[Tensor, "words_in out"]
    qzeros: Int[Tensor, "groups words_out"]
    scales: Float[Tensor, "groups out"]
    g_idx: Int[Tensor, "in"]


def gptq_weight(tensors: GPTQTensors, bits: int, version: int) -> Float[Tensor, "out in"]:
    """The weight that a GPTQ layer stands for, in the dtype of its scales and on their device.

    Raises:
        GradientsRefused: codes of these bits are packed in another way.
    """
    if bits not in (2, 4, 8):
        raise GradientsRefused(f"its weights have {bits} bits; GPTQ is unpacked here with 2, 4 and 8 bits")
    most, per_word = 2**bits - 1, _WORD // bits
    groups, (n_in, n_out) = tensors.g_idx.long(), (len(tensors.g_idx), tensors.scales.shape[1])
    weight = tensors.scales.new_empty(n_out, n_in)
    step = max(_AT_ONCE // n_in // per_word, 1) * per_word
    for start in range(0, n_out, step):
        part = slice(start, min(start + step, n_out))
        zeros = unpack(tensors.qzeros[:, start // per_word : -(-part.stop // per_word)].T, bits)[: part.stop - start].T
        if version == 1:
            zeros = (zeros + 1) & most
        codes = unpack(tensors.qweight[:, part], bits)[:n_in]
        scales = tensors.scales[:, part]
        weight[part] = (scales[groups] * (codes - zeros[groups]).to(scales.dtype)).T
    return weight


def unpack(words: Int[Tensor, "words columns"], bits: int) -> Int[Tensor, "values columns"]:
    """The 32 / bits values of each word, one below the other."""
    shifts = torch.arange(0, _WORD, bits, dtype=words.dtype, device=words.device)
    return ((words[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(0, 1)


def is_dense(module: Any) -> bool:
    """Whether the tensors that a module itself holds are plain numbers of at least 16 bits."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    plain = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return all(type(one) in plain and one.is_floating_point() and one.element_size() > 1 for one in tensors)


def is_bitsandbytes(module: Any) -> bool:
    """Whether the weight of a module was quantised by bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in _BITSANDBYTES


def dense_weight(module: Any) -> Float[Tensor, "out in"]:
    """The weight of a linear layer, dequantised where bitsandbytes holds it.

    Raises:
        GradientsRefused: the weight is quantised in a way that is not known here.
    """
    if is_bitsandbytes(module):
        # not at the top: it imports bitsandbytes, which is an extra
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach()
    if not is_dense(module):
        raise GradientsRefused(f"{type(module).__name__} is not dequantised here")
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight  # Linear holds [out, in], GPT-2's Conv1D [in, out]
