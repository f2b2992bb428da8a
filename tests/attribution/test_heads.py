"""Distances of attention patterns, clusters of heads and their names, held against arithmetic by hand and scipy."""

from math import log

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from attribution.errors import InvalidArgument, ShapeMismatch
from attribution.heads import ClusterMetrics, cluster_heads, compute_js_matrix, label_by_source, offset_names


def random_patterns(heads: int, samples: int = 2, queries: int = 3, keys: int = 17, scale: float = 3.0) -> Tensor:
    scores = torch.randn(heads, samples, queries, keys, generator=torch.Generator().manual_seed(0))
    return (scores * scale).softmax(-1)


def test_distances_of_two_keys_are_those_by_hand():
    # p = (1, 0), q = (1/2, 1/2): m = (3/4, 1/4); H(m) = 0.562335, H(p) = 0, H(q) = ln 2: 0.562335 − 0.346574
    # r = (0, 1) shares nothing with p: ln 2
    patterns = {
        (0, 1): torch.tensor([[1.0, 0.0]]),
        (0, 4): torch.tensor([[0.5, 0.5]]),
        (2, 0): torch.tensor([[0.0, 1.0]]),
    }
    near = 0.2157616
    expected = torch.tensor([[0, near, log(2)], [near, 0, near], [log(2), near, 0]], dtype=torch.float64)
    torch.testing.assert_close(compute_js_matrix(patterns), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_scipys_averaged_over_rows_and_samples(scale: float, dtype: torch.dtype):
    patterns = random_patterns(7, keys=301, scale=scale).to(dtype)
    rows = patterns.double().flatten(1, 2).numpy()
    expected = [[(jensenshannon(one, other, axis=1) ** 2).mean() for other in rows] for one in rows]
    torch.testing.assert_close(
        compute_js_matrix(patterns), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0
    )


def test_distances_are_symmetric_zero_on_the_diagonal_and_at_most_ln_2():
    patterns = random_patterns(150, scale=20.0)  # more heads than one block of products
    distances = compute_js_matrix(patterns)
    assert torch.equal(distances, distances.T)
    assert not distances.diagonal().any()
    assert distances[0, 1:].min() > 0
    assert distances.max() <= log(2)
    assert distances.dtype == torch.float64


def test_the_distance_of_a_head_to_its_copy_is_nothing():
    pattern = random_patterns(1)[0]
    distances = compute_js_matrix({(0, 0): pattern, (1, 0): pattern.clone()})
    assert distances[0, 1] < 1e-6


def test_more_rows_than_are_held_at_a_time_count_like_few(monkeypatch: pytest.MonkeyPatch):
    patterns = random_patterns(4, samples=5)
    whole = compute_js_matrix(patterns)
    monkeypatch.setattr("attribution.heads._AT_ONCE", 400)
    torch.testing.assert_close(compute_js_matrix(patterns), whole, atol=1e-5, rtol=0)


def test_keys_padded_with_zeros_change_nothing():
    patterns = random_patterns(4)
    padded = torch.nn.functional.pad(patterns, (0, 6))
    torch.testing.assert_close(compute_js_matrix(padded), compute_js_matrix(patterns), atol=1e-5, rtol=0)


def test_rows_rounded_to_bfloat16_are_distributions_still():
    patterns = random_patterns(4)
    rounded = compute_js_matrix(patterns.bfloat16())
    torch.testing.assert_close(rounded, compute_js_matrix(patterns), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([0.5, 0.2, 0.2], "it sums to 0.9"),
        ([0.0, 0.0, 0.0], "it sums to 0"),
        ([1.2, -0.2, 0.0], "it holds -0.2"),
        ([float("nan"), 0.5, 0.5], "it sums to nan"),
        ([float("inf"), 0.0, 0.0], "it sums to inf"),
    ],
)
def test_a_row_that_is_no_distribution_is_refused_by_head_and_row(entries: list[float], found: str):
    good = random_patterns(1, keys=3)[0]
    bad = good.clone()
    bad[1, 2] = torch.tensor(entries)
    with pytest.raises(InvalidArgument) as caught:
        compute_js_matrix({(3, 1): good, (3, 5): bad})
    assert f"head (3, 5), row [1, 2] is no distribution: {found}" in caught.value.message
    assert caught.value.param == "patterns"


def test_patterns_of_other_shapes_and_no_patterns_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 3, 5\] at head \(0, 1\); expected \[2, 3, 17\]"):
        compute_js_matrix({(0, 0): random_patterns(1)[0], (0, 1): random_patterns(1, keys=5)[0]})
    with pytest.raises(InvalidArgument, match="at least one head"):
        compute_js_matrix({})


def planted(kinds: dict[tuple[int, int], int]) -> dict[tuple[int, int], Tensor]:
    """Heads that look at one key each, by and large: key 3 · kind."""
    noise = random_patterns(len(kinds), samples=3, queries=2, keys=12, scale=1.0)
    found = {}
    for (head, kind), around in zip(kinds.items(), noise, strict=True):
        found[head] = 0.1 * around + 0.9 * torch.nn.functional.one_hot(torch.tensor(3 * kind), 12)
    return found


KINDS = {(0, 0): 1, (0, 3): 2, (1, 1): 1, (2, 0): 0, (2, 5): 1, (3, 2): 2}


def test_planted_clusters_are_found_the_largest_first():
    groups, metrics, linkage, distances = cluster_heads(planted(KINDS), threshold=0.3)
    assert groups == [[(0, 0), (1, 1), (2, 5)], [(0, 3), (3, 2)], [(2, 0)]]
    assert metrics.groups == 3
    assert metrics.within is not None
    assert metrics.between is not None
    assert metrics.within < 0.05 < 0.4 < metrics.between
    assert linkage.shape == (5, 4)
    assert distances.shape == (6, 6)


def line(points: list[float]) -> dict[tuple[int, int], Tensor]:
    """Heads with a place on a line each, in the order of the places; `on_a_line` is their distance."""
    return {(0, i): torch.tensor([[point]]) for i, point in enumerate(points)}


def on_a_line(patterns: dict[tuple[int, int], Tensor]) -> Tensor:
    places = torch.stack([one.squeeze() for one in patterns.values()])
    return (places[:, None] - places).abs()


def test_metrics_are_those_by_hand():
    # places 0, 1 | 5 | 9, 11: within (1 + 2) / 2; between (5+9+11 + 4+8+10 + 4+6) / 8 = 57/8
    # silhouettes: 0: a 1, b 5: 4/5;  1: a 1, b 4: 3/4;  5 is alone: 0;  9: a 2, b 4: 1/2;  11: a 2, b 6: 2/3
    groups, metrics, linkage, _ = cluster_heads(line([0.0, 1.0, 5.0, 9.0, 11.0]), on_a_line, threshold=3.0)
    assert groups == [[(0, 0), (0, 1)], [(0, 3), (0, 4)], [(0, 2)]]
    silhouette = (4 / 5 + 3 / 4 + 0 + 1 / 2 + 2 / 3) / 5
    assert metrics.silhouette == pytest.approx(silhouette)
    assert (metrics.groups, metrics.within, metrics.between) == (3, 1.5, 57 / 8)
    # average linkage: 0–1 at 1, 9–11 at 2, 5 joins {0, 1} at (5 + 4) / 2
    np.testing.assert_allclose(linkage[:3, 2], [1.0, 2.0, 4.5])


def test_one_group_and_heads_that_are_all_alone_have_no_silhouette():
    points = line([0.0, 1.0, 3.0])
    _, together, _, _ = cluster_heads(points, on_a_line, threshold=10.0)
    assert together == ClusterMetrics(1, None, 2.0, None)
    _, alone, _, _ = cluster_heads(points, on_a_line, threshold=0.5)
    assert alone == ClusterMetrics(3, None, None, 2.0)
    groups, single, linkage, _ = cluster_heads(line([4.0]), on_a_line, threshold=0.5)
    assert (groups, single, linkage.shape) == ([[(0, 0)]], ClusterMetrics(1, None, None, None), (0, 4))


def test_identical_heads_are_one_group_at_threshold_zero():
    groups, metrics, _, _ = cluster_heads(line([2.0, 5.0, 2.0]), on_a_line, threshold=0.0)
    assert groups == [[(0, 0), (0, 2)], [(0, 1)]]
    assert metrics.silhouette == pytest.approx(2 / 3)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_no_distance_is_refused(threshold: float):
    with pytest.raises(InvalidArgument, match="threshold"):
        cluster_heads(planted(KINDS), threshold=threshold)


def test_distances_that_are_none_are_refused():
    points = line([0.0, 1.0, 3.0])
    with pytest.raises(InvalidArgument, match="dist_fn"):
        cluster_heads(points, lambda _: torch.tensor([[0.0, 1, 2], [3, 0, 1], [2, 1, 0]]))
    with pytest.raises(InvalidArgument, match="dist_fn"):
        cluster_heads(points, lambda _: torch.full((3, 3), float("nan")))
    with pytest.raises(ShapeMismatch, match="dist_fn"):
        cluster_heads(points, lambda _: torch.zeros(2, 2))


def test_groups_are_named_for_the_key_that_they_look_at_most():
    patterns = planted(KINDS)
    groups, *_ = cluster_heads(patterns, threshold=0.3)
    names = [[f"sample {sample}" if key == 6 else f"key {key}" for key in range(12)] for sample in range(3)]
    first, second, third = label_by_source(groups, patterns, names)
    assert (first.name, first.share, third.name) == ("key 3", 1.0, "key 0")
    assert 0.9 < first.mass < 1.0
    assert (second.name, second.share) == ("sample 0", pytest.approx(1 / 3))  # each of three samples has its own name
    assert str(second) == "sample 0 (33%)"


def test_names_by_offset_follow_the_query():
    # queries at positions 4 and 2 of the sample; the head looks two tokens back from the one, at the other itself
    pattern = torch.tensor([[0, 0, 0.8, 0.2, 0], [0.3, 0.1, 0.6, 0, 0]])
    names = offset_names([[4, 2]])
    assert [names(0, 0, key) for key in (2, 4)] == ["-2", "0"]
    (label,) = label_by_source([[(1, 1)]], {(1, 1): pattern}, names)
    assert (label.name, label.share, label.mass) == ("-2", 0.5, pytest.approx(0.8))


def test_a_key_without_a_name_and_a_head_without_a_pattern_are_refused():
    pattern = torch.eye(3)[None]
    with pytest.raises(ShapeMismatch, match="no name for key 2 of sample 0"):
        label_by_source([[(0, 0)]], {(0, 0): pattern}, [["a", "b"]])
    with pytest.raises(InvalidArgument, match=r"no head \(7, 1\)"):
        label_by_source([[(7, 1)]], {(0, 0): pattern}, [["a", "b", "c"]])
    with pytest.raises(InvalidArgument, match="empty group"):
        label_by_source([[]], {(0, 0): pattern}, [["a", "b", "c"]])
