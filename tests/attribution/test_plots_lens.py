"""The picture of a lens holds what the lens said: read back from the figure, not looked at."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from attribution.errors import InvalidArgument
from attribution.plots import lens_map


def cell(token: str, token_id: int, probability: float, kl: float) -> dict[str, Any]:
    return {"kl": kl, "entropy": 0.5, "top": [{"token": token, "token_id": token_id, "probability": probability}]}


RESULT: dict[str, Any] = {
    "model_id": "toy",
    "n_layers": 2,
    "layers": [0, 2],
    "positions": [1, 3, 4],
    "tokens": ["<s>", " a", "b", "$c$", "a long token"],
    "cells": [
        [cell(" a", 1, 0.25, 8.0), cell("\n", 2, 0.5, 2.0), cell("of length", 3, 1.0, 0.5)],
        [cell(" a", 1, 0.9, 0.0), cell("d", 4, 0.8, 0.0), cell("e", 5, 0.7, 0.0)],
    ],
}


def drawn(figure: Figure) -> Figure:
    """The figure, after all of its texts and ticks were laid out; a warning on the way is an error."""
    figure.draw_without_rendering()
    return figure


def ticks(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_lens_map_has_a_row_per_layer_upwards_and_a_column_per_position():
    axes, bar = drawn(lens_map(RESULT)).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.25, 0.5, 1.0], [0.9, 0.8, 0.7]])
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.get_ylim() == (-0.5, 1.5)
    assert ticks(axes.get_yticklabels()) == ["0", "final"]
    assert ticks(axes.get_xticklabels()) == ["·a\n1", r"\$c\$" + "\n3", "a·long·…\n4"]
    assert (axes.get_title(), axes.get_xlabel()) == ("logit lens of toy", "token that is read")
    assert bar.get_ylabel() == "probability"


def test_the_tokens_stand_in_their_cells_and_those_of_the_final_stream_are_bold():
    axes = drawn(lens_map(RESULT, "a title")).axes[0]
    found = {text.get_position(): (text.get_text(), text.get_fontweight()) for text in axes.texts}
    assert found == {
        (0, 0): ("·a", "bold"),
        (1, 0): ("↵", "normal"),
        (2, 0): ("of·leng…", "normal"),
        (0, 1): ("·a", "bold"),
        (1, 1): ("d", "bold"),
        (2, 1): ("e", "bold"),
    }
    assert axes.get_title() == "a title"
    colours = {text.get_position(): text.get_color() for text in axes.texts}
    assert (colours[0, 0], colours[2, 0]) == ("white", "black")  # light on dark, dark on light


def test_the_colours_may_be_divergences():
    axes, bar = drawn(lens_map(RESULT, colour="kl")).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[8.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    assert axes.images[0].get_clim() == (0, 8)
    assert "nats" in bar.get_ylabel()


def test_without_the_final_stream_nothing_is_bold():
    axes = drawn(lens_map(RESULT | {"layers": [0, 1]})).axes[0]
    assert {text.get_fontweight() for text in axes.texts} == {"normal"}


def test_of_many_positions_the_last_are_drawn_and_it_is_said():
    axes = drawn(lens_map(RESULT, most_positions=2)).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.5, 1.0], [0.8, 0.7]])
    assert axes.get_xlabel() == "token that is read (the last 2 of 3 positions)"
    assert [text.get_text() for text in axes.texts][:2] == ["↵", "of·leng…"]


@pytest.mark.parametrize(
    ("result", "options", "words"),
    [
        (RESULT, {"colour": "rank"}, "colour is one of probability, kl; found 'rank'"),
        (RESULT, {"most_positions": 0}, "most_positions is 0"),
        ({"layers": [1]}, {}, "no result of lens"),
        (RESULT | {"cells": [[{"kl": 1.0, "top": []}] * 3] * 2}, {}, "no result of lens"),
        (RESULT | {"cells": [[cell("a", 1, float("nan"), 0.0)] * 3] * 2}, {}, "not finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(result: dict[str, Any], options: dict[str, Any], words: str):
    with pytest.raises(InvalidArgument, match=words):
        lens_map(result, **options)
