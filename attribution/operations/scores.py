"""Scores: residual and attention attribution, ablation. Formulas: `docs/attribution.md`.

Positions count from 0 in the sample's tokens. Log-probabilities are in nats, and an objective is to be increased.
Scores are float32, or float64 when the model is.
"""

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from attribution import ablation, checks
from attribution.arguments import DatasetId, Index, Positions, SampleId, TensorList
from attribution.operation import Steps, operation
from attribution.operations.devices import on_device
from attribution.residual import Downstream, attention_attribution, residual_attribution, residual_terms, stack_grads

if TYPE_CHECKING:
    from attribution.session import LocalSession


@operation()
def attribute_residual(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    pos_ids: Positions,
    downstream_grads: TensorList,
    downstream_layers: list[float],
    from_layer: Index = 0,
    to_layer: Index | None = None,
    per_position: bool = False,
    device: str = "cpu",
) -> Tensor:
    """What each head and each MLP wrote, times how much it matters downstream: ⟨W_O^h z, G⟩ summed over positions.

    Args:
        pos_ids: the positions of the gradients.
        downstream_grads: one `[1, len(pos_ids), hidden]` per downstream node, as `compute_node_gradient` gives them.
        downstream_layers: the depth of each node: ℓ for attention, ℓ + 0.5 for an MLP, the number of layers for
            lm_head. Only what is strictly upstream counts.
        from_layer, to_layer: the layers to attribute to, both inclusive; entries outside are 0.
        per_position: keep the position axis.

    Returns:
        `[layers, heads + 1, nodes]`, the MLP in the last column of axis 1; `[layers, heads + 1, nodes, positions]`
        per position. `attribute_residual_terms` has what closes the sum.
    """
    sample = session.sample(dataset_id, sample_id)
    downstream = Downstream.of(
        session.model, sample, pos_ids, downstream_grads, downstream_layers, from_layer, to_layer
    )
    scores = residual_attribution(session.model, sample, downstream)
    return on_device(scores if per_position else scores.sum(-1), device)


@operation()
def attribute_residual_terms(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    pos_ids: Positions,
    downstream_grads: TensorList,
    downstream_layers: list[float],
    from_layer: Index = 0,
    to_layer: Index | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """What closes the sum of `attribute_residual`: embedding + Σ attribution + Σ attn_bias = total.

    Returns:
        embedding `[nodes]`: ⟨the stream entering `from_layer`, G⟩, for 0 the embedding; attn_bias `[layers, nodes]`:
        ⟨bias of the output projection, G⟩ (the MLP's bias is in its column); total `[nodes]`: ⟨the stream at the
        node's depth, G⟩.
    """
    sample = session.sample(dataset_id, sample_id)
    downstream = Downstream.of(
        session.model, sample, pos_ids, downstream_grads, downstream_layers, from_layer, to_layer
    )
    terms = residual_terms(session.model, sample, downstream)
    return {name: on_device(value, device) for name, value in vars(terms).items()}


@operation()
def attribute_attn_weights(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    layer: Index,
    head: Index,
    downstream_grads: TensorList,
    pos_ids: Positions,
    signed: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A head's pattern, and how much each of its edges matters downstream.

    Args:
        downstream_grads: one `[1, len(pos_ids), hidden]` per downstream node.
        pos_ids: the queries.
        signed: sum ⟨G_i, W_O^h v_j⟩ over the nodes as it is, not its absolute value.

    Returns:
        `(aw, aa)`, each `[query, key]` over all keys of the sample: the pattern A, and A · Σ_g |⟨G_i, W_O^h v_j⟩|.
    """
    model, sample = session.model, session.sample(dataset_id, sample_id)
    checks.in_range("layer", layer, model.dimensions.n_layers, f"the layers of {model.id}")
    checks.in_range("head", head, model.dimensions.n_heads, f"the heads of {model.id}")
    positions = checks.positions("pos_ids", pos_ids, sample.seq_len)
    grads = stack_grads(model, downstream_grads, len(positions))
    aw, aa = attention_attribution(model, sample, layer, head, positions, grads, signed=signed)
    return on_device(aw, device), on_device(aa, device)


@operation()
def ablate(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    heads: list[tuple[Index, Index]] | None = None,
    mlps: list[Index] | None = None,
    mode: Literal["zero", "mean"] = "zero",
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """What the answer's log-probability is when heads and MLPs write nothing, or their mean over the dataset.

    Args:
        heads: (layer, head) each, set at all positions; before the output projection.
        mlps: layers.
        mode: "zero", or "mean": over all positions of all samples of the dataset.
        labels: one token id per entry of `pos_ids`.
        candidate_ids: the softmax runs over these tokens; None is the whole vocabulary.
        pos_ids: the positions whose logits are scored: the answer at token p is predicted at p − 1.

    Returns:
        before and after: the summed log-probability of the labels (nats); before_per_position and after_per_position:
        `[len(pos_ids)]`. Both are of one batch.
    """
    model, sample = session.model, session.sample(dataset_id, sample_id)
    components = _components(session, heads or [], mlps or [])
    positions = checks.positions("pos_ids", pos_ids, sample.seq_len)
    chosen = checks.answer(model.dimensions.d_vocab, labels, candidate_ids, len(positions))
    if mode == "zero":
        replacements = ablation.zeros(model, components)
    else:
        ids = session.sample_ids(dataset_id)
        samples = (session.sample(dataset_id, one) for one in ids)
        replacements = yield from ablation.means(samples, len(ids), components)
    found = ablation.ablated(model, sample, replacements, positions, chosen, candidate_ids)
    return {
        "before": float(found.before.sum()),
        "after": float(found.after.sum()),
        "before_per_position": on_device(found.before, device),
        "after_per_position": on_device(found.after, device),
    }


def _components(session: "LocalSession", heads: list[tuple[int, int]], mlps: list[int]) -> ablation.Components:
    model = session.model
    for layer, head in heads:
        checks.in_range("heads", layer, model.dimensions.n_layers, f"the layers of {model.id}")
        checks.in_range("heads", head, model.dimensions.n_heads, f"the heads of {model.id}")
    for layer in mlps:
        checks.in_range("mlps", layer, model.dimensions.n_layers, f"the layers of {model.id}")
    return ablation.Components(tuple(dict.fromkeys(heads)), tuple(dict.fromkeys(mlps)))
