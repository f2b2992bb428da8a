"""A graph of nodes with layers upwards and edges as wide as their scores, and curves over its size."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from attribution import checks
from attribution.errors import InvalidArgument, OutOfRange
from attribution.graph import Graph
from attribution.nodes import Node
from attribution.plots.style import COLOURS, Picture, limit_of, numbers, readable

PlainNode = tuple[str, int | float, int | float]
"""(label, depth, column): attention of layer ℓ is at depth ℓ, its MLP at ℓ + ½; columns order the nodes of a depth."""

PlainEdge = tuple[int, int, int | float]
"""(from, to, score): two nodes, counted in the list of nodes, and what flows from the one to the other."""

_POSITIVE, _NEGATIVE = COLOURS[0], COLOURS[1]
_WIDEST = 7.0  # points
_LETTER = 0.095  # inches that a letter of the title takes


def graph_map(graph: Graph, title: str, *, most: int = 40, unit: str = "attribution (nats)") -> Figure:
    """The heads and MLPs of a graph and what flows between them, as `graph_picture` draws it.

    The paths of a head (q, k, v) are one node here, as are the branches of an MLP. The score of an edge from A to B is
    the sum over the paths of B of what A adds through each of them: all that A adds to the objective through B next.

    Args:
        graph: its edges have scores, as `Graph.expand` gives them.
        most: how many edges are drawn, the greatest by size; what share they hold is said below.

    Raises:
        InvalidArgument: there is no node or no score, or the paths of a head have different scores to one node.
        OutOfRange: `most` is below 1.
    """
    if most < 1:
        raise OutOfRange(f"most is {most}; at least one edge is drawn", param="most")
    parts = list(dict.fromkeys(_part(node) for node in graph.nodes))
    number = {part: at for at, part in enumerate(parts)}
    flows = sorted(_flows(graph).items(), key=lambda flow: -abs(flow[1]))
    edges = [(number[source], number[target], score) for (source, target), score in flows[:most]]
    rows = {depth: _row(label, depth) for label, depth, _ in parts}
    figure = graph_picture(parts, edges, title, unit=unit, rows=rows)
    if len(flows) > most:
        share = sum(abs(score) for _, score in flows[:most]) / sum(abs(score) for _, score in flows)
        figure.axes[0].set_xlabel(f"the {most} largest of {len(flows)} edges, {share:.0%} of the sum of their sizes")
    return figure


def _part(node: Node) -> PlainNode:
    """The head or MLP that a node is a path of."""
    if node.type == "lm_head":
        return "answer", node.depth, 0
    mlp = node.type.startswith("mlp")
    return f"MLP {node.layer}" if mlp else f"{node.layer}.{node.head}", node.depth, node.head


def _row(label: str, depth: float) -> str:
    return "output" if label == "answer" else f"MLP {int(depth)}" if label.startswith("MLP") else f"layer {int(depth)}"


def _flows(graph: Graph) -> dict[tuple[PlainNode, PlainNode], float]:
    """What each head and MLP adds through each that it feeds."""
    through: dict[tuple[PlainNode, Node], float] = {}
    for source, target in graph.edges:
        score = graph.score(source, target)
        if score is None:
            raise InvalidArgument(
                f"the edge from {source} to {target} has no score; g.add_node(node, downstream, scores) gives it one, "
                "as g.expand does",
                param="graph",
            )
        known = through.setdefault((_part(source), target), score)
        if known != score:
            raise InvalidArgument(
                f"the paths of {_part(source)[0]} have the scores {known:g} and {score:g} to {target}; one node stands "
                "for them here: graph_picture draws nodes and edges as you choose them",
                param="graph",
            )
    flows: dict[tuple[PlainNode, PlainNode], float] = defaultdict(float)
    for (source, target), score in through.items():
        flows[source, _part(target)] += score
    return flows


def graph_picture(
    nodes: Sequence[PlainNode],
    edges: Sequence[PlainEdge],
    title: str,
    *,
    unit: str = "attribution (nats)",
    rows: Mapping[float, str] | None = None,
) -> Figure:
    """Nodes with their layers upwards; an edge is as wide as its score is large, blue when positive, orange when not.

    Args:
        nodes: one row per depth that occurs, in the order of their columns.
        edges: each goes upwards.
        unit: what the scores mean.
        rows: what is written beside the rows, by their depth; None is the depths.

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
    width = max(6.5, 3.0 + 0.95 * widest, 1.0 + _LETTER * len(title))
    size = (min(24.0, width), min(30.0, 2.0 + 0.75 * len(depths)))
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.subplots()
    if edges:
        _draw_edges(axes, places, edges, unit)
    for (label, *_), (x, y) in zip(nodes, places, strict=True):
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "black", "linewidth": 0.8}
        font = max(5.0, min(9.0, 9 * 20 / (widest + 1)))
        axes.text(x, y, readable(label).replace("·", " "), ha="center", va="center", fontsize=font, bbox=box, zorder=3)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" if rows is None else rows[depth] for depth in depths])
    axes.set(xlim=(-0.9, widest - 0.1), ylim=(-0.6, len(depths) - 0.4))
    figure.suptitle(title)
    axes.set_ylabel("depth (layer; its MLP at ½)" if rows is None else "")
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
                linewidth=_width(score, largest),
                color=_colour(score),
                alpha=0.55,
                zorder=1,
                gid=f"{source}-{target}",
            )
        )
    greatest, least = max(score for *_, score in edges), min(score for *_, score in edges)
    samples = [greatest, greatest / 4] if greatest >= 0 else []
    samples += [least] if least < 0 else []
    lines = [Line2D([], [], color=_colour(one), linewidth=_width(one, largest), alpha=0.55) for one in samples]
    texts = [f"{one:.2g}" for one in samples]
    axes.legend(lines, texts, title=unit, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelspacing=0.9)


def _width(score: float, largest: float) -> float:
    return max(0.3, _WIDEST * abs(score) / largest)


def _colour(score: float) -> str:
    return _POSITIVE if score >= 0 else _NEGATIVE


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
