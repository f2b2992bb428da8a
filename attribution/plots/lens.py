"""The logit lens as a picture: the most likely token at every layer and position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attribution.errors import InvalidArgument
from attribution.plots.style import AMOUNT, bare, limit_of, numbers, shortened

_LABELS = {"probability": "probability", "kl": "KL of the final (nats)"}


@dataclass(frozen=True)
class _Cells:
    """What is drawn: a row per layer, upwards. `same`: whether the final stream gives the same token."""

    layers: list[str]
    positions: list[str]
    tokens: list[list[str]]
    same: list[list[bool]]
    values: np.ndarray


def lens_map(
    result: Mapping[str, Any],
    title: str | None = None,
    *,
    colour: str = "probability",
    most_positions: int = 24,
) -> Figure:
    """The most likely token at every layer (upwards) and position (to the right), as `lens` returned it.

    Layer ℓ is the stream entering it. Below each column stands the token that is read there. A token that the final
    stream gives too is set in bold.

    Args:
        title: None names the model.
        colour: what the colours mean: "probability" of the token, or "kl", the divergence of the final distribution.
        most_positions: of more positions the last ones are drawn; the label of the axis says so.

    Raises:
        InvalidArgument: it is no result of `lens`, or an argument is none of these.
    """
    if colour not in _LABELS:
        raise InvalidArgument(f"colour is one of {', '.join(_LABELS)}; found {colour!r}", param="colour")
    if most_positions < 1:
        raise InvalidArgument(f"most_positions is {most_positions}; at least one is drawn", param="most_positions")
    cells, count = _cells(result, colour, most_positions)
    rows, columns = cells.values.shape
    figure = Figure(figsize=(max(4.0, 2.2 + 0.78 * columns), max(2.8, 1.5 + 0.32 * rows)), layout="constrained")
    axes = figure.subplots()
    limit = 1.0 if colour == "probability" else limit_of(cells.values)
    image = axes.imshow(cells.values, cmap=AMOUNT, vmin=0, vmax=limit, origin="lower", aspect="auto")
    axes.set_yticks(range(rows), cells.layers, fontsize=8)
    axes.set_xticks(range(columns), cells.positions, fontsize=8)
    some = f" (the last {columns} of {count} positions)" if columns < count else ""
    axes.set(xlabel=f"token that is read{some}", ylabel="layer")
    axes.set_title(title or f"logit lens of {result['model_id']}", fontsize=11)
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    bare(axes)
    _write(axes, cells, limit)
    figure.colorbar(image, ax=axes, label=_LABELS[colour], fraction=0.04, pad=0.02, aspect=30)
    return figure


def _cells(result: Mapping[str, Any], colour: str, most: int) -> tuple[_Cells, int]:
    """What is drawn of a result, and how many positions it has in all."""
    try:
        layers, positions, last = result["layers"], result["positions"][-most:], result["n_layers"]
        rows = [row[-most:] for row in result["cells"]]
        best = [[cell["top"][0] for cell in row] for row in rows]
        values = [[cell["kl"] if colour == "kl" else cell["top"][0]["probability"] for cell in row] for row in rows]
        final = [one["token_id"] for one in best[layers.index(last)]] if last in layers else [None] * len(positions)
        return _Cells(
            layers=["final" if layer == last else str(layer) for layer in layers],
            positions=[f"{shortened(result['tokens'][position])}\n{position}" for position in positions],
            tokens=[[shortened(one["token"]) for one in row] for row in best],
            same=[[one["token_id"] == token for one, token in zip(row, final, strict=True)] for row in best],
            values=numbers("cells", values),
        ), len(result["positions"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidArgument(f"this is no result of lens: {error!r}", param="result") from error


def _write(axes: Axes, cells: _Cells, limit: float) -> None:
    """The tokens in their cells, light on dark and dark on light."""
    for (row, column), value in np.ndenumerate(cells.values):
        axes.text(
            column,
            row,
            cells.tokens[row][column],
            ha="center",
            va="center",
            color="white" if value < 0.6 * limit else "black",
            fontsize=8,
            fontweight="bold" if cells.same[row][column] else "normal",
        )
