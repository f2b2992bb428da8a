"""What storing samples takes, before anything runs: bytes on disk, and memory for the largest batch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from attribution.activations import batches
from attribution.errors import CannotFit
from attribution.model.block import family_of
from attribution.model.traced import TracedModel
from attribution.sample_file import header_bytes
from attribution.store import ActivationStore
from attribution.stored import Identity, metadata_record


@dataclass(frozen=True)
class MemoryEstimate:
    """What storing some samples takes.

    Attributes:
        samples, tokens: how many.
        disk_bytes: of their files, within 1 %.
        peak_bytes: of this machine's memory: what the largest batch captures. The transients of the forward itself
            (an MLP's inside, the scores of eager attention) are not in it.
        device_bytes: of the GPUs' memory for the same; 0 when the model is on the CPU.
    """

    samples: int
    tokens: int
    disk_bytes: int
    peak_bytes: int
    device_bytes: int


def estimate(model: TracedModel, lengths: Sequence[int]) -> MemoryEstimate:
    """What storing samples of these lengths takes.

    Raises:
        UnsupportedModel: the model has no points, so that nothing can be stored.
    """
    family_of(model)
    dims, size = model.dimensions, model.dtype.itemsize
    stream, layers = dims.d_model * size, dims.n_layers
    z = layers * dims.n_heads * dims.d_head * size
    stored = (2 * layers + 1) * stream + z  # of one token
    captured = stored + 2 * layers * stream  # the output of attention and the input of the MLP come along
    largest = max((len(batch) * lengths[batch[0]] for batch in batches(lengths)), default=0)
    on_gpu = model.device.type == "cuda"
    return MemoryEstimate(
        samples=len(lengths),
        tokens=sum(lengths),
        disk_bytes=sum(
            count * (length * stored + _header_bytes(model, length)) for length, count in Counter(lengths).items()
        ),
        peak_bytes=largest * (stored if on_gpu else stored + captured),
        # the layers of one stream are stacked before they leave
        device_bytes=largest * (captured + max(z, (layers + 1) * stream)) if on_gpu else 0,
    )


def _header_bytes(model: TracedModel, tokens: int) -> int:
    """The bytes of a file before its tensors. The tokens being unknown, they are taken to be long numbers."""
    dims = model.dimensions
    widths = {"resid": (dims.d_model,), "z": (dims.n_heads, dims.d_head), "mlp_out": (dims.d_model,)}
    shapes = {
        name: (model.dtype, (dims.n_layers + (name == "resid"), tokens, *width)) for name, width in widths.items()
    }
    return len(header_bytes(shapes, metadata_record(Identity.of(model), [dims.d_vocab - 1] * tokens, finite=True)))


def check_room(model: TracedModel, store: ActivationStore, needed: MemoryEstimate) -> None:
    """See that there is room for what is about to be stored.

    Raises:
        CannotFit: saying how much is needed and how much there is.
    """
    kept = min(store.ram_bytes - store.ram_used, needed.disk_bytes)
    wanted = (
        ("disk", needed.disk_bytes, store.disk_free(), f"below {store.root}", "free the disk, or take another folder"),
        (
            "memory",
            needed.peak_bytes + kept,
            psutil.virtual_memory().available,
            f"({_readable(kept)} of it for samples that stay in memory)",
            "give the store less memory, or run shorter samples",
        ),
        ("GPU memory", needed.device_bytes, _device_free(model), f"on {model.device}", "run shorter samples"),
    )
    for what, bytes_needed, there, where, help_ in wanted:
        if bytes_needed > there:
            raise CannotFit(
                f"storing {needed.samples} samples of {needed.tokens:,} tokens needs {_readable(bytes_needed)} of "
                f"{what} {where}, and {_readable(there)} are free: {help_}",
                param="prompts",
            )


def _device_free(model: TracedModel) -> int:
    """The memory that is free on the GPUs of a model, what torch holds in reserve included."""
    devices = {parameter.device for parameter in model.module.parameters() if parameter.device.type == "cuda"}
    return sum(
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices
    )


def _readable(size: int) -> str:
    scaled = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if scaled < 1024:
            return f"{scaled:.4g} {unit}"
        scaled /= 1024
    return f"{scaled:.4g} TiB"
