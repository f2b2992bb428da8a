"""Ablation: what the answer's log-probability is without heads and MLPs. Formulas: `docs/attribution.md`.

A component is set at all positions: a head before the output projection, an MLP at what it adds to the stream. The
modes: "zero"; "mean", over all positions of all samples of the dataset; "position_mean", over the samples of the
dataset at each position, which needs samples of one length.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from attribution import ablation, checks
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.operation import Steps, operation
from attribution.operations.devices import on_device
from attribution.stored import StoredSample

if TYPE_CHECKING:
    from attribution.session import LocalSession

Mode = Literal["zero", "mean", "position_mean"]


@with_config(ConfigDict(extra="forbid"))
class Parts(TypedDict, total=False):
    """Components that are ablated together: heads as (layer, head), MLPs by their layer."""

    heads: list[tuple[Index, Index]]
    mlps: list[Index]


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
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """What the answer's log-probability is when heads and MLPs write nothing, or a mean over the dataset.

    Args:
        heads: (layer, head) each.
        mlps: layers.
        mode: "zero", "mean" (over all positions of all samples), or "position_mean" (over all samples, at each
            position).
        labels: one token id per entry of `pos_ids`.
        candidate_ids: the softmax runs over these tokens; None is the whole vocabulary.
        pos_ids: the positions whose logits are scored: the answer at token p is predicted at p − 1.

    Returns:
        before and after: the summed log-probability of the labels (nats); before_per_position and after_per_position:
        `[len(pos_ids)]`. Both are of one batch.
    """
    sample = session.sample(dataset_id, sample_id)
    sets = [_components(session, {"heads": heads or [], "mlps": mlps or []}, "")]
    answer = _answer(session, sample, labels, candidate_ids, pos_ids)
    means = yield from _means(session, dataset_id, mode)
    before, after = yield from ablation.ablated(session.model, sample, sets, means, answer)
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
    sets: list[Parts],
    mode: Mode = "zero",
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """`ablate` for many sets of components of one sample, as rows of shared batches.

    Args:
        sets: each `{"heads": [(layer, head), …], "mlps": [layer, …]}`; either may be left out.
        mode, labels, candidate_ids, pos_ids: as in `ablate`.

    Returns:
        before: the summed log-probability of the labels (nats); after `[sets]`; before_per_position
        `[len(pos_ids)]`; after_per_position `[sets, len(pos_ids)]`.
    """
    sample = session.sample(dataset_id, sample_id)
    if not sets:
        raise checks.mismatch("sets", "no entry", "at least one set of components")
    chosen = [_components(session, one, f"sets.{number}.") for number, one in enumerate(sets)]
    answer = _answer(session, sample, labels, candidate_ids, pos_ids)
    means = yield from _means(session, dataset_id, mode)
    found = yield from ablation.ablated(session.model, sample, chosen, means, answer)
    return {
        "before": float(found[0].sum()),
        "after": on_device(found[1:].sum(-1), device),
        "before_per_position": on_device(found[0], device),
        "after_per_position": on_device(found[1:], device),
    }


def _means(session: "LocalSession", dataset_id: str, mode: str) -> Steps[Any]:
    if mode == "zero":
        return None
    return (yield from session.means.get(session, dataset_id, per_position=mode == "position_mean"))


def _answer(
    session: "LocalSession",
    sample: StoredSample,
    labels: list[int] | None,
    candidate_ids: list[int] | None,
    pos_ids: list[int] | None,
) -> ablation.Answer:
    positions = checks.positions("pos_ids", pos_ids, sample.seq_len)
    chosen = checks.answer(session.model.dimensions.d_vocab, labels, candidate_ids, len(positions))
    return ablation.Answer(positions, chosen, candidate_ids)


def _components(session: "LocalSession", parts: Parts, where: str) -> ablation.Components:
    model = session.model
    heads, mlps = parts.get("heads", []), parts.get("mlps", [])
    for layer, head in heads:
        checks.in_range(f"{where}heads", layer, model.dimensions.n_layers, f"the layers of {model.id}")
        checks.in_range(f"{where}heads", head, model.dimensions.n_heads, f"the heads of {model.id}")
    for layer in mlps:
        checks.in_range(f"{where}mlps", layer, model.dimensions.n_layers, f"the layers of {model.id}")
    return ablation.Components(tuple(dict.fromkeys(heads)), tuple(dict.fromkeys(mlps)))
