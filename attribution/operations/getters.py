"""Read what is stored of samples, and compute from it what is not: patterns, the writes of heads.

Positions count from 0 in the sample's tokens. Activations are in the model's dtype, on `device`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import InvalidArgument
from attribution.model.block import Block
from attribution.operation import Progress, Steps, operation
from attribution.operations.devices import on_device
from attribution.store import StoredSample

if TYPE_CHECKING:
    from attribution.session import LocalSession


@operation()
def get_hidden_states(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    pos_ids: Positions | None = None,
    device: str = "cpu",
) -> Tensor:
    """The residual stream entering `layer`, `[1, pos, hidden]`; the number of layers gives the final one."""
    sample = session.sample(dataset_id, sample_id)
    count = session.model.dimensions.n_layers + 1
    checks.in_range("layer", layer, count, "the layers, with the final stream as the last,")
    return on_device(sample.read("resid", layer, _positions(sample, pos_ids))[None], device)


@operation()
def get_attn_weights(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    head: Index | None = None,
    pos_ids: Positions | None = None,
    device: str = "cpu",
) -> Tensor:
    """The attention pattern, recomputed exactly for the layer and the queries `pos_ids`.

    Returns:
        `[1, heads, query, key]`, or `[1, query, key]` of one head; the keys are all positions of the sample, 0 where
        the layer does not look.
    """
    sample = session.sample(dataset_id, sample_id)
    pattern = _pattern(session, sample, layer, head, checks.positions("pos_ids", pos_ids, sample.seq_len))
    return on_device(pattern[None] if head is None else pattern, device)


@operation()
def get_attn_weights_batch(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_ids: list[SampleId],
    layer: Index,
    head: Index,
    pos_ids: Positions,
    show_progress: bool = True,
    device: str = "cpu",
) -> Steps[Tensor]:
    """The pattern of one head over several samples, `[samples, query, key]`; keys beyond a sample's end are 0."""
    samples = [session.sample(dataset_id, one) for one in sample_ids]
    if not samples:
        raise InvalidArgument("sample_ids is empty; it names at least one sample", param="sample_ids")
    longest, rows = max(sample.seq_len for sample in samples), []
    for sample in samples:
        queries = checks.positions("pos_ids", pos_ids, sample.seq_len)
        rows.append(pad(_pattern(session, sample, layer, head, queries)[0].cpu(), (0, longest - sample.seq_len)))
        yield Progress(len(rows), len(samples))
    return on_device(torch.stack(rows), device)


def _pattern(session: "LocalSession", sample: StoredSample, layer: int, head: int | None, queries: list[int]) -> Tensor:
    """[heads, query, key] over all positions of the sample."""
    dims = session.model.dimensions
    checks.in_range("layer", layer, dims.n_layers, "the layers")
    heads = range(dims.n_heads) if head is None else [checks.in_range("head", head, dims.n_heads, "the heads")]
    seen = max(queries) + 1
    stream = sample.read("resid", layer, list(range(seen)))
    with torch.no_grad():
        pattern = Block(session.model, layer).pattern(stream, queries, list(heads))
    return pad(pattern, (0, sample.seq_len - seen))


@operation()
def get_head_output(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    head: Index,
    pos_ids: Positions | None = None,
    device: str = "cpu",
) -> Tensor:
    """What a head writes to the residual stream, `[pos, hidden]`, in float32 (float64 when the model is).

    The heads' outputs and the projection's bias sum to `get_attn_output`. Gemma 2: after the post-norm, whose scale is
    that of all heads together.
    """
    z = _heads_z(session, dataset_id, sample_id, layer, pos_ids)
    checks.in_range("head", head, session.model.dimensions.n_heads, "the heads")
    with torch.no_grad():
        return on_device(Block(session.model, layer).head_writes(z, [head])[:, 0], device)


@operation()
def get_attn_output(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    pos_ids: Positions | None = None,
    device: str = "cpu",
) -> Tensor:
    """What attention adds to the residual stream, `[1, pos, hidden]`."""
    z = _heads_z(session, dataset_id, sample_id, layer, pos_ids)
    return on_device(Block(session.model, layer).attn_out(z)[None], device)


@operation()
def get_mlp_output(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    pos_ids: Positions | None = None,
    device: str = "cpu",
) -> Tensor:
    """What the MLP adds to the residual stream, `[1, pos, hidden]`."""
    sample = session.sample(dataset_id, sample_id)
    checks.in_range("layer", layer, session.model.dimensions.n_layers, "the layers")
    return on_device(sample.read("mlp_out", layer, _positions(sample, pos_ids))[None], device)


def _heads_z(
    session: "LocalSession", dataset_id: str, sample_id: int | str, layer: int, pos_ids: list[int] | None
) -> Tensor:
    sample = session.sample(dataset_id, sample_id)
    checks.in_range("layer", layer, session.model.dimensions.n_layers, "the layers")
    return sample.read("z", layer, _positions(sample, pos_ids))


def _positions(sample: StoredSample, given: list[int] | None) -> list[int] | None:
    """`given`, checked; None stays None: all positions are read in one go."""
    return None if given is None else checks.positions("pos_ids", given, sample.seq_len)
