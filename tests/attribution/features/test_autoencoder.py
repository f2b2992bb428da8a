"""The formulas of autoencoders, against loops over Python's floats."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attribution.features import autoencoder as module
from attribution.features.autoencoder import Autoencoder
from tests.attribution.features.plain_autoencoder import (
    D_IN,
    N_FEATURES,
    by_loops,
    every_autoencoder,
    random_autoencoder,
)

EVERY = dict(every_autoencoder())
ROWS = 2 * torch.randn(7, D_IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


@pytest.mark.parametrize("name", EVERY)
def test_every_combination_computes_what_the_loops_say(name: str) -> None:
    one = EVERY[name]
    pre, features, written = (
        torch.tensor(part, dtype=torch.float64)
        for part in zip(*(by_loops(one, row.tolist()) for row in ROWS), strict=True)
    )
    assert (features > 0).any()
    assert (features == 0).any()
    torch.testing.assert_close(one.pre_activations(ROWS), pre, **TOLERANCE)
    torch.testing.assert_close(one.encode(ROWS), features, **TOLERANCE)
    torch.testing.assert_close(one.decode(features, ROWS), written, **TOLERANCE)
    torch.testing.assert_close(one.reconstruct(ROWS), written, **TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_rows_may_have_any_axes_before_their_width(name: str) -> None:
    one = EVERY[name]
    torch.testing.assert_close(one.encode(ROWS[0]), one.encode(ROWS)[0], **TOLERANCE)
    cube = ROWS[:6].view(2, 3, D_IN)
    torch.testing.assert_close(one.reconstruct(cube), one.reconstruct(ROWS[:6]).view(2, 3, -1), **TOLERANCE)


@pytest.mark.parametrize("k", [1, 3, 4, 5, N_FEATURES])
@pytest.mark.parametrize("name", EVERY)
def test_the_strongest_features_are_the_largest_activations_in_order(name: str, k: int) -> None:
    one = EVERY[name]
    values, indices = one.topk(ROWS, k)
    for row, found, at in zip(ROWS, values.tolist(), indices.tolist(), strict=True):
        features = by_loops(one, row.tolist())[1]
        assert len(set(at)) == k
        assert found == pytest.approx(sorted(features, reverse=True)[:k], abs=1e-12)
        assert found == pytest.approx([features[j] for j in at], abs=1e-12)


@pytest.mark.parametrize("name", ["relu-none-False-False-False", "jumprelu-layer_norm-True-True-False"])
def test_many_rows_are_searched_in_parts_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EVERY[name].topk(ROWS, 3)
    monkeypatch.setattr(module, "_ENCODED_AT_ONCE", 2 * N_FEATURES)
    for part, expected in zip(EVERY[name].topk(ROWS, 3), whole, strict=True):
        torch.testing.assert_close(part, expected, **TOLERANCE)


@pytest.mark.parametrize("name", EVERY)
def test_a_direction_is_what_one_more_unit_of_a_feature_writes(name: str) -> None:
    one = EVERY[name]
    features = one.encode(ROWS)
    for j in (0, 5, 12):
        more = features.clone()
        more[:, j] += 1.0
        scale = one.scale_of(ROWS)
        written = one.directions([j]) * (1.0 if scale is None else scale)
        torch.testing.assert_close(
            one.decode(more, ROWS) - one.decode(features, ROWS), written.expand(len(ROWS), -1), atol=1e-10, rtol=1e-10
        )


@pytest.mark.parametrize("name", [name for name in EVERY if "-none-False" in name])
def test_a_reader_is_the_gradient_of_a_pre_activation(name: str) -> None:
    one = EVERY[name]
    x = ROWS[0].clone().requires_grad_()
    for j in (0, 5, 12):
        (gradient,) = torch.autograd.grad(one.pre_activations(x)[j], x)
        torch.testing.assert_close(one.readers([j])[0], gradient, **TOLERANCE)


def test_features_are_listed_in_the_order_that_is_asked_for() -> None:
    one = random_autoencoder()
    torch.testing.assert_close(one.directions([7, 2]), one.W_dec[[7, 2]])
    torch.testing.assert_close(one.readers(torch.tensor([7, 2])), one.W_enc.T[[7, 2]])


@pytest.mark.parametrize("name", EVERY)
def test_another_dtype_changes_every_tensor(name: str) -> None:
    one = EVERY[name].to(dtype=torch.float32)
    assert one.encode(ROWS).dtype == one.reconstruct(ROWS).dtype == one.dtype == torch.float32
    torch.testing.assert_close(one.reconstruct(ROWS).double(), EVERY[name].reconstruct(ROWS), atol=1e-4, rtol=1e-4)


def test_nothing_is_copied_where_nothing_changes() -> None:
    one = random_autoencoder()
    assert one.to() is one
    assert one.to("cpu", torch.float64) is one


@pytest.mark.parametrize("name", EVERY)
def test_the_activations_of_one_feature_are_those_among_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = EVERY[name].encode(ROWS)
    monkeypatch.setattr(module, "_ENCODED_AT_ONCE", 2 * N_FEATURES)  # two rows at a time where all are needed
    for j in range(N_FEATURES):
        torch.testing.assert_close(EVERY[name].activations_of(j, ROWS), expected[:, j], **TOLERANCE)


def test_a_row_of_zeros_is_read_as_zeros() -> None:
    one = random_autoencoder(normalisation="constant_norm")
    torch.testing.assert_close(one.encode(torch.zeros(1, D_IN)), torch.relu(one.b_enc)[None])  # not 0/0


@pytest.mark.parametrize("name", ["topk-layer_norm-True-True-True", "gated-constant_norm-False-False-False"])
def test_one_autoencoder_serves_many_threads(name: str) -> None:
    one = EVERY[name]
    many = [torch.randn(20, D_IN, dtype=torch.float64) for _ in range(40)]

    def work(one: Autoencoder, x: torch.Tensor) -> torch.Tensor:
        return one.decode(one.encode(x), x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: work(one, x), many))
    for x, y in zip(many, found, strict=True):
        torch.testing.assert_close(y, work(one, x), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in EVERY if "topk" not in name])
def test_a_feature_taken_out_activates_and_writes_as_it_does_among_the_others(name: str) -> None:
    one = EVERY[name]
    for j in (0, 7, 12):
        alone = one.feature(j)
        torch.testing.assert_close(alone.encode(ROWS)[:, 0], one.encode(ROWS)[:, j], **TOLERANCE)
        torch.testing.assert_close(alone.directions([0]), one.directions([j]), **TOLERANCE)
