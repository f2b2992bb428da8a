"""A picture of a circuit: what of it is drawn, and where."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import FancyBboxPatch

from attribution.errors import InvalidArgument, OutOfRange
from attribution.plots import plot_circuit


def node(name: str, layer: str, at: int, kind: str, **more: Any) -> dict[str, Any]:
    return {"node_id": name, "layer": layer, "ctx_idx": at, "feature_type": kind, "clerp": ""} | more


# b and the error share what reaches the logit 3 : 1; a reaches b with 2 of 4, the token the rest
GRAPH: dict[str, Any] = {
    "metadata": {"scan": "tiny", "prompt_tokens": ["The", " $cat", " sat"]},
    "nodes": [
        node("E_1_0", "E", 0, "embedding", influence=0.5),
        node("E_2_1", "E", 1, "embedding", influence=0.6),
        node("0_7_1", "0", 1, "cross layer transcoder", influence=0.3, clerp="on animals"),
        node("1_9_2", "1", 2, "cross layer transcoder", influence=0.1, clerp=""),
        node("1_-1_2", "1", 2, "mlp reconstruction error", influence=0.4),
        node("3_5_2", "3", 2, "logit", influence=None, token_prob=0.8, clerp='Output " on" (p=0.800)'),
    ],
    "links": [
        {"source": "1_9_2", "target": "3_5_2", "weight": 3.0},
        {"source": "1_-1_2", "target": "3_5_2", "weight": -1.0},
        {"source": "0_7_1", "target": "1_9_2", "weight": 2.0},
        {"source": "E_1_0", "target": "1_9_2", "weight": -2.0},
        {"source": "E_2_1", "target": "0_7_1", "weight": 5.0},
    ],
}


def texts(graph: dict[str, Any] = GRAPH, **options: Any) -> list[str]:
    (axes,) = plot_circuit(graph, **options).axes
    return [text.get_text() for text in axes.texts]


def test_tokens_features_errors_and_logits_are_drawn_with_their_edges():
    figure = plot_circuit(GRAPH)
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {
        "The\n0",
        r"·\$cat" + "\n1",
        "7 on animals",
        "9",
        "error",
        '" on" (p=0.800)',
    }
    assert len(axes.lines) == 5
    assert sum(isinstance(patch, FancyBboxPatch) for patch in axes.patches) == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tokens", "layer 0", "layer 1", "logits"]
    assert axes.get_title() == 'tiny: where " on" (p=0.800) comes from'


def test_rows_go_up_with_the_layers_and_columns_right_with_the_positions():
    (axes,) = plot_circuit(GRAPH).axes
    at = {text.get_text().split("\n")[0]: text.get_position() for text in axes.texts}
    assert at["7 on animals"][0] == pytest.approx(at[r"·\$cat"][0])
    assert at["The"][0] < at["7 on animals"][0] < at["9"][0]
    assert at["The"][1] < at["7 on animals"][1] < at["9"][1] < at['" on" (p=0.800)'][1]


def test_an_edge_is_as_wide_as_its_share_of_a_target_times_the_influence_of_the_target():
    # scores: b → logit 0.8 · 3/4 = 0.6, error 0.2, a → b 0.6 · 1/2 = 0.3, token 0 → b 0.3, token 1 → a 0.3
    (axes,) = plot_circuit(GRAPH).axes
    widths = sorted(round((float(line.get_linewidth()) - 0.3) ** 2, 6) for line in axes.lines)
    assert [width / widths[-1] for width in widths] == pytest.approx([0.2 / 0.6, 0.5, 0.5, 0.5, 1.0], rel=1e-4)
    colours = [str(line.get_color()) for line in axes.lines]
    assert sorted(map(colours.count, set(colours))) == [2, 3]


def test_the_strongest_edges_into_what_is_drawn_come_first():
    assert set(texts(most_edges=1)) == {"9", '" on" (p=0.800)'}
    assert "error" not in texts(most_edges=3)
    assert set(texts(most_features=1)) == {"9", "The\n0", '" on" (p=0.800)'}
    assert "the 3 strongest of 5 edges" in plot_circuit(GRAPH, most_edges=3).axes[0].get_xlabel()


def test_a_picture_is_saved_where_asked(tmp_path: Path):
    plot_circuit(GRAPH, tmp_path / "circuit.png", title="mine")
    assert (tmp_path / "circuit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("graph", "options", "error", "said"),
    [
        ({"nodes": []}, {}, InvalidArgument, "no graph of a circuit"),
        (GRAPH | {"links": []}, {}, InvalidArgument, "nothing to draw"),
        (
            GRAPH | {"links": [{"source": "E_1_0", "target": "3_5_2", "weight": float("nan")}]},
            {},
            InvalidArgument,
            "NaN",
        ),
        (GRAPH, {"most_features": 0}, OutOfRange, "most_features is 0"),
        (GRAPH, {"most_edges": 0}, OutOfRange, "most_edges is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(graph: Any, options: dict[str, int], error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        plot_circuit(graph, **options)
