"""Ablation: what the answer's log-probability is without some parts of the model. Formulas: `docs/ablation.md`.

A head is set before the output projection, an MLP at what it adds to the stream, a layer at what its attention and its
MLP add. The modes: "zero"; "mean", over all positions of all samples of the dataset; "position_mean", over the samples
of the dataset at each position, which needs samples of one length; "resample", what another sample has at the same
position.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, WithJsonSchema, with_config
from typing_extensions import TypedDict

from attribution import checks
from attribution.ablation import Components, ablated
from attribution.arguments import DatasetId, Index, Positions, SampleId, SampleIds
from attribution.errors import InvalidArgument
from attribution.means import means_for
from attribution.operation import Steps, operation
from attribution.operations.devices import on_device
from attribution.rerun import Answer
from attribution.stored import StoredSample
from attribution.sweeps import Cell, cells_of, grid, shaped
from attribution.written import Written, average, check_positions, nothing, of_sample

if TYPE_CHECKING:
    from attribution.session import LocalSession

Mode = Literal["zero", "mean", "position_mean", "resample"]


@with_config(ConfigDict(extra="forbid"))
class Parts(TypedDict, total=False):
    """Components that are ablated together: heads as (layer, head), MLPs and layers by their layer; where."""

    heads: list[tuple[Index, Index]]
    mlps: list[Index]
    layers: list[Index]
    positions: Positions


PartsArg = Annotated[Parts, WithJsonSchema(TypeAdapter(Parts).json_schema())]
"""Its schema is written out where it stands, since the OpenAPI page follows no references."""


@operation()
def ablate(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    heads: list[tuple[Index, Index]] | None = None,
    mlps: list[Index] | None = None,
    mode: Mode = "zero",
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    layers: list[Index] | None = None,
    positions: Positions | None = None,
    source_id: SampleIds | None = None,
    source_dataset_id: DatasetId | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """What the answer's log-probability is when parts of the model write nothing, or something else.

    Args:
        heads: (layer, head) each.
        mlps: layers whose MLP is ablated.
        mode: "zero"; "mean" (over all positions of all samples); "position_mean" (over all samples, at each position);
            "resample": what the sample `source_id` has at the same position.
        labels: one token id per entry of `pos_ids`.
        candidate_ids: the softmax runs over these tokens; None is the whole vocabulary.
        pos_ids: the positions whose logits are scored: the answer at token p is predicted at p − 1.
        layers: layers of which attention and MLP are ablated.
        positions: the token positions at which they are; None is all.
        source_id: the sample that "resample" takes from; of several, the log-probabilities are averaged, one run each.
        source_dataset_id: the dataset that it is in, or that the mean is over; None is `dataset_id`.

    Returns:
        before and after: the summed log-probability of the labels (nats); before_per_position and after_per_position:
        `[len(pos_ids)]`. Both are of one batch.
    """
    sample = session.sample(dataset_id, sample_id)
    parts = Parts(heads=heads or [], mlps=mlps or [], layers=layers or [])
    sets = [_components(session, sample, parts, positions)]
    answer = Answer.of(session.model, sample.seq_len, labels, candidate_ids, pos_ids)
    draws = yield from _draws(session, sample, sets, mode, source_id, source_dataset_id)
    before, after = yield from ablated(session.model, sample, sets, draws, answer)
    return {
        "before": float(before.sum()),
        "after": float(after.sum()),
        "before_per_position": on_device(before, device),
        "after_per_position": on_device(after, device),
    }


@operation()
def ablate_sweep(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    sets: list[PartsArg] | None = None,
    mode: Mode = "zero",
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    over: Literal["heads", "mlps", "layers"] | None = None,
    per_position: bool = False,
    layers: Positions | None = None,
    positions: Positions | None = None,
    source_id: SampleIds | None = None,
    source_dataset_id: DatasetId | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """`ablate` for many sets of components of one sample, or over a grid of them, as rows of shared batches.

    Args:
        sets: each `{"heads": [(layer, head), …], "mlps": [layer, …], "layers": […], "positions": […]}`; all may be
            left out.
        over: in place of sets, every head, MLP or layer by itself.
        per_position: of a grid, every position by itself as well.
        layers: of a grid; None is all.
        positions: of a grid, or of those sets that name none; None is all.
        mode, labels, candidate_ids, pos_ids, source_id, source_dataset_id: as in `ablate`.

    Returns:
        axes: what the entries are, in order: `{"set": […]}`, or "layer", "head" and "position" where the grid has
        them; before: the summed log-probability of the labels (nats); after `[*axes]`; before_per_position
        `[len(pos_ids)]`; after_per_position `[*axes, len(pos_ids)]`. `sweep_table` and `sweep_map` show it.
    """
    sample = session.sample(dataset_id, sample_id)
    if sets is not None:
        axes, chosen = _listed(session, sample, sets, positions, over, per_position, layers)
    else:
        axes, chosen = _gridded(session, sample, over, per_position, layers, positions)
    answer = Answer.of(session.model, sample.seq_len, labels, candidate_ids, pos_ids)
    draws = yield from _draws(session, sample, chosen, mode, source_id, source_dataset_id)
    found = yield from ablated(session.model, sample, chosen, draws, answer)
    after = shaped(found[1:], axes)
    return {
        "axes": axes,
        "before": float(found[0].sum()),
        "after": on_device(after.sum(-1), device),
        "before_per_position": on_device(found[0], device),
        "after_per_position": on_device(after, device),
    }


def _listed(
    session: "LocalSession",
    sample: StoredSample,
    sets: list[Parts],
    positions: list[int] | None,
    over: str | None,
    per_position: bool,
    layers: list[int] | None,
) -> tuple[dict[str, list[int]], list[Components]]:
    if not sets:
        raise checks.mismatch("sets", "no entry", "at least one set of components")
    given = {"over": over, "per_position": per_position or None, "layers": layers}
    if wrong := next((name for name, value in given.items() if value is not None), None):
        raise InvalidArgument(f"{wrong} is of a grid, and sets lists what is ablated; give one of the two", param=wrong)
    chosen = [_components(session, sample, one, positions, f"sets.{at}.") for at, one in enumerate(sets)]
    return {"set": list(range(len(sets)))}, chosen


def _gridded(
    session: "LocalSession",
    sample: StoredSample,
    over: str | None,
    per_position: bool,
    layers: list[int] | None,
    positions: list[int] | None,
) -> tuple[dict[str, list[int]], list[Components]]:
    if over is None:
        raise InvalidArgument("sets or over is missing: what is ablated, a list of sets or a grid", param="over")
    at = None if positions is None else checks.positions("positions", positions, sample.seq_len)
    axes = grid(session.model, layers, at, sample.seq_len, heads=over == "heads", each=per_position)

    def components(cell: Cell) -> Components:
        if cell.head is not None:
            return Components(heads=((cell.layer, cell.head),), positions=cell.positions)
        if over == "mlps":
            return Components(mlps=(cell.layer,), positions=cell.positions)
        return Components(layers=(cell.layer,), positions=cell.positions)

    return axes, [components(cell) for cell in cells_of(axes, at)]


def _draws(
    session: "LocalSession",
    sample: StoredSample,
    sets: Sequence[Components],
    mode: str,
    source_id: int | str | list[int | str] | None,
    source_dataset_id: str | None,
) -> Steps[list[Callable[[], Written]]]:
    """What is put in place of what the sets write."""
    if source_id is not None and mode != "resample":
        raise InvalidArgument(f"source_id is of mode 'resample', and mode is {mode!r}", param="source_id")
    if mode == "resample":
        return _sources(session, sample, sets, source_id, source_dataset_id)
    attention = any(one.layers for one in sets)
    means = yield from means_for(session, sample, mode, source_dataset_id, attention=attention)
    return [partial(nothing, session.model) if means is None else partial(average, means)]


def _sources(
    session: "LocalSession",
    sample: StoredSample,
    sets: Sequence[Components],
    source_id: int | str | list[int | str] | None,
    source_dataset_id: str | None,
) -> list[Callable[[], Written]]:
    ids = source_id if isinstance(source_id, list) else [] if source_id is None else [source_id]
    if not ids:
        raise InvalidArgument(
            "mode 'resample' needs source_id: the sample, or samples, to take from", param="source_id"
        )
    sources = [session.sample(source_dataset_id or sample.dataset_id, one) for one in ids]
    for source in sources:
        for one in {one.positions for one in sets}:
            check_positions("positions", None if one is None else list(one), source, sample)
    return [partial(of_sample, session.model, source) for source in sources]


def _components(
    session: "LocalSession", sample: StoredSample, parts: Parts, positions: list[int] | None, where: str = ""
) -> Components:
    dims, name = session.model.dimensions, session.model.id
    heads = parts.get("heads", [])
    for layer, head in heads:
        checks.in_range(f"{where}heads", layer, dims.n_layers, f"the layers of {name}")
        checks.in_range(f"{where}heads", head, dims.n_heads, f"the heads of {name}")
    mlps, layers = parts.get("mlps", []), parts.get("layers", [])
    for which, found in (("mlps", mlps), ("layers", layers)):
        for layer in found:
            checks.in_range(f"{where}{which}", layer, dims.n_layers, f"the layers of {name}")
    own, at = parts.get("positions"), positions
    if own is not None:
        at = checks.positions(f"{where}positions", own, sample.seq_len)
    elif at is not None:
        at = checks.positions("positions", at, sample.seq_len)
    return Components(
        tuple(dict.fromkeys(heads)),
        tuple(dict.fromkeys(mlps)),
        tuple(dict.fromkeys(layers)),
        None if at is None else tuple(at),
    )
