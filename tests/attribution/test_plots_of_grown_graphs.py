"""The picture of a graph shows its heads and MLPs, and what flows between them is what the edges of their paths say."""

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from attribution.errors import InvalidArgument, OutOfRange
from attribution.graph import Graph
from attribution.nodes import Node
from attribution.plots import graph_map, head_map


def grown() -> Graph:
    """Head 1.5 feeds the answer and both branches of the MLP of layer 2, whose scores add up; head 0.3 its q and k."""
    graph = Graph(1, 8, current=False)
    answer = graph.add_node(Node.of(graph, 3, 0, "lm_head"))
    branches = [graph.add_node(Node.of(graph, 2, 6, name), [answer], [4.0]) for name in ("mlp_i", "mlp_g")]
    for name in ("attn_q", "attn_k", "attn_v"):
        graph.add_node(Node.of(graph, 1, 5, name), [answer, *branches], [1.0, 0.5, -2.0])
    q, k = graph.node(1, 5, "attn_q"), graph.node(1, 5, "attn_k")
    graph.add_node(Node.of(graph, 0, 3, "attn_v"), [q, k], [0.25, 0.5])
    return graph


def drawn(figure: Figure) -> tuple[dict[str, tuple[float, float]], dict[tuple[str, str], float], str]:
    """Where the boxes are, the widths of the edges between them, and what is said below."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.texts]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    ends = [[names[int(one)] for one in str(arrow.get_gid()).split("-")] for arrow in arrows]
    widths = {(a, b): arrow.get_linewidth() for (a, b), arrow in zip(ends, arrows, strict=True)}
    return {text.get_text(): text.get_position() for text in axes.texts}, widths, axes.get_xlabel()


def test_the_paths_of_a_head_are_one_node_and_their_scores_count_once_for_each_path_that_they_feed():
    figure = graph_map(grown(), "t")
    places, widths, below = drawn(figure)
    assert [places[name][1] for name in ("0.3", "1.5", "MLP 2", "answer")] == [0, 1, 2, 3]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["layer 0", "layer 1", "MLP 2", "output"]
    # of 4, which is 7 points: 0.25 + 0.5, and 0.5 − 2
    expected = {("MLP 2", "answer"): 4, ("1.5", "answer"): 1, ("1.5", "MLP 2"): 1.5, ("0.3", "1.5"): 0.75}
    assert widths == pytest.approx({edge: 7 * size / 4 for edge, size in expected.items()})
    assert below == ""


def test_of_many_edges_the_largest_are_drawn_and_their_share_is_told():
    _, widths, below = drawn(graph_map(grown(), "t", most=2))
    assert set(widths) == {("MLP 2", "answer"), ("1.5", "MLP 2")}
    assert below == "the 2 largest of 4 edges, 76% of the sum of their sizes"  # 5.5 of 7.25


def test_a_graph_that_no_picture_can_be_made_of_is_refused():
    graph = grown()
    with pytest.raises(OutOfRange, match="most is 0"):
        graph_map(graph, "t", most=0)
    answer = graph.nodes[-1]
    graph.add_node(Node.of(graph, 0, 1, "attn_v"), [answer])
    with pytest.raises(InvalidArgument, match=r"Node\(0, 1, 'attn_v'\) to Node\(3, 0, 'lm_head'\) has no score"):
        graph_map(graph, "t")
    graph.add_node(Node.of(graph, 0, 1, "attn_v"), [answer], [1.0])
    graph.add_node(Node.of(graph, 0, 1, "attn_q"), [answer], [2.0])
    with pytest.raises(InvalidArgument, match=r"the paths of 0\.1 have the scores 2 and 1"):
        graph_map(graph, "t")
    with pytest.raises(InvalidArgument, match="nodes is empty"):
        graph_map(Graph(1, 8, current=False), "t")


def test_a_notebook_can_show_a_picture_without_pyplot():
    assert head_map(torch.eye(3), "t")._repr_png_().startswith(b"\x89PNG")
