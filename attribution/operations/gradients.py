"""Gradients of nodes. Formulas: `docs/attribution.md`.

Positions count from 0 in the sample's tokens. Log-probabilities are in nats, and an objective is to be increased.
Gradients are float32, or float64 when the model is.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId, TensorArg, TensorList
from attribution.errors import InvalidArgument, NotFinite
from attribution.gradients import NodeQuery, node_gradient, node_report
from attribution.integrate import Integrated, Rule
from attribution.means import means_for
from attribution.model.whole_gradient import whole_gradient
from attribution.operation import Progress, Steps, operation
from attribution.operations.devices import on_device
from attribution.patching import product_with
from attribution.rerun import Answer, log_probabilities
from attribution.store import StoredSample

if TYPE_CHECKING:
    from attribution.session import LocalSession

StepCount = Index | Literal["auto"] | None


@operation()
def compute_node_gradient(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId | None,
    node_type: str,
    layer: Index,
    head: Index | None = None,
    pos_ids: Positions | None = None,
    src_pos_ids: Positions | None = None,
    output_grad: TensorArg | None = None,
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    steps: StepCount = None,
    rule: Rule = "gauss_legendre",
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[Tensor]:
    """The integrated gradient of a node with respect to the residual stream that it reads.

    Args:
        sample_id: None is the mean over all samples of the dataset.
        node_type: lm_head, attn_q, attn_k, attn_v, attn_a, mlp_i or mlp_g.
        head: of an attention node; None gives all heads of the layer at about the price of one.
        pos_ids: where the node writes (`lm_head`: whose logits are scored); None is every position.
        src_pos_ids: the positions of the result for attn_k, attn_v and attn_a; None is `pos_ids`.
        output_grad: `[1, len(pos_ids), hidden]`, the gradient at the stream right after the node; for all but lm_head.
        labels: one token id per entry of `pos_ids`, for lm_head.
        candidate_ids: the softmax of lm_head runs over these tokens; None is the whole vocabulary.
        steps: interpolation points: None is 4, 0 the plain gradient, "auto" as many as the completeness error needs.
        rule: "gauss_legendre", or "uniform": the mean over steps + 1 points, the ends included.

    Returns:
        `[1, positions, hidden]`, not multiplied by the activation; `[heads, positions, hidden]` for all heads.
    """
    query = NodeQuery(node_type, layer, head, pos_ids, src_pos_ids, output_grad, labels, candidate_ids, steps, rule)
    samples = _samples(session, dataset_id, sample_id)
    total = torch.zeros(())
    for number, sample in enumerate(samples, start=1):
        gradient = node_gradient(session.model, sample, query).cpu() / len(samples)
        total = total + gradient
        yield Progress(number, len(samples))
    return on_device(total, device)


@operation()
def node_gradient_report(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId | None,
    node_type: str,
    layer: Index,
    head: Index | None = None,
    pos_ids: Positions | None = None,
    src_pos_ids: Positions | None = None,
    output_grad: TensorArg | None = None,
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    steps: StepCount = None,
    rule: Rule = "gauss_legendre",
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """`compute_node_gradient` with what tells how far to trust it; the same arguments.

    Returns:
        gradient: as from `compute_node_gradient`; objective and objective_at_zero: O(x) and O(0);
        completeness_error: |⟨gradient, x⟩ − (O(x) − O(0))| / |O(x) − O(0)| over all positions that the path has (for
        mlp_i and mlp_g that of their sum); steps: how many interpolation points were taken. The three numbers are
        lists, one entry per head, when all heads were asked for. Over a dataset the objectives are means, the error
        and the steps those of the worst sample.
    """
    query = NodeQuery(node_type, layer, head, pos_ids, src_pos_ids, output_grad, labels, candidate_ids, steps, rule)
    samples = _samples(session, dataset_id, sample_id)
    found = []
    for number, sample in enumerate(samples, start=1):
        found.append(node_report(session.model, sample, query))
        yield Progress(number, len(samples))
    return _report(found, device)


def _report(found: list[Integrated], device: str) -> dict[str, Any]:
    gradient = torch.stack([one.gradient.cpu() for one in found]).mean(0)
    numbers = {
        "objective": torch.stack([one.objective for one in found]).mean(0),
        "objective_at_zero": torch.stack([one.objective_at_zero for one in found]).mean(0),
        "completeness_error": torch.stack([one.completeness_error for one in found]).amax(0),
    }
    several = len(gradient) > 1
    return {
        "gradient": on_device(gradient, device),
        **{name: value.tolist() if several else float(value) for name, value in numbers.items()},
        "steps": max(one.steps for one in found),
    }


@operation()
def compute_node_gradient_batch(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_ids: list[SampleId],
    node_type: str,
    layer: Index,
    head: Index | None = None,
    pos_ids: Positions | None = None,
    src_pos_ids: Positions | None = None,
    output_grads: TensorList | None = None,
    labels: list[Positions] | None = None,
    candidate_ids: Positions | None = None,
    steps: StepCount = None,
    rule: Rule = "gauss_legendre",
    show_progress: bool = True,
    device: str = "cpu",
) -> Steps[Tensor]:
    """`compute_node_gradient` for several samples, with one `output_grad` (for lm_head: one list of labels) each.

    Returns:
        `[samples, 1, positions, hidden]`; `[samples, heads, positions, hidden]` for all heads.
    """
    for name, given in (("output_grads", output_grads), ("labels", labels)):
        if given is not None and len(given) != len(sample_ids):
            raise checks.mismatch(name, f"{len(given)} entries", f"{len(sample_ids)}, one per sample")
    if not sample_ids:
        raise InvalidArgument("sample_ids is empty; it names at least one sample", param="sample_ids")
    samples = [session.sample(dataset_id, one) for one in sample_ids]
    gradients = []
    for number, sample in enumerate(samples):
        grad = None if output_grads is None else output_grads[number]
        label = None if labels is None else labels[number]
        query = NodeQuery(
            node_type, layer, head, pos_ids, src_pos_ids, grad, label, candidate_ids, steps, rule, "output_grads"
        )
        gradients.append(node_gradient(session.model, sample, query).cpu())
        yield Progress(number + 1, len(samples))
    if len({gradient.shape for gradient in gradients}) > 1:
        raise checks.mismatch("pos_ids", "None for samples of different lengths", "positions that all of them have")
    return on_device(torch.stack(gradients), device)


def _samples(session: "LocalSession", dataset_id: str, sample_id: int | str | None) -> list[StoredSample]:
    """The sample, or all of the dataset."""
    ids = session.sample_ids(dataset_id) if sample_id is None else [sample_id]
    return [session.sample(dataset_id, one) for one in ids]


@operation()
def gradient_x_activation(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    mode: Literal["zero", "mean", "position_mean"] = "zero",
    source_dataset_id: DatasetId | None = None,
    absolute: bool = False,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[Tensor]:
    """Attribution patching: the linear estimate of what `ablate` would take away, for every head and MLP at once.

    Σ_p ⟨∂O/∂z[p], z[p] − z̄[p]⟩ with O the labels' summed log-probability, its gradient through the whole model as it
    is, norms included, and z̄ what `ablate` puts in place. The estimate that others are to be better than.

    Args:
        labels, candidate_ids, pos_ids: as in `ablate`.
        mode, source_dataset_id: "zero", "mean" or "position_mean", and the dataset of the mean, as in `ablate`.
        absolute: sum the absolute values of the positions, so that what pushes up in one place and down in another
            counts twice; this finds heads that matter, where the plain sum finds those that push in sum.

    Returns:
        `[layers, heads + 1]`, the MLP in the last column; nats.
    """
    model, sample = session.model, session.sample(dataset_id, sample_id)
    answer = Answer.of(model, sample.seq_len, labels, candidate_ids, pos_ids)
    means = yield from means_for(session, sample, mode, source_dataset_id)
    passed, grads = whole_gradient(
        model, sample.token_ids, answer.positions, lambda logits: log_probabilities(logits[None], answer).sum()
    )
    scores = product_with(passed, grads, means, model.work_dtype, absolute=absolute)
    if not scores.isfinite().all():
        raise NotFinite(
            f"the gradient or an activation of this sample is NaN or inf in {model.dtype}; load the model in a dtype "
            "of greater range"
        )
    return on_device(scores, device)
