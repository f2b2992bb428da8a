"""Collect the activations of samples.

1. Sort the samples by length and cut them into batches, of so many rows and tokens at most, the longest first: what
   does not fit into the device's memory fails at the start.
2. Run each batch once, left-padded, without a cache, and read `resid`, `z` and `mlp_out` off it.
3. Cut the padding off every row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attribution.model.block import family_of
from attribution.model.capture import Batch, Stream, forward
from attribution.model.resolve import stream_of
from attribution.model.traced import TracedModel

BATCH_ROWS, BATCH_TOKENS = 16, 4096
"""The most rows of a batch, and the most tokens, padding included; a longer sample is a batch of its own."""


def batches(lengths: Sequence[int], most_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """The indices of samples of these lengths in batches: similar lengths together, the longest first."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        batch = found[-1] if found else []
        if batch and len(batch) < BATCH_ROWS and (len(batch) + 1) * lengths[batch[0]] <= most_tokens:
            batch.append(index)
        else:
            found.append([index])
    return found


def stored_streams(model: TracedModel) -> dict[str, Stream]:
    """What is kept of a sample, by name: the stream entering each layer and leaving the last, z, and mlp_out.

    Raises:
        UnsupportedModel: the model has no points.
    """
    family_of(model)
    layers = list(range(model.dimensions.n_layers))
    entering, leaving = stream_of(model, "resid_pre", layers), stream_of(model, "resid_post", layers[-1:])
    return {
        "resid": Stream(entering.sites + leaving.sites),
        "z": stream_of(model, "z", layers),
        "mlp_out": stream_of(model, "mlp_out", layers),
    }


def padded(model: TracedModel, prompts: Sequence[list[int]]) -> Batch:
    """Prompts as one left-padded batch, which needs no cache and gives the last position's logits alone."""
    columns = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (columns - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    device = model.device
    return Batch(ids.to(device), mask.to(device), positions.to(device), cache=None, keep=1)


def collect(model: TracedModel, prompts: Sequence[list[int]]) -> list[dict[str, Tensor]]:
    """Run prompts as one batch; for each, `resid`, `z` and `mlp_out` on the CPU, views of what the batch gave.

    Raises:
        UnsupportedModel: the model has no points.
    """
    streams = stored_streams(model)
    _, captured = forward(model, padded(model, prompts), streams.values())
    return [
        {name: captured[stream][:, row, -len(prompt) :] for name, stream in streams.items()}
        for row, prompt in enumerate(prompts)
    ]
