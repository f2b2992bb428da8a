"""Divergences, by hand and in exact arithmetic."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from attribution.divergence import Changed, kl_divergence, logit_difference, top_changed

getcontext().prec = 60


def exact_kl(baseline: list[float], other: list[float]) -> float:
    """Σ p ln(p/q) in sixty digits."""
    p, q = ([Decimal(value).exp() for value in logits] for logits in (baseline, other))
    p, q = ([one / sum(values) for one in values] for values in (p, q))
    return float(sum((a * (a / b).ln() for a, b in zip(p, q, strict=True) if min(a, b) > Decimal("1e-10")), Decimal()))


def test_two_coins_are_as_far_apart_as_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): ½ ln(2/3) + ½ ln 2 = ½ ln(4/3)
    found = kl_divergence(torch.zeros(2), torch.tensor([math.log(3.0), 0.0]))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-7)  # ln 3 was rounded to float32


def test_a_divergence_of_1e_5_has_its_digits_over_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    baseline = 3 * torch.randn(5000, generator=generator)
    other = baseline + 4.5e-3 * torch.randn(5000, generator=generator)
    exact = exact_kl(baseline.tolist(), other.tolist())
    assert 3e-6 < exact < 3e-5
    assert float(kl_divergence(baseline, other)) == pytest.approx(exact, rel=1e-9)
    p, q = baseline.softmax(-1), other.softmax(-1)
    assert float((p * (p / q).log()).sum()) != pytest.approx(exact, rel=1e-3), "float32 would not have shown it"


def test_entries_that_either_side_nearly_rules_out_are_left_out():
    # the third token: p = 1e-12, q = 1/3 of the rest; without it p = (½, ½), q = (⅓, ⅓)
    baseline, other = torch.tensor([0.0, 0.0, -27.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    kept = 1 / (2 + math.exp(-27))
    assert float(kl_divergence(baseline, other)) == pytest.approx(2 * kept * math.log(kept * 3), rel=1e-12)
    assert float(kl_divergence(other, baseline)) == pytest.approx(2 / 3 * math.log(1 / 3 / kept), rel=1e-12)


def test_a_token_that_is_ruled_out_altogether_does_no_harm():
    logits = torch.tensor([1.0, 2.0, -math.inf])
    assert float(kl_divergence(logits, logits)) == 0.0


def test_every_row_is_its_own_and_one_with_nan_says_so():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    other = logits.roll(1, dims=-1)
    other[1, 2, 4] = math.nan
    found = kl_divergence(logits, other)
    assert found.shape == (2, 3)
    assert found[1, 2].isnan()
    assert found.isnan().sum() == 1
    assert torch.equal(found[0, 1], kl_divergence(logits[0, 1], other[0, 1]))


def test_logit_differences_are_baseline_minus_other_in_float64():
    baseline, other = torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[0.5, 7.0, 2.0]])
    found = logit_difference(baseline, other, [2, 0, 1])
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.0, 0.5, -2.0]]


def test_the_tokens_that_changed_most_come_first_with_both_probabilities():
    # p = (1/4, 1/4, 1/2, 0), q = (5/8, 1/4, 1/8, 0): tokens 0 and 2 change by 3/8, the others not
    p, q = ([0.25, 0.25, 0.5], [0.625, 0.25, 0.125])
    baseline, other = ([*(math.log(one) for one in of), -math.inf] for of in (p, q))
    found = top_changed(torch.tensor(baseline, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), 3)
    assert [one.token_id for one in found] == [0, 2, 1]
    assert [one.rank for one in found] == [1, 2, 3]
    for one in found:
        assert (one.baseline_prob, one.ablated_prob) == pytest.approx((p[one.token_id], q[one.token_id]), abs=1e-15)
        assert one.abs_diff == abs(one.baseline_prob - one.ablated_prob)


def test_more_tokens_than_there_are_is_all_of_them():
    logits = torch.zeros(3)
    assert top_changed(logits, logits, 9) == [Changed(rank, rank - 1, 1 / 3, 1 / 3, 0.0) for rank in (1, 2, 3)]
