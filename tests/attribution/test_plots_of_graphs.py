"""Pictures of graphs, curves and trees hold what was given to them."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from attribution.errors import InvalidArgument, LibraryMissing, OutOfRange, ShapeMismatch
from attribution.heads import cluster_heads
from attribution.plots import curves, dendrogram, graph_picture, head_map, interactive_head_map, interactive_pattern_map

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"


def drawn(figure: Figure) -> Figure:
    """The figure, after all of its texts and ticks were laid out; a warning on the way is an error."""
    figure.draw_without_rendering()
    return figure


def ticks(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


NODES = [("lm_head", 4.0, 0.0), ("3.5 v", 3.0, 5.0), ("3.2 v", 3.0, 2.0), ("mlp 1", 1.5, 8.0)]


def test_a_graph_has_its_layers_upwards_and_edges_as_wide_as_their_scores():
    edges = [(1, 0, 4.0), (2, 0, -1.0), (3, 1, 2.0)]
    figure = drawn(graph_picture(NODES, edges, "a graph", unit="bits"))
    axes = figure.axes[0]
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert [places[name][1] for name in ("mlp 1", "3.2 v", "3.5 v", "lm_head")] == [0, 1, 1, 2]
    assert places["3.2 v"][0] < places["3.5 v"][0]  # by column, not as given
    assert ticks(axes.get_yticklabels()) == ["1.5", "3", "4"]
    found = {one.get_gid(): one for one in axes.patches if isinstance(one, FancyArrowPatch)}
    widths = {name: one.get_linewidth() for name, one in found.items()}
    assert widths == {"1-0": 7.0, "2-0": 1.75, "3-1": 3.5}
    assert {name: to_hex(one.get_edgecolor()) for name, one in found.items()} == {
        "1-0": BLUE,
        "2-0": ORANGE,
        "3-1": BLUE,
    }
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "bits"
    assert [text.get_text() for text in legend.get_texts()] == ["4", "1", "-1"]
    assert figure.get_suptitle() == "a graph"


def test_a_long_title_fits_into_the_picture_of_a_small_graph():
    figure = drawn(graph_picture(NODES, [], "the twelve heads that carry the answers, and the MLPs between them, MMMM"))
    box = figure._suptitle.get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.bbox.width


def test_nodes_of_a_depth_never_overlap_however_far_their_columns_lie():
    nodes = [(f"{i}", 0.0, 63.0 - i / 100) for i in range(9)]
    places = sorted(text.get_position()[0] for text in graph_picture(nodes, [], "t").axes[0].texts)
    np.testing.assert_allclose(np.diff(places), 1.0)


def test_edges_that_lead_nowhere_downwards_or_in_a_cycle_are_refused():
    with pytest.raises(OutOfRange, match="edges is 4"):
        graph_picture(NODES, [(4, 0, 1.0)], "t")
    with pytest.raises(InvalidArgument, match=r"from 'lm_head' \(depth 4\) to '3.5 v' \(depth 3\) does not go upwards"):
        graph_picture(NODES, [(1, 0, 1.0), (0, 1, 1.0)], "t")
    with pytest.raises(InvalidArgument, match="edges has 1 values that are not finite"):
        graph_picture(NODES, [(1, 0, float("nan"))], "t")
    with pytest.raises(InvalidArgument, match="nodes is empty"):
        graph_picture([], [], "t")


def test_curves_are_drawn_as_given_and_several_runs_as_mean_and_band():
    ys = {"ours": [0.1, 0.5, 1.0], "random": [[0.0, 0.2, 0.4], [0.2, 0.4, 0.8]]}
    axes = drawn(curves([1, 2, 4], ys, "t", x_label="heads", y_label="kept")).axes[0]
    ours, random = axes.lines
    np.testing.assert_allclose(ours.get_xydata(), [[1, 0.1], [2, 0.5], [4, 1]])
    np.testing.assert_allclose(random.get_ydata(), [0.1, 0.3, 0.6])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert [(corners[corners[:, 0] == 4, 1].min(), corners[corners[:, 0] == 4, 1].max())] == [(0.4, 0.8)]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "random"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "heads", "kept")


def test_more_curves_than_colours_differ_in_their_lines():
    axes = curves([0, 1], {str(i): [i, i + 1] for i in range(15)}, "t").axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 15


def test_curves_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match="for 'a'"):
        curves([1, 2, 3], {"a": [1, 2]}, "t")
    with pytest.raises(InvalidArgument, match="ys is empty"):
        curves([1, 2, 3], {}, "t")


def heads() -> dict[tuple[int, int], torch.Tensor]:
    """Three heads that look at key 1, two at key 7 and one at key 4, of 30, in two samples of four queries."""
    kinds = {(0, 0): 1, (0, 1): 7, (1, 0): 1, (1, 1): 7, (2, 0): 1, (2, 1): 4}
    noise = torch.rand(6, 2, 4, 30, generator=torch.Generator().manual_seed(0)).softmax(-1)
    one_hot = {kind: torch.nn.functional.one_hot(torch.tensor(kind), 30) for kind in kinds.values()}
    return {head: 0.1 * around + 0.9 * one_hot[kind] for (head, kind), around in zip(kinds.items(), noise, strict=True)}


def test_a_dendrogram_shows_the_tree_and_the_mean_of_its_groups():
    patterns = heads()
    groups, _, linkage, _ = cluster_heads(patterns, threshold=0.3)
    labels = ["key 1", "$7", "alone"]
    tree, first, second, bar = drawn(dendrogram(linkage, patterns, groups, "heads", threshold=0.3, labels=labels)).axes
    joins = [line for line in tree.lines if len(line.get_xdata()) == 4]
    assert sorted(float(np.max(line.get_ydata())) for line in joins) == pytest.approx(sorted(linkage[:, 2]))
    assert sorted(to_hex(line.get_color()) for line in joins) == sorted([BLUE, BLUE, ORANGE, GREY, GREY])
    assert {label.get_text() for label in tree.get_xticklabels()} == {"0.0", "0.1", "1.0", "1.1", "2.0", "2.1"}
    colours = {label.get_text(): to_hex(label.get_color()) for label in tree.get_xticklabels()}
    assert (colours["2.0"], colours["0.1"], colours["2.1"]) == (BLUE, ORANGE, GREY)
    assert [text.get_text() for text in tree.texts] == ["cut at 0.3"]
    assert (first.get_title(), second.get_title()) == ("3 heads\nkey 1", "2 heads\n\\$7")
    mean = torch.stack([patterns[head] for head in groups[0]]).mean((0, 1))
    assert first.images[0].get_extent() == [0.5, 7.5, 3.5, -0.5]  # keys 1 to 7: nobody looks at the others
    np.testing.assert_allclose(first.images[0].get_array(), mean[:, 1:8], rtol=1e-6)
    assert (tree.get_title(), bar.get_ylabel()) == ("heads", "mean attention")


def test_a_tree_of_many_heads_in_a_chain_has_no_names_but_a_count():
    # places 0, 1, 3, 6, …: each head joins all before it
    places = np.cumsum(np.arange(1500.0))
    patterns = {divmod(i, 40): torch.eye(2) for i in range(1500)}
    linkage = np.array([[max(0, 1499 + i) if i else 0, i + 1, places[i + 1], i + 2] for i in range(1499)])
    axes = drawn(dendrogram(linkage, patterns, [list(patterns)], "t")).axes[0]
    assert axes.get_xlabel() == "1500 heads"
    assert len(axes.lines) == 1499
    assert not axes.get_xticklabels()


def test_a_single_head_has_a_tree_of_one_leaf():
    patterns = {(3, 2): torch.eye(3)}
    groups, _, linkage, _ = cluster_heads(patterns)
    tree, mean, _ = drawn(dendrogram(linkage, patterns, groups, "t")).axes
    assert ticks(tree.get_xticklabels()) == ["3.2"]
    assert mean.get_title() == "1 head"


def test_a_tree_of_other_heads_is_refused():
    patterns = heads()
    groups, _, linkage, _ = cluster_heads(patterns)
    with pytest.raises(ShapeMismatch, match="linkage"):
        dendrogram(linkage[:-1], patterns, groups, "t")
    with pytest.raises(ShapeMismatch, match="labels"):
        dendrogram(linkage, patterns, groups, "t", labels=["one"] * 9)
    with pytest.raises(InvalidArgument, match=r"\(9, 9\)"):
        dendrogram(linkage, patterns, [[(9, 9)]], "t")
    with pytest.raises(InvalidArgument, match="shown"):
        dendrogram(linkage, patterns, groups, "t", shown=0)


def test_pictures_neither_import_pyplot_nor_change_settings():
    before = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    head_map(torch.eye(3), "t")
    graph_picture(NODES, [(1, 0, 1.0)], "t")
    patterns = heads()
    groups, _, linkage, _ = cluster_heads(patterns)
    dendrogram(linkage, patterns, groups, "t")
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_interactive_pictures_say_how_to_get_plotly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(LibraryMissing, match=r"pip install 'sightline\[plots\]'"):
        interactive_head_map(torch.eye(3), "t")
    with pytest.raises(LibraryMissing, match=r"pip install 'sightline\[plots\]'"):
        interactive_pattern_map(torch.eye(3), torch.eye(3), ["a", "b", "c"], "t")


class Recorded:
    """In plotly's place: keeps what it is called with."""

    def __init__(self, *given: object, **named: object) -> None:
        self.given, self.named = list(given), named

    def add_trace(self, trace: "Recorded") -> None:
        self.given.append(trace)

    def update(self, **named: object) -> "Recorded":
        self.named |= named
        return self

    update_layout = update_yaxes = update


class Plotly:
    """What is used of plotly.graph_objects."""

    Figure = Heatmap = Recorded


def test_interactive_pictures_tell_what_lies_under_the_pointer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attribution.plots.interactive._plotly", lambda: Plotly)
    scores = torch.tensor([[1.0, 2.0, -5.0]])
    (heat,) = interactive_head_map(scores, "t", unit="bits").given
    assert heat.named["text"] == [["layer 0, head 0", "layer 0, head 1", "layer 0, MLP"]]
    assert (heat.named["zmin"], heat.named["zmax"], heat.named["colorbar"]) == (-5, 5, {"title": "bits"})
    np.testing.assert_array_equal(heat.named["z"], scores)
    aw, aa = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.0, 3.0]])
    figure = interactive_pattern_map(aw, aa, ["a", "\n"], "t", queries=[1])
    first, second = figure.given
    assert first.named["text"] == [["'\\n' 1 → 'a' 0", "'\\n' 1 → '\\n' 1"]]
    assert (first.named["visible"], second.named["visible"]) == (True, False)
    assert (first.named["zmax"], second.named["zmin"], second.named["zmax"]) == (1, 0, 3)
    menu = figure.named["updatemenus"][0]["buttons"]
    assert [(one["label"], one["args"]) for one in menu] == [
        ("attention", [{"visible": [True, False]}]),
        ("attribution", [{"visible": [False, True]}]),
    ]


@pytest.mark.slow
def test_interactive_pictures_are_taken_by_plotly():
    import plotly.graph_objects

    figure = interactive_head_map(torch.eye(3), "t")
    assert isinstance(figure, plotly.graph_objects.Figure)
    assert "layer 2, MLP" in figure.to_json()
    pattern = interactive_pattern_map(torch.eye(2), torch.eye(2), ["a", "b"], "t")
    assert [trace.visible for trace in pattern.data] == [True, False]
