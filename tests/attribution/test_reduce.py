"""Means over results, greatest entries, products by named axes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribution.errors import InvalidArgument, NotFound, OutOfRange, ShapeMismatch
from attribution.reduce import einsum, mr, topk_md


@dataclass
class One:
    index: int


SAMPLES = [One(3), One(4), One(8)]


def test_the_mean_over_results_is_a_plain_mean() -> None:
    # (3 + 4 + 8) / 3 = 5, and (9 + 16 + 64) / 3 = 89 / 3
    found = mr(lambda r, model, power: torch.tensor([r.index, r.index**power]) * model)(SAMPLES, 10.0, power=2)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([50.0, 890 / 3])


def test_containers_are_reduced_part_by_part() -> None:
    def parts(r: One, model: Any) -> Any:
        row = torch.tensor([r.index, 0.0])
        return row, {"score": r.index, "more": [row.double(), row.bfloat16()]}, row.numpy()

    mean, rest, array = mr(parts)(SAMPLES, None)
    assert mean.tolist() == [5.0, 0.0]
    assert rest["score"] == 5.0
    assert [one.dtype for one in rest["more"]] == [torch.float64, torch.float32]
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [5.0, 0.0]


def test_the_mean_does_not_keep_the_results() -> None:
    alive: list[Any] = []
    most = []

    def big(r: One, model: Any) -> Tensor:
        import weakref

        made = torch.full((4,), float(r.index))
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return made

    mr(big)([One(index) for index in range(9)], None)
    assert max(most) <= 2


def test_small_things_are_not_lost_in_a_long_sum() -> None:
    # in float32, 2**24 + 1 is 2**24
    found = mr(lambda r, model: torch.tensor([2.0**24 if r.index == 0 else 1.0]))([One(i) for i in range(1025)], None)
    assert found.item() == pytest.approx((2**24 + 1024) / 1025, rel=1e-7)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="results is empty"):
        mr(lambda r, model: 1)([], None)


def test_a_failing_sample_names_itself() -> None:
    def fails(r: One, model: Any) -> Tensor:
        if r.index == 4:
            raise model
        return torch.zeros(1)

    with pytest.raises(NotFound, match=r"^sample 4: gone$") as caught:
        mr(fails)(SAMPLES, NotFound("gone", param="sample_id"))
    assert (caught.value.message, caught.value.param) == ("sample 4: gone", "sample_id")
    with pytest.raises(ZeroDivisionError) as other:
        mr(fails)(SAMPLES, ZeroDivisionError("by zero"))
    assert other.value.__notes__ == ["in fails of sample 4"]


def test_results_of_different_shapes_have_no_mean() -> None:
    for fn in (lambda r, model: torch.zeros(1, r.index), lambda r, model: [1] * r.index):
        with pytest.raises(ShapeMismatch, match=r"^sample 4: the result is"):
            mr(fn)(SAMPLES, None)


ATTR = torch.tensor([[[0.5], [-9.0], [3.0]], [[2.0], [0.0], [1.0]]])


def test_the_greatest_entries_come_first_with_their_indices() -> None:
    indices, values = topk_md(ATTR, 3)
    assert values.tolist() == [3.0, 2.0, 1.0]
    assert [axis.tolist() for axis in indices] == [[0, 1, 1], [2, 0, 2]]
    assert torch.equal(ATTR[..., 0][indices], values)
    assert topk_md(ATTR, k=2, transpose=True) == [(0, 2, 3.0), (1, 0, 2.0)]
    assert len(topk_md(ATTR, transpose=True)) == 6  # k=30 is more than there are
    assert topk_md(ATTR.repeat(1, 1, 2), 1, transpose=True)[0][:2] == (0, 2)
    assert len(topk_md(ATTR.repeat(1, 1, 2), 1, transpose=True)[0]) == 4
    assert topk_md(torch.tensor([4.0]), transpose=True) == [(0, 4.0)]


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(OutOfRange, match="k is 0"):
        topk_md(ATTR, 0)
    for attr in (torch.tensor([1.0, float("nan")]), torch.zeros(0, 3)):
        with pytest.raises(InvalidArgument, match="no entries, or NaN"):
            topk_md(attr)


def test_axes_have_names() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, generator=generator), torch.randn(4, 5, generator=generator)
    found = einsum("sample head pos, pos hidden -> sample head hidden", a, b)
    assert torch.allclose(found, a @ b)
    assert torch.allclose(einsum("sample head pos -> pos sample", a), a.sum(1).T)
    assert torch.allclose(einsum("sample head pos ->", a), a.sum())
    assert torch.allclose(einsum("pos hidden, ... pos -> ... hidden", b, a), a @ b)
    # names that begin alike are different axes
    assert einsum("key_1, key_2 -> key_1 key_2", torch.ones(2), torch.ones(3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("equation", "error", "message"),
    [
        ("a b, b c", InvalidArgument, "after the arrow"),
        ("a b -> a", InvalidArgument, "with 2 arrays"),
        ("a b, b c -> a d", InvalidArgument, "some of them"),
        ("a b, b c -> a a", InvalidArgument, "each once"),
        ("a b, b 2 -> a", InvalidArgument, "names of the axes"),
        ("a b d, b c -> a c", ShapeMismatch, r"'a b d' has the shape \[2, 3\]"),
        ("a b, c b -> a c", ShapeMismatch, "the axis 'b' has the sizes 3 and 4"),
    ],
)
def test_equations_that_do_not_fit_are_refused(equation: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        einsum(equation, torch.ones(2, 3), torch.ones(3, 4))
