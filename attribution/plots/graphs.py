"""A graph of nodes with layers upwards and edges as wide as their scores, and curves over its size."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.plots.style import COLOURS, Picture, limit_of, numbers, readable

PlainNode = tuple[str, int | float, int | float]
"""(label, depth, column): attention of layer ℓ is at depth ℓ, its MLP at ℓ + ½; columns order the nodes of a depth."""

PlainEdge = tuple[int, int, int | float]
"""(from, to, score): two nodes, counted in the list of nodes, and what flows from the one to the other."""

_POSITIVE, _NEGATIVE = COLOURS[0], COLOURS[1]
_WIDEST = 7.0  # points


def graph_picture(
    nodes: Sequence[PlainNode], edges: Sequence[PlainEdge], title: str, *, unit: str = "attribution (nats)"
) -> Figure:
    """Nodes with their layers upwards; an edge is as wide as its score is large, blue when positive, orange when not.

    Args:
        nodes: one row per depth that occurs, in the order of their columns.
        edges: each goes upwards.
        unit: what the scores mean.

    Raises:
        InvalidArgument: there is no node, or an edge does not go upwards (in a cycle at least one does not).
        OutOfRange: an edge names a node that there is not.
    """
    numbers("nodes", [(depth, column) for _, depth, column in nodes])
    for source, target, _ in edges:
        checks.in_range("edges", source, len(nodes), "the nodes")
        checks.in_range("edges", target, len(nodes), "the nodes")
        if nodes[source][1] >= nodes[target][1]:
            raise InvalidArgument(
                f"the edge from {nodes[source][0]!r} (depth {nodes[source][1]:g}) to {nodes[target][0]!r} (depth "
                f"{nodes[target][1]:g}) does not go upwards; edges lead from upstream to downstream",
                param="edges",
            )
    places, depths, widest = _places(nodes)
    size = (min(24.0, max(6.5, 3.0 + 0.95 * widest)), min(30.0, 2.0 + 0.75 * len(depths)))
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.subplots()
    if edges:
        _draw_edges(axes, places, edges, unit)
    for (label, *_), (x, y) in zip(nodes, places, strict=True):
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "black", "linewidth": 0.8}
        font = max(5.0, min(9.0, 9 * 20 / (widest + 1)))
        axes.text(x, y, readable(label).replace("·", " "), ha="center", va="center", fontsize=font, bbox=box, zorder=3)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(
        xlim=(-0.9, widest - 0.1), ylim=(-0.6, len(depths) - 0.4), ylabel="depth (layer; its MLP at ½)", title=title
    )
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _places(nodes: Sequence[PlainNode]) -> tuple[list[tuple[float, float]], list[int | float], int]:
    """Where each node goes (a row per depth, centred, evenly spaced), the depths, and the length of the widest row."""
    rows: dict[int | float, list[int]] = defaultdict(list)
    for number, (_, depth, _) in enumerate(nodes):
        rows[depth].append(number)
    widest, depths = max(len(row) for row in rows.values()), sorted(rows)
    places = {}
    for height, depth in enumerate(depths):
        ordered = sorted(rows[depth], key=lambda number: nodes[number][2])
        room = widest / len(ordered)
        places |= {number: ((i + 0.5) * room - 0.5, float(height)) for i, number in enumerate(ordered)}
    return [places[number] for number in range(len(nodes))], depths, widest


def _draw_edges(axes: Axes, places: Sequence[tuple[float, float]], edges: Sequence[PlainEdge], unit: str) -> None:
    largest = limit_of(numbers("edges", [score for *_, score in edges]))
    for source, target, score in sorted(edges, key=lambda edge: abs(edge[2])):
        (x, low), (to_x, high) = places[source], places[target]
        # an edge that skips rows swings around the nodes between, by as much however long it is
        bend = 0.0 if high - low == 1 else min(0.2, 1.2 / (high - low)) * (1 if to_x >= x else -1)
        axes.add_patch(
            FancyArrowPatch(
                (x, low),
                (to_x, high),
                arrowstyle="-",
                connectionstyle=f"arc3,rad={bend}",
                linewidth=max(0.3, _WIDEST * abs(score) / largest),
                color=_POSITIVE if score >= 0 else _NEGATIVE,
                alpha=0.55,
                zorder=1,
                gid=f"{source}-{target}",
            )
        )
    signs = [_POSITIVE] if all(score >= 0 for *_, score in edges) else [_POSITIVE, _NEGATIVE]
    samples = [(share, colour) for colour in signs for share in (1, 0.25)]
    lines = [Line2D([], [], linewidth=_WIDEST * share, color=colour, alpha=0.55) for share, colour in samples]
    texts = [f"{share * largest * (1 if colour == _POSITIVE else -1):.2g}" for share, colour in samples]
    axes.legend(lines, texts, title=unit, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelspacing=0.9)


def curves(
    x: Sequence[int | float],
    ys: Mapping[str, Sequence[int | float] | Sequence[Sequence[int | float]]],
    title: str,
    *,
    x_label: str = "heads kept",
    y_label: str = "share of the log-probability kept",
) -> Figure:
    """Curves over a common axis, such as completeness over steps, or faithfulness over the size of a graph.

    Args:
        ys: per label one value per x; or several runs of them, `[runs, len(x)]`, drawn as their mean in a band from the
            smallest to the largest.

    Raises:
        InvalidArgument: there is no curve, or a value is not finite.
        ShapeMismatch: a curve has not one value per x.
    """
    at = numbers("x", x)
    if not ys:
        raise InvalidArgument("ys is empty; there is nothing to draw", param="ys")
    figure = Picture(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, values) in enumerate(ys.items()):
        runs = np.atleast_2d(numbers("ys", values))
        if runs.shape[1:] != at.shape:
            raise checks.mismatch("ys", f"the shape {list(runs.shape)} for {label!r}", f"[runs, {len(at)}], as x")
        colour = COLOURS[number % len(COLOURS)]
        style, marker = ("-", "--", ":")[number // len(COLOURS) % 3], "osD^v<>"[number % len(COLOURS)]
        axes.plot(at, runs.mean(0), style, color=colour, marker=marker, markersize=4, label=label.replace("$", r"\$"))
        if len(runs) > 1:
            axes.fill_between(at, runs.min(0), runs.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
