"""What interventions put in the place of activations: two-dimensional rows, with the arithmetic beside them."""

import pytest
import torch
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.interventions.functions import (
    Normalise,
    adding,
    clamping,
    projecting_out,
    replacing,
    scaling,
    zeroing,
)

ROWS = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # of norm 5 and 2
UP = torch.tensor([[0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        (None, [[3.0, 10.0], [0.0, 8.0]]),  # + 3 · (0, 2)
        ("relative", [[3.0, 19.0], [0.0, 8.0]]),  # + 3 · 5 · (0, 1); + 3 · 2 · (0, 1)
        ("preserve", [[15 / 109**0.5, 50 / 109**0.5], [0.0, 2.0]]),  # (3, 10) has the norm √109, and gets 5
        ("both", [[15 / 370**0.5, 95 / 370**0.5], [0.0, 2.0]]),  # (3, 19) has the norm √370, and gets 5
    ],
)
def test_a_vector_is_added(normalise: Normalise | None, expected: list[list[float]]):
    found = adding(UP, 3.0, normalise)(ROWS)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([x for row in expected for x in row], rel=1e-6)


def test_a_direction_is_projected_out():
    assert projecting_out(UP)(ROWS).tolist() == [[3, 0], [0, 0]]
    slanted = projecting_out(torch.tensor([[1.0, 1.0]]))(ROWS)  # (3, 4) − 3.5 · (1, 1)
    assert slanted.flatten().tolist() == pytest.approx([-0.5, 0.5, -1, 1])


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e200, 1e-200])
def test_the_length_of_a_direction_counts_for_nothing_where_it_only_points(size: float):
    direction = torch.tensor([[0.0, size]], dtype=torch.float64)
    assert projecting_out(direction)(ROWS).tolist() == [[3, 0], [0, 0]]
    assert adding(direction, 3.0, "relative")(ROWS).tolist() == [[3, 19], [0, 8]]


def test_rows_are_scaled_zeroed_and_replaced():
    assert scaling(-0.5)(ROWS).tolist() == [[-1.5, -2], [0, -1]]
    assert zeroing()(ROWS).tolist() == [[0, 0], [0, 0]]
    assert replacing(UP)(ROWS).tolist() == [[0, 2], [0, 2]]


HEADS = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])  # [column, head, d_head]


def test_one_direction_stands_for_each_head_and_several_are_one_for_each():
    assert replacing(UP)(HEADS).tolist() == [[[0, 2], [0, 2]]]
    each = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert projecting_out(each)(HEADS).tolist() == [[[0, 4], [1, 0]]]


def test_a_direction_of_the_whole_width_takes_the_heads_as_one():
    whole = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    found = projecting_out(whole)(HEADS)  # ⟨x, v⟩ / ‖v‖² = (3 + 1) / 2
    assert found.shape == HEADS.shape
    assert found.flatten().tolist() == pytest.approx([1, 4, -1, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_activations_stays_and_the_sum_is_rounded_once(dtype: torch.dtype):
    rows = (torch.arange(8.0).view(4, 2) / 7).to(dtype)
    direction = torch.tensor([[0.1, 1 / 3]], dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = adding(direction, 0.7)(rows)
    assert found.dtype == dtype
    assert torch.equal(found, (rows.to(wide) + 0.7 * direction.to(wide)).to(dtype))


def test_a_row_of_nothing_stays_nothing_where_norms_are_kept():
    nothing = torch.zeros(1, 2)
    for function in (adding(UP, 0.0, "preserve"), adding(UP, 3.0, "both")):
        assert function(nothing).tolist() == [[0, 0]]


def test_what_was_there_is_not_overwritten():
    rows: Tensor = ROWS.clone()
    for function in (adding(UP, 1.0), scaling(2.0), zeroing(), replacing(UP), projecting_out(UP)):
        function(rows)
    assert torch.equal(rows, ROWS)


def test_what_is_added_may_depend_on_the_row():
    def scale_of(x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True) / 5  # 1 and 0.4

    found = adding(UP, 3.0, scale_of=scale_of)(ROWS)
    assert found.flatten().tolist() == pytest.approx([3, 10, 0, 4.4])  # + 3 · (0, 2), + 3 · 0.4 · (0, 2)
    relative = adding(UP, 3.0, "relative", scale_of)(ROWS)  # where the scale is of no account
    assert torch.equal(relative, adding(UP, 3.0, "relative")(ROWS))
    assert torch.equal(adding(UP, 3.0, scale_of=lambda x: None)(ROWS), adding(UP, 3.0)(ROWS))


WRITES_UP = {
    "W_enc": torch.tensor([[1.0, 9.0], [0.0, 9.0]]),
    "b_enc": torch.tensor([-1.0, 9.0]),
    "W_dec": torch.tensor([[0.0, 2.0], [9.0, 9.0]]),
    "b_dec": torch.tensor([9.0, 9.0]),
}
"""Feature 0 is relu(x₀ − 1), and writes (0, 2)."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_is_clamped_and_all_else_stays(dtype: torch.dtype):
    told: list[Tensor] = []
    clamp = clamping(Autoencoder("relu", **WRITES_UP), 0, 5.0, lambda x: x, told.append)
    found = clamp(ROWS.to(dtype))
    assert found.dtype == dtype
    assert found.tolist() == [[3, 10], [0, 12]]  # (3, 4) + (5 − 2) · (0, 2); (0, 2) + (5 − 0) · (0, 2)
    assert [one.tolist() for one in told] == [[2, 0]]


def test_a_feature_may_be_read_elsewhere_than_it_is_changed():
    clamp = clamping(Autoencoder("relu", **WRITES_UP), 0, 5.0, lambda x: 2 * x, lambda _: None)
    read = torch.tensor([[2.0, 7.0], [1.0, 7.0]])  # doubled: 4 and 2, activations 3 and 1
    assert clamp(ROWS, read).tolist() == [[3, 8], [0, 10]]


def test_among_the_largest_a_feature_is_clamped_from_what_is_left_of_it():
    one = Autoencoder("topk", k=1, **WRITES_UP)  # feature 1 is always larger: feature 0 is never on
    assert clamping(one, 0, 5.0, lambda x: x, lambda _: None)(ROWS).tolist() == [[3, 14], [0, 12]]


def test_heads_are_clamped_as_one_row():
    clamp = clamping(Autoencoder("relu", **WRITES_UP), 0, 5.0, lambda x: x.flatten(-2), lambda _: None)
    assert clamp(ROWS.view(2, 2, 1)).tolist() == [[[3], [10]], [[0], [12]]]
