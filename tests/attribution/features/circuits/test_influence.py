"""Influence, pruning and scores: by hand on a small graph, and against powers of the whole matrix on random ones."""

import dataclasses

import pytest
import torch
from torch import Tensor

from attribution.features.circuits.influence import Effects, influence, prune, row_sums, scores
from attribution.features.circuits.live_check import total_effects

# columns: features a (layer 0), b (layer 1), c (layer 1), error e, token t; rows: logits x (0.75) and y (0.25), a, b, c
#   x ← 3 b, −1 t          shares  b 0.75, t 0.25
#   y ← 2 a, 2 c           shares  a 0.5, c 0.5
#   a ← 1 t                shares  t 1
#   b ← 4 a, −4 e          shares  a 0.5, e 0.5
#   c ← 1 a, 3 t           shares  a 0.25, t 0.75
# influence of b 0.75·0.75 = 0.5625; of c 0.25·0.5 = 0.125; of a 0.25·0.5 + 0.5625·0.5 + 0.125·0.25 = 0.4375;
# of e 0.5625·0.5 = 0.28125; of t 0.75·0.25 + 0.4375·1 + 0.125·0.75 = 0.71875; together 2.125
WEIGHTS = torch.tensor(
    [[0, 3, 0, 0, -1], [2, 0, 2, 0, 0], [0, 0, 0, 0, 1], [4, 0, 0, -4, 0], [1, 0, 0, 0, 3]], dtype=torch.float64
)
SMALL = Effects(WEIGHTS, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), 3, 1, torch.tensor([0.75, 0.25]).double())


def test_influence_is_the_sum_over_paths_of_the_products_of_shares():
    assert influence(SMALL).tolist() == pytest.approx([0.4375, 0.5625, 0.125, 0.28125, 0.71875])


def test_rows_in_another_order_give_the_same_influence():
    order = torch.tensor([2, 0, 1])
    mixed = Effects(WEIGHTS[[0, 1, 4, 2, 3]], order, torch.tensor([1, 0, 1]), 3, 1, SMALL.logit_weights)
    assert influence(mixed).tolist() == pytest.approx(influence(SMALL).tolist())


def test_the_scores_are_those_of_the_definitions():
    # replacement: t / (t + e) = 0.71875 / 1 = 0.71875
    # completeness: only b has an error among its sources, half of what reaches it; its influence is 0.5625 of
    # 2.125 (all nodes) + 1 (the logits): 1 − 0.5 · 0.5625 / 3.125
    found = scores(SMALL)
    assert found.replacement == pytest.approx(0.71875)
    assert found.completeness == pytest.approx(1 - 0.28125 / 3.125)


def test_nodes_are_kept_until_they_hold_the_share_and_ends_that_lead_nowhere_go():
    # in order t 0.71875, b 0.5625, a 0.4375, e 0.28125, c 0.125; sum 2.125; cumulative 0.338, 0.603, 0.809, 0.941, 1
    kept = prune(SMALL, 0.8, 1.0)
    assert kept.sources.tolist() == [True, True, False, False, True]
    assert kept.cumulative.tolist() == pytest.approx(
        [1.71875 / 2.125, 1.28125 / 2.125, 1.0, 2 / 2.125, 0.71875 / 2.125]
    )
    assert sorted(kept.edges.tolist()) == [[0, 1], [0, 4], [1, 0], [2, 4], [3, 0]]
    # only b and t: b has no source left but the error, which is gone, so b goes as well, and x keeps its token alone
    fewer = prune(SMALL, 0.6, 1.0)
    assert fewer.sources.tolist() == [False, False, False, False, True]
    assert fewer.edges.tolist() == [[0, 4]]


def test_edges_are_kept_until_they_hold_the_share():
    # all nodes; scores, share of the source times influence of the target: x←b 0.5625, a←t 0.4375, b←a and b←e 0.28125,
    # x←t 0.1875, y←a and y←c 0.125, c←t 0.09375, c←a 0.03125; sum 2.125, cumulative after a←t 0.47, after b's 0.735
    kept = prune(SMALL, 1.0, 0.7)
    assert sorted(kept.edges.tolist()) == [[0, 1], [2, 4], [3, 0], [3, 3]]
    assert kept.sources.tolist() == [True, True, False, True, True]


def test_a_threshold_of_1_keeps_whatever_reaches_a_logit_and_of_0_the_strongest_edge_unless_nothing_leads_to_it():
    assert prune(SMALL, 1.0, 1.0).sources.all()
    assert len(prune(SMALL, 1.0, 1.0).edges) == int((WEIGHTS != 0).sum())
    assert not len(prune(SMALL, 1.0, 0.0).edges)  # x ← b, and b has no edge left that leads to it
    tiny = WEIGHTS.clone()
    tiny[4, 0] = 1e-20  # which beside the others is lost in a sum
    small = dataclasses.replace(SMALL, weights=tiny)
    assert len(prune(small, 1.0, 1.0).edges) == int((WEIGHTS != 0).sum())


def random_graph(seed: int) -> tuple[Effects, Tensor]:
    """A random graph of 4 layers, and its square matrix with logits last: features, errors, tokens, logits."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.arange(4).repeat_interleave(5)
    weights = torch.randn(23, 31, generator=generator, dtype=torch.float64)
    for row, layer in enumerate(layers, start=3):
        weights[row, : len(layers)] *= layers < layer
        weights[row, 20:28] *= torch.arange(4).repeat_interleave(2) < layer
    probabilities = torch.tensor([0.6, 0.3, 0.1]).double()
    square = torch.zeros(34, 34, dtype=torch.float64)
    square[:20, :31], square[31:, :31] = weights[3:], weights[:3]
    return Effects(weights, torch.arange(20), layers, 20, 3, probabilities), square


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_gives_the_powers_of_the_matrix_of_shares(seed: int):
    effects, square = random_graph(seed)
    shares = square.abs() / square.abs().sum(1, keepdim=True).clamp(min=1e-10)
    start = torch.zeros(34, dtype=torch.float64)
    start[31:] = effects.logit_weights
    expected = start @ (torch.linalg.inv(torch.eye(34).double() - shares) - torch.eye(34).double())
    assert torch.allclose(influence(effects), expected[:31])
    whole = expected + start
    errors = expected[20:28].sum()
    assert scores(effects).replacement == pytest.approx(float(expected[28:31].sum() / (expected[28:31].sum() + errors)))
    completeness = float(((1 - shares[:, 20:28].sum(1)) * whole).sum() / whole.sum())
    assert scores(effects).completeness == pytest.approx(completeness)


def test_large_matrices_are_read_in_parts(monkeypatch: pytest.MonkeyPatch):
    effects, _ = random_graph(5)
    whole, sums = influence(effects), row_sums(effects.weights)
    monkeypatch.setattr("attribution.features.circuits.influence._AT_ONCE", 40)
    assert torch.allclose(influence(effects), whole)
    assert torch.allclose(row_sums(effects.weights), sums)


def test_pruning_leaves_no_feature_without_a_way_in_and_out_and_no_error_without_a_way_out():
    for seed in range(5):
        effects, _ = random_graph(seed)
        kept = prune(effects, 0.5, 0.6)
        targets, sources = set(kept.edges[:, 0].tolist()), set(kept.edges[:, 1].tolist())
        for column in kept.sources[:20].nonzero()[:, 0].tolist():
            assert column in sources
            assert column + 3 in targets
        for column in (kept.sources[20:28].nonzero()[:, 0] + 20).tolist():
            assert column in sources
        assert all(kept.sources[column] for column in sources)
        assert all(row < 3 or kept.sources[row - 3] for row in targets)
        assert 0 < len(kept.edges) < int((effects.weights != 0).sum())


def test_the_total_effect_of_a_source_is_that_of_all_its_paths():
    # on x, activations a 2, b 5: b 3; of a 3/5 of its 4, 2.4; of e −2.4; of t −1 directly and 2.4/2 · 1 through a
    found = total_effects(SMALL, torch.tensor([2.0, 5.0, 1.0]).double(), 0)
    assert found.tolist() == pytest.approx([2.4, 3.0, 0.0, -2.4, 0.2])
