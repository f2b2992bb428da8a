"""Scores: residual and attention attribution. Formulas: `docs/attribution.md`.

Positions count from 0 in the sample's tokens. Scores are float32, or float64 when the model is.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from attribution import checks
from attribution.arguments import DatasetId, Index, Positions, SampleId, TensorList
from attribution.operation import operation
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
