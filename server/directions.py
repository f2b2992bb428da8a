"""What interventions read before anything is generated: steering vectors, and means over stored samples."""

import asyncio
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from attribution.errors import InvalidRequest, OutOfRange
from attribution.interventions.functions import Function, adding, projecting_out, replacing, scaling, zeroing
from attribution.steering import SteeringVector
from attribution.stored import Identity
from attribution.written import of_sample
from server.feature_steering import feature_functions
from server.interventions import Declared, Knockout, Ready, Sited, naming
from server.registry import LoadedModel


async def ready(loaded: LoadedModel, declared: list[Declared]) -> list[Ready | Knockout]:
    """Make the functions of interventions, in their order.

    Raises:
        InvalidRequest: numbers that do not fit the site.
        VectorNotFound, VectorMismatch, DatasetNotFound, SampleMismatch, StorageFailed: what is named cannot be used.
    """
    found: list[Ready | Knockout] = []
    for one in declared:
        if isinstance(one, Knockout):
            found.append(one)
            continue
        with naming(one.index):
            if one.feature is not None:
                made = await asyncio.to_thread(feature_functions, loaded.model, one.feature, one.body)
                found.append(Ready(one, *made))
                continue
            functions = [function_of(one, direction) for direction in await _directions(loaded, one)]
            found.append(Ready(one, tuple(functions)))
    return found


def function_of(one: Sited, direction: Tensor | None) -> Function:
    """What an intervention does with the rows of one of its targets.

    Raises:
        InvalidRequest: the direction is 0 where it has to point somewhere.
    """
    body = one.body
    points = body.type == "project_out" or body.normalise in ("relative", "both")
    if points and direction is not None and not bool(direction.ne(0).any(-1).all()):
        name = "name" if body.vector is None else "vector"
        raise InvalidRequest("the vector is 0 and has no direction", param=name)
    match body.type, direction:
        case "add", Tensor():
            return adding(direction, 1.0 if body.strength is None else body.strength, body.normalise)
        case "project_out", Tensor():
            return projecting_out(direction)
        case "ablate", Tensor():
            return replacing(direction)
        case "ablate", None:
            return zeroing()
        case "scale", None:
            assert body.factor is not None
            return scaling(body.factor)
    raise AssertionError(f"no function for {body.type}")


async def _directions(loaded: LoadedModel, one: Sited) -> list[Tensor | None]:
    """The direction of each target, [group, width]; None for those that need none."""
    body = one.body
    numbers, name = (body.vector, "vector") if body.vector is not None else (body.value, "value")
    if isinstance(numbers, list):
        return [_given(one, numbers, name)] * len(one.targets)
    if body.name is not None:
        identity = Identity.of(loaded.model)
        vector = await asyncio.to_thread(loaded.session.vectors.read, body.name, identity)
        return [_of_vector(one, vector, layer) for layer in one.layers]
    if body.dataset_id is not None:
        return [_grouped(one, mean) for mean in await _means(loaded, one, body.dataset_id)]
    return [None] * len(one.targets)


def _given(one: Sited, numbers: list[float], name: str) -> Tensor:
    """Numbers of the request: for the whole width, or with heads for each of them."""
    expected = one.selector.width[-1] if one.heads is not None else prod(one.selector.width)
    if len(numbers) != expected:
        whole = "the width of one head" if one.heads is not None else "the width"
        raise InvalidRequest(
            f"{name} has {len(numbers)} numbers; {whole} of {one.selector.text!r} is {expected}", param=name
        )
    return torch.tensor(numbers, dtype=torch.float64)[None]


def _of_vector(one: Sited, vector: SteeringVector, layer: int | None) -> Tensor:
    if layer is None and vector.stacked:
        raise InvalidRequest(
            f"the steering vector {vector.name!r} has a direction for each of the layers {list(vector.layers)}, and "
            f"{one.selector.text!r} names no layers; use a point, as in 'resid_post[3]'",
            param="name",
        )
    if vector.stacked and layer not in vector.layers:
        raise OutOfRange(
            f"the steering vector {vector.name!r} has a direction for each of the layers {list(vector.layers)}, and "
            f"none for layer {layer}",
            param="name",
        )
    direction = vector.vector if layer is None else vector.at(layer)
    if one.heads is not None and vector.width == one.selector.width[1:]:
        return direction[None]
    vector.check_width(one.selector.width, one.selector.text)
    return _grouped(one, direction)


def _grouped(one: Sited, direction: Tensor) -> Tensor:
    """A direction of the whole site as [group, width]: of the chosen heads, or of all as one."""
    return direction.flatten()[None] if one.heads is None else direction[list(one.heads)]


# --- means over stored samples

_STORED = ("resid_pre", "resid_post", "mlp_out", "z", "attn_out")
"""The points whose means stored samples tell."""


async def _means(loaded: LoadedModel, one: Sited, dataset_id: str) -> list[Tensor]:
    """The mean of each target over all positions of all samples, in float64; one sample at a time."""
    point = one.point
    if point not in _STORED:
        raise InvalidRequest(
            f"stored samples tell the mean of {', '.join(_STORED)}, not of {one.selector.text!r}; give it as 'value'",
            param="dataset_id",
        )
    session, worker = loaded.session, loaded.worker
    layers = [layer for layer in one.layers if layer is not None]
    totals = [torch.zeros(one.selector.width, dtype=torch.float64) for _ in layers]
    tokens = 0

    def add(sample_id: int | str) -> int:
        sample = session.sample(dataset_id, sample_id)
        for total, layer in zip(totals, layers, strict=True):
            total += of_sample(loaded.model, sample)(point, layer).double().sum(0)  # which keeps what it has read
        return sample.seq_len

    def run(job: Callable[[], Any]) -> Any:
        return asyncio.wrap_future(worker.submit(job))

    for sample_id in await run(lambda: session.sample_ids(dataset_id)):
        tokens += await run(lambda one=sample_id: add(one))
    means = [total / tokens for total in totals]
    if not all(bool(mean.isfinite().all()) for mean in means):
        raise InvalidRequest(
            f"the mean over {dataset_id!r} is not finite: the model computed NaN or inf for a sample",
            param="dataset_id",
        )
    return means
