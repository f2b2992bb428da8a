"""The heat maps again, to point at and zoom into: plotly figures, with the extra `[plots]`."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from attribution.errors import LibraryMissing
from attribution.plots.maps import check_pattern
from attribution.plots.style import AMOUNT, SIGNED, limit_of, numbers


def interactive_head_map(scores: Float[Tensor, "layer column"], title: str, *, unit: str = "attribution (nats)") -> Any:
    """`head_map` as a plotly `Figure`: pointing at a cell tells layer, head and score.

    Raises:
        InvalidArgument: a score is not finite.
        LibraryMissing: plotly is not installed.
    """
    values = numbers("scores", scores)
    columns = values.shape[1]
    names = [[f"layer {layer}, {_column(one, columns)}" for one in range(columns)] for layer in range(len(values))]
    limit = limit_of(values)
    map_ = _heat(values, names, unit, colorscale=SIGNED, zmin=-limit, zmax=limit)
    figure = _plotly().Figure(map_)
    return figure.update_layout(title=title, xaxis_title="head (the last column: MLP)", yaxis_title="layer")


def interactive_pattern_map(
    aw: Float[Tensor, "query key"],
    aa: Float[Tensor, "query key"],
    tokens: Sequence[str],
    title: str,
    *,
    queries: Sequence[int] | None = None,
    unit: str = "attribution (nats)",
) -> Any:
    """`pattern_map` as a plotly `Figure`, with all keys; pointing at an edge tells both tokens and the value.

    Raises:
        InvalidArgument, OutOfRange, ShapeMismatch: naming the argument.
        LibraryMissing: plotly is not installed.
    """
    weights, scores = numbers("aw", aw), numbers("aa", aa)
    rows = list(range(len(weights)) if queries is None else queries)
    check_pattern(weights, scores, tokens, rows)
    names = [[f"{tokens[row]!r} {row} → {token!r} {key}" for key, token in enumerate(tokens)] for row in rows]
    limit = limit_of(scores)
    signed = {"colorscale": SIGNED, "zmin": -limit} if (scores < 0).any() else {"colorscale": AMOUNT, "zmin": 0}
    maps = {
        "attention": _heat(weights, names, "attention (share of a query)", colorscale=AMOUNT, zmin=0, zmax=1),
        "attribution": _heat(scores, names, unit, **signed, zmax=limit),
    }
    figure = _plotly().Figure()
    for number, one in enumerate(maps.values()):
        figure.add_trace(one.update(visible=number == 0))
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": [name == other for other in maps]}]} for name in maps
    ]
    menu = {"buttons": buttons, "x": 1.0, "xanchor": "right", "y": 1.15}
    figure.update_layout(title=title, xaxis_title="key", yaxis_title="query", updatemenus=[menu])
    return figure.update_yaxes(autorange="reversed")


def _column(column: int, columns: int) -> str:
    return f"head {column}" if column < columns - 1 else "MLP"


def _heat(values: np.ndarray, names: list[list[str]], unit: str, **scale: Any) -> Any:
    hover = "%{text}<br>%{z:.4g}<extra></extra>"
    return _plotly().Heatmap(z=values, text=names, hovertemplate=hover, colorbar={"title": unit}, **scale)


def _plotly() -> Any:
    """plotly.graph_objects; by name, since most have no plotly."""
    try:
        return import_module("plotly.graph_objects")
    except ImportError as error:
        raise LibraryMissing("interactive pictures need plotly: pip install 'sightline[plots]'") from error
