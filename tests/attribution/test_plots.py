"""Pictures hold what was given to them: read back from the figures, not looked at."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor
from transformers import AutoTokenizer

from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch
from attribution.plots import grid_attention, head_map, pattern_map
from attribution.plots.maps import check_pattern
from attribution.plots.style import every, readable
from puzzles import Result, demo_model_path, gen_puzzle


def drawn(figure: Figure) -> Figure:
    """The figure, after all of its texts and ticks were laid out; a warning on the way is an error."""
    figure.draw_without_rendering()
    return figure


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ticks(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


# --- head_map


def test_a_head_map_has_a_row_per_layer_and_the_mlps_apart():
    scores = torch.tensor([[1.0, -2.0, 0.5], [0.25, 8.0, 3.0]])
    axes, bar = drawn(head_map(scores, "a title", unit="bits", marked=2)).axes
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array(), np.ma.masked_invalid([[1, -2, np.nan, 0.5], [0.25, 8, np.nan, 3]]))
    assert image.get_clim() == (-8, 8)
    assert ticks(axes.get_xticklabels()) == ["0", "1", "MLP"]
    assert ticks(axes.get_yticklabels()) == ["0", "1"]
    assert axes.get_ylim() == (-0.5, 1.5)  # layers upwards
    assert texts(axes) == ["8.0", "3.0"]
    assert [text.get_position() for text in axes.texts] == [(1, 1), (3, 1)]
    assert (axes.get_title(), bar.get_ylabel()) == ("a title", "bits")


def test_a_head_map_of_eighty_layers_stays_readable():
    scores = torch.zeros(80, 65)
    scores[70, 42], scores[3, 64] = 5.0, 2.0
    figure = drawn(head_map(scores, "big", marked=2))
    axes = figure.axes[0]
    assert max(figure.get_size_inches()) <= 16
    assert ticks(axes.get_xticklabels()) == [*map(str, range(0, 64, 2)), "MLP"]
    assert ticks(axes.get_yticklabels()) == [*map(str, range(0, 80, 4))]
    assert not axes.texts
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(42, 70), (65, 3)]


def test_scores_that_are_not_finite_or_not_there_are_refused():
    with pytest.raises(InvalidArgument, match="scores has 1 values that are not finite"):
        head_map(torch.tensor([[1.0, float("nan")]]), "t")
    with pytest.raises(InvalidArgument, match="nothing to draw"):
        head_map(torch.zeros(0, 5), "t")


def test_a_map_of_zeros_has_limits_all_the_same():
    assert drawn(head_map(torch.zeros(2, 3), "t")).axes[0].images[0].get_clim() == (-1, 1)


# --- pattern_map

TOKENS = ["<s>", "ĠR", "Ċ", "$a$", "日"]


def test_a_pattern_map_shows_attention_and_attribution_side_by_side():
    aw = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0]])
    aa = torch.tensor([[0.0, 3.0, 0, 0, 0], [0.0, 0, 1.0, 0, 0]])
    figure = drawn(pattern_map(aw, aa, TOKENS, "head 3.5", queries=[1, 3], unit="nats"))
    left, right, left_bar, right_bar = figure.axes
    np.testing.assert_allclose(left.images[0].get_array(), aw.double())
    np.testing.assert_allclose(right.images[0].get_array(), aa.double())
    assert (left.images[0].get_clim(), right.images[0].get_clim()) == ((0, 1), (0, 3))
    assert ticks(left.get_xticklabels()) == ["<s> 0", "·R 1", "↵ 2", r"\$a\$ 3", "□ 4"]
    assert ticks(left.get_yticklabels()) == ["·R 1", r"\$a\$ 3"]
    assert (left_bar.get_ylabel(), right_bar.get_ylabel()) == ("attention (share of a query)", "nats")
    assert figure.get_suptitle() == "head 3.5"


def test_a_signed_attribution_is_white_at_zero():
    aa = torch.tensor([[0.0, -3.0, 1.0, 0, 0]])
    image = pattern_map(torch.full((1, 5), 0.2), aa, TOKENS, "t", queries=[4]).axes[1].images[0]
    assert (image.get_clim(), image.get_cmap().name) == ((-3, 3), "RdBu_r")


def test_of_many_keys_the_most_looked_at_are_drawn_and_their_share_is_told():
    aw, aa = torch.zeros(2, 300), torch.zeros(2, 300)
    aw[:, 250], aw[:, 10], aw[:, 77] = 0.6, 0.3, 0.1
    aa[0, 123] = 2.0
    tokens = [f"t{i}" for i in range(300)]
    left, right, *_ = drawn(pattern_map(aw, aa, tokens, "t", queries=[5, 6], most_keys=3)).axes
    assert ticks(left.get_xticklabels()) == ["t10 10", "t123 123", "t250 250"]
    assert left.get_xlabel() == "key (3 of 300, 90% of the sum)"
    assert right.get_xlabel() == "key (3 of 300, 100% of the sum)"


def test_a_pattern_that_does_not_fit_its_tokens_is_refused():
    aw = torch.zeros(2, 5)
    with pytest.raises(ShapeMismatch, match="tokens has 3 entries; expected 5"):
        pattern_map(aw, aw, TOKENS[:3], "t")
    with pytest.raises(ShapeMismatch, match="aa has the shape"):
        check_pattern(aw.numpy(), aw[:, :4].numpy(), TOKENS, [0, 1])
    with pytest.raises(ShapeMismatch, match="queries has 1 entries"):
        pattern_map(aw, aw, TOKENS, "t", queries=[1])
    with pytest.raises(OutOfRange, match="queries is 5"):
        pattern_map(aw, aw, TOKENS, "t", queries=[1, 5])
    with pytest.raises(InvalidArgument, match="most_keys"):
        pattern_map(aw, aw, TOKENS, "t", most_keys=0)


def test_ticks_are_thinned_to_round_gaps():
    assert [every(count, 32) for count in (8, 32, 33, 64, 80, 1000, 10**6)] == [1, 1, 2, 2, 4, 32, 31250]
    assert readable("") == "∅"


# --- grid_attention


@cache
def result() -> Result:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    return Result.from_puzzle(gen_puzzle(n=3, m=4, n_train=3, seed=1), tokenizer)


def looking_at(*cells: tuple[int, int], weights: list[float]) -> Tensor:
    """A row of attention with these weights at the starts of these token ranges."""
    row = torch.zeros(1, max(result().answer_indices) + 3)
    for (start, _), weight in zip(cells, weights, strict=True):
        row[0, start] = weight
    return row


def panel(figure: Figure, name: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title().split("\n")[0] == name)


def discs(axes: Axes) -> dict[tuple[float, float], float]:
    """The area of the discs by the middle of their cells, as a share of a full one."""
    circles = [one for one in axes.patches if isinstance(one, Circle)]
    return {tuple(map(float, one.center)): pytest.approx((one.radius / 0.38) ** 2) for one in circles}


def test_discs_lie_on_the_cells_that_a_query_looks_at():
    puzzle = result().puzzle
    assert puzzle is not None
    assert puzzle.ranges is not None
    first, test = puzzle.ranges.examples[0][1][2][3], puzzle.ranges.test_input[1][0]
    query = result().query_positions[5]  # the cell in row 1, column 1
    row = looking_at(first, test, (0, 1), weights=[0.2, 0.6, 0.2])
    figure = drawn(grid_attention(puzzle, row, [query], "a head"))
    assert discs(panel(figure, "output 1")) == {(3.5, 2.5): 1 / 3}
    assert discs(panel(figure, "test input")) == {(0.5, 1.5): 1.0}
    assert discs(panel(figure, "input 1")) == {}
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert "output 1\n20%" in titles
    assert "test input\n60%" in titles
    assert len(titles) == 2 * len(puzzle.examples) + 2
    assert "outside of the grids: 20%" in figure.get_supxlabel()
    assert "Largest disc: 60.0%" in figure.get_supxlabel()
    assert figure.get_suptitle() == "a head"


def test_cells_have_their_colours_and_unseen_cells_of_the_answer_none():
    puzzle = result().puzzle
    assert puzzle is not None
    assert puzzle.ranges is not None
    row = looking_at(puzzle.ranges.test_input[0][0], weights=[1.0])
    figure = grid_attention(puzzle, row, [result().query_positions[5]], "t")
    fills = {"K": "#333333", "B": "#3b6fd4", "G": "#3fa34d", "R": "#d1423a", "Y": "#f2cf45"}

    def colours(name: str) -> list[str]:
        patches = [one for one in panel(figure, name).patches if isinstance(one, Rectangle) and one.get_fill()]
        return [to_hex(one.get_facecolor()) for one in patches]

    assert colours("test input") == [fills[letter] for row in puzzle.test_input for letter in row]
    assert texts(panel(figure, "test input")) == [letter for row in puzzle.test_input for letter in row]
    assert colours("answer") == [fills[letter] for letter in puzzle.answers[:5]] + ["#eeeeee"] * 7
    frames = [one for one in panel(figure, "answer").patches if isinstance(one, Rectangle) and not one.get_fill()]
    assert [one.get_xy() for one in frames] == [(1, 1)]


def test_grids_are_read_row_by_row_each_input_beside_its_output():
    result_ = result()
    assert result_.puzzle is not None
    figure = drawn(grid_attention(result_.puzzle, looking_at((3, 4), weights=[1.0]), result_.query_positions[:1], "t"))
    names = ["input 1", "output 1", "input 2", "output 2", "input 3", "output 3", "test input", "answer"]
    places = [panel(figure, name).get_position() for name in names]
    assert (
        sorted(names, key=lambda name: (-round(places[names.index(name)].y0, 2), places[names.index(name)].x0)) == names
    )


def test_several_queries_are_averaged():
    puzzle = result().puzzle
    assert puzzle is not None
    assert puzzle.ranges is not None
    one, other = puzzle.ranges.test_input[0][0], puzzle.ranges.test_input[2][1]
    rows = torch.cat([looking_at(one, weights=[1.0]), looking_at(one, other, weights=[0.5, 0.5])])
    figure = grid_attention(puzzle, rows, result().query_positions[:2], "t")
    assert discs(panel(figure, "test input")) == {(0.5, 0.5): 1.0, (1.5, 2.5): 1 / 3}


def test_attention_that_does_not_fit_the_puzzle_is_refused():
    puzzle = result().puzzle
    assert puzzle is not None
    row = torch.ones(1, 400)
    with pytest.raises(InvalidArgument, match="no token ranges"):
        grid_attention(replace(puzzle, ranges=None), row, [3], "t")
    with pytest.raises(ShapeMismatch, match="answer ends there"):
        grid_attention(puzzle, row[:, :50], [3], "t")
    with pytest.raises(ShapeMismatch, match="as queries"):
        grid_attention(puzzle, row, [3, 4], "t")
    with pytest.raises(InvalidArgument, match="negative"):
        grid_attention(puzzle, -row, [3], "t")
    with pytest.raises(OutOfRange, match="queries is 400"):
        grid_attention(puzzle, row, [400], "t")
