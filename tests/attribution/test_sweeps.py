"""The table of a sweep and its picture hold what the sweep found; both refuse what would mislead."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import Tensor

from attribution.errors import InvalidArgument, ShapeMismatch
from attribution.plots import sweep_map
from attribution.sweeps import sweep_table


def ablation(axes: dict[str, list[int]], after: Tensor, before: float) -> dict:
    return {"axes": axes, "before": before, "after": after}


def patching(axes: dict[str, list[int]], patched: Tensor, clean: float = 5.0, corrupted: float = 1.0) -> dict:
    metric = {
        "clean": clean,
        "corrupted": corrupted,
        "patched": patched,
        "recovery": (patched - corrupted) / (clean - corrupted),
        "note": None,
    }
    return {"axes": axes, "log_prob": metric, "logit_diff": None}


HEADS = ablation({"layer": [4, 7], "head": [0, 1, 2]}, torch.tensor([[-1.0, -3.0, -1.5], [-1.0, 0.5, -9.0]]), -1.0)
PLACES = patching({"layer": [0, 1], "position": [3, 8]}, torch.tensor([[5.0, 1.0], [2.0, 0.0]]))


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def labels_of(ticks: list) -> list[str]:
    return [tick.get_text() for tick in ticks]


def heights(axes: Axes) -> list[float]:
    (bars,) = axes.containers
    assert isinstance(bars, BarContainer)
    return np.asarray(bars.datavalues).tolist()


# --- the table


def test_the_table_has_a_row_per_cell_those_that_change_most_first() -> None:
    assert [tuple(row.values()) for row in sweep_table(HEADS)] == [
        (7, 2, -9.0, -8.0, None),
        (4, 1, -3.0, -2.0, None),
        (7, 1, 0.5, 1.5, None),
        (4, 2, -1.5, -0.5, None),
        (4, 0, -1.0, 0.0, None),
        (7, 0, -1.0, 0.0, None),
    ]
    assert list(sweep_table(HEADS)[0]) == ["layer", "head", "value", "change", "recovery"]


def test_the_table_of_patching_has_the_recovery() -> None:
    assert sweep_table(PLACES, top=2) == [
        {"layer": 0, "position": 3, "value": 5.0, "change": 4.0, "recovery": 1.0},
        {"layer": 1, "position": 3, "value": 2.0, "change": 1.0, "recovery": 0.25},
    ]


def test_the_table_of_equal_samples_has_no_recovery() -> None:
    result = patching({"layer": [0]}, torch.tensor([1.5]))
    result["log_prob"] |= {"recovery": None, "note": "nothing to recover"}
    assert sweep_table(result) == [{"layer": 0, "value": 1.5, "change": 0.5, "recovery": None}]


@pytest.mark.parametrize(
    ("result", "arguments", "param", "text"),
    [
        (HEADS, {"top": 0}, "top", "at least 1"),
        (HEADS, {"metric": "kl"}, "metric", "log_prob, logit_diff"),
        (HEADS, {"metric": "logit_diff"}, "metric", "only log_prob"),
        (PLACES, {"metric": "logit_diff"}, "metric", "against"),
        ({"before": 1.0, "after": 2.0}, {}, "result", r"\['after', 'before'\]"),
    ],
)
def test_the_table_refuses(result: dict, arguments: dict, param: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as caught:
        sweep_table(result, **arguments)
    assert caught.value.param == param


# --- the picture


def test_a_map_has_layers_upwards_and_is_white_at_no_effect() -> None:
    axes, bar = drawn(sweep_map(HEADS, "zeros")).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0, -2, -0.5], [0, 1.5, -8]])
    assert axes.images[0].get_clim() == (-8, 8)
    assert axes.get_ylim() == (-0.5, 1.5)
    assert (labels_of(axes.get_yticklabels()), labels_of(axes.get_xticklabels())) == (["4", "7"], ["0", "1", "2"])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("head", "layer", "zeros")
    assert bar.get_ylabel() == "change of\nlog-probability (nats)"
    assert [text.get_text() for text in axes.texts] == ["-2.0", "-0.5", "1.5", "-8.0"]


def test_a_map_of_patching_shows_the_recovery_at_the_tokens() -> None:
    tokens = [f"t{number}" for number in range(10)]
    axes, bar = drawn(sweep_map(PLACES, "patched", tokens=tokens)).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0.25, -0.25]])
    assert labels_of(axes.get_xticklabels()) == ["t3 3", "t8 8"]
    assert bar.get_ylabel() == "recovery\nof log-probability"
    changed = drawn(sweep_map(PLACES, "patched", show="change")).axes[0]
    np.testing.assert_array_equal(changed.images[0].get_array(), [[4, 0], [1, -1]])


def test_of_many_positions_those_with_effects_are_drawn_and_the_rest_is_bounded_in_words() -> None:
    patched = torch.full((2, 100), 1.002)
    patched[1, 70], patched[0, 71], patched[0, 9] = 5.0, 3.0, 2.0
    result = patching({"layer": [0, 1], "position": list(range(100))}, patched)
    axes = drawn(sweep_map(result, "many", most_positions=2)).axes[0]
    assert labels_of(axes.get_xticklabels()) == ["70", "71"]
    assert axes.get_xlabel() == "position (2 of 100; elsewhere at most 0.25)"
    axes = drawn(sweep_map(result, "many", most_positions=50)).axes[0]
    assert labels_of(axes.get_xticklabels()) == ["9", "70", "71"]
    assert axes.get_xlabel() == "position (3 of 100; elsewhere at most 0.0005)"


def test_one_axis_is_drawn_as_bars_and_one_entry_is_named_in_the_title() -> None:
    bars = drawn(sweep_map(patching({"layer": [0, 1, 2]}, torch.tensor([1.0, 5.0, 0.0])), "mlps")).axes[0]
    assert heights(bars) == [0, 1, -0.25]
    one = ablation({"layer": [6], "head": [0, 1], "position": [2, 4]}, torch.zeros(1, 2, 2), 1.0)
    axes = drawn(sweep_map(one, "a layer")).axes[0]
    assert axes.get_title() == "a layer\n(layer 6)"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("head", "position")
    single = drawn(sweep_map(ablation({"layer": [6], "head": [3]}, torch.tensor([[2.0]]), 1.0), "one")).axes[0]
    assert heights(single) == [1]


def test_a_map_of_eighty_layers_and_many_heads_stays_readable() -> None:
    result = ablation({"layer": list(range(80)), "head": list(range(64))}, torch.randn(80, 64), 0.0)
    figure = drawn(sweep_map(result, "a very long title " * 20))
    assert max(figure.get_size_inches()) <= 18
    assert labels_of(figure.axes[0].get_yticklabels()) == [str(layer) for layer in range(0, 80, 2)]
    assert 1 < len(figure.axes[0].get_title().splitlines()) <= 5


THREE = ablation({"layer": [0, 1], "head": [0, 1], "position": [0, 1]}, torch.zeros(2, 2, 2), 0.0)


@pytest.mark.parametrize(
    ("result", "arguments", "param", "text"),
    [
        (THREE, {}, "result", "layer, head, position; two can be drawn"),
        (HEADS, {"show": "recovery"}, "show", "no clean value"),
        (HEADS, {"show": "loss"}, "show", "'recovery' or 'change'; found 'loss'"),
        (PLACES, {"tokens": ["a"] * 8}, "tokens", "8 entries; expected at least 9"),
        (PLACES, {"most_positions": 0}, "most_positions", "at least one"),
        (ablation({"layer": [0, 1]}, torch.tensor([1.0, torch.nan]), 0.0), {}, "result", "not finite"),
    ],
)
def test_a_map_refuses(result: dict, arguments: dict, param: str, text: str) -> None:
    with pytest.raises((InvalidArgument, ShapeMismatch), match=text) as caught:
        sweep_map(result, "title", **arguments)
    assert caught.value.param == param


def test_a_map_of_what_cannot_be_recovered_says_why() -> None:
    result = patching({"layer": [0, 1]}, torch.tensor([1.0, 2.0]))
    result["log_prob"] |= {"recovery": None, "note": "clean and corrupted differ by 1e-9"}
    assert drawn(sweep_map(result, "title")).axes[0].get_ylabel() == "change of\nlog-probability (nats)"
    with pytest.raises(InvalidArgument, match="differ by 1e-9; show='change'"):
        sweep_map(result, "title", show="recovery")
