"""The fingerprint of a model's weights: the same in every process that loads the same weights in the same dtype."""

import hashlib
from math import gcd
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 1024  # bytes of each tensor
_GOLDEN = 0.6180339887498949


def fingerprint(module: Any) -> str:
    """sha256 over the names, shapes and dtypes of all parameters and buffers, and over 1,024 bytes of each.

    The bytes are spread evenly, so that whatever training, merging or quantising changes is seen; an edit of a few
    single numbers may not be. Tensors that are offloaded (on no device) count by name and shape alone. Take it before
    the first forward: kernels of quantised layers may repack their weights then.
    """
    digest = hashlib.sha256()
    named = sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0])
    samples: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in named:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta and tensor.numel():
            samples.setdefault(tensor.device, {})[name] = _sample(tensor.detach())
    fetched: dict[str, Tensor] = {}
    for there in samples.values():  # one transfer per device
        pieces = torch.cat(list(there.values())).cpu().split([len(piece) for piece in there.values()])
        fetched.update(zip(there, pieces, strict=True))
    for name in sorted(fetched):  # wherever they lie
        digest.update(fetched[name].numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """Bytes i · step mod size of a tensor, the step near the golden section: no row or column is favoured."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if len(data) <= _SAMPLED:
        return data
    step = int(_GOLDEN * len(data))
    while gcd(step, len(data)) > 1:
        step += 1
    return data[torch.arange(_SAMPLED, device=data.device) * step % len(data)]
