"""A circuit as a picture: tokens at the bottom, logits at the top, features between them by layer and position."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from attribution.errors import InvalidArgument, OutOfRange
from attribution.plots.style import COLOURS, Picture, bare, numbers, readable

_POSITIVE, _NEGATIVE = COLOURS[0], COLOURS[1]
_FILLS = {
    "cross layer transcoder": "#e8f1f8",
    "mlp reconstruction error": "#eeeeee",
    "embedding": "#fff6e0",
    "logit": "#e6f4ee",
}
_WRAP = 30  # letters of a line of a label
_IN_A_LINE = 4  # nodes of one layer and position
_INTO_LOGIT, _INTO_FEATURE = 12, 4  # edges into one node
_LETTER, _LINE, _GAP, _BETWEEN = 0.062, 0.125, 0.1, 0.5  # inches: a letter, a line, two boxes, two rows or columns
_WIDEST = 4.5  # points


@dataclass(frozen=True)
class _Box:
    """A node as it is drawn: its middle and sizes in inches."""

    text: str
    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class _Edge:
    """An edge with its score."""

    source: str
    target: str
    positive: bool
    score: float


def plot_circuit(
    graph: Mapping[str, Any],
    path: Path | str | None = None,
    *,
    title: str | None = None,
    most_features: int = 30,
    most_edges: int = 80,
) -> Picture:
    """A graph as `trace_circuit`, circuit-tracer or Neuronpedia gives it.

    Rows are layers, columns token positions (those alone at which something is drawn). An edge is as wide as the share
    of its target that it has times the target's influence on the logits, blue when positive, orange when not. A feature
    is its index and its description.

    Args:
        path: where to save it as well.
        title: None names the model and the prompt's end.
        most_features: how many features and errors are drawn.
        most_edges: how many edges are drawn: from the logits on, always the strongest one into what is drawn so far.

    Raises:
        InvalidArgument: it is no such graph, or there is nothing to draw.
        OutOfRange: less than one feature or edge is to be drawn.
    """
    for name, value in (("most_features", most_features), ("most_edges", most_edges)):
        if value < 1:
            raise OutOfRange(f"{name} is {value}; at least one is drawn", param=name)
    try:
        nodes, edges = _chosen(graph, most_features, most_edges)
        tokens, known = graph["metadata"]["prompt_tokens"], len(graph["links"])
        heading = title or _title(graph)
        boxes, size = _laid_out(nodes, tokens)
        rows = _rows(nodes, boxes)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"this is no graph of a circuit: {error!r}", param="graph") from error
    figure = Picture(figsize=(size[0] + 1.1, size[1] + 1.1), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]), xticks=[])
    axes.set_yticks(list(rows.values()), list(rows), fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(heading, fontsize=10)
    some = f"; the {len(edges)} strongest of {known} edges" if len(edges) < known else ""
    axes.set_xlabel(f"token positions, from left to right{some}", fontsize=8)
    bare(axes)
    _draw(axes, boxes, edges)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _title(graph: Mapping[str, Any]) -> str:
    logits = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    said = _spaced(logits[0]["clerp"].removeprefix("Output ")) if logits else "the next token"
    return f"{graph['metadata']['scan']}: where {said} comes from"


def _chosen(graph: Mapping[str, Any], most_features: int, most_edges: int) -> tuple[list[dict], list[_Edge]]:
    """The nodes and edges that are drawn: from the logits on, always the strongest edge into what is drawn so far."""
    into: dict[str, list[_Edge]] = defaultdict(list)
    for edge in sorted(_scored(graph), key=lambda edge: -edge.score):
        into[edge.target].append(edge)
    kinds = {node["node_id"]: node["feature_type"] for node in graph["nodes"]}
    drawn = {name for name, kind in kinds.items() if kind == "logit"}
    waiting = [edge for name in drawn for edge in into[name][:_INTO_LOGIT]]
    edges, inner = [], 0
    while waiting and len(edges) < most_edges:
        waiting.sort(key=lambda edge: edge.score)
        edge = waiting.pop()
        if edge.source not in drawn:
            if kinds[edge.source] != "embedding":
                if inner == most_features:
                    continue
                inner += 1
            drawn.add(edge.source)
            waiting += into[edge.source][:_INTO_FEATURE]
        edges.append(edge)
    if not edges:
        raise InvalidArgument("the graph has no edge that leads to a logit; there is nothing to draw", param="graph")
    ends = {end for edge in edges for end in (edge.source, edge.target)}
    return [node for node in graph["nodes"] if node["node_id"] in ends], edges


def _scored(graph: Mapping[str, Any]) -> list[_Edge]:
    """All edges: the share of what reaches the target that an edge has, times the target's influence on the logits."""
    into: dict[str, list[dict]] = defaultdict(list)
    numbers("links", [link["weight"] for link in graph["links"]] or [0.0])
    for link in graph["links"]:
        into[link["target"]].append(link)
    nodes = sorted(graph["nodes"], key=_depth, reverse=True)
    influence: dict[str, float] = defaultdict(float)
    influence.update({node["node_id"]: node["token_prob"] for node in nodes if node["feature_type"] == "logit"})
    edges = []
    for node in nodes:
        links = into[node["node_id"]]
        whole = sum(abs(link["weight"]) for link in links) or 1.0
        for link in links:
            score = influence[node["node_id"]] * abs(link["weight"]) / whole
            influence[link["source"]] += score
            edges.append(_Edge(link["source"], link["target"], link["weight"] > 0, score))
    return edges


def _row(node: Mapping[str, Any]) -> str:
    kind = node["feature_type"]
    return {"embedding": "tokens", "logit": "logits"}.get(kind, f"layer {node['layer']}")


def _rows(nodes: list[dict], boxes: Mapping[str, _Box]) -> dict[str, float]:
    """The middle of each row."""
    heights: dict[str, list[float]] = defaultdict(list)
    for node in nodes:
        heights[_row(node)].append(boxes[node["node_id"]].y)
    return {row: (min(found) + max(found)) / 2 for row, found in heights.items()}


def _depth(node: Mapping[str, Any]) -> float:
    return {"embedding": -1.0, "logit": float("inf")}.get(node["feature_type"]) or float(node["layer"])


def _label(node: Mapping[str, Any], tokens: list[str]) -> str:
    kind, at = node["feature_type"], node["ctx_idx"]
    if kind == "embedding":
        return f"{readable(tokens[at])}\n{at}"
    if kind == "mlp reconstruction error":
        return "error"
    if kind == "logit":
        return _spaced(node["clerp"].removeprefix("Output "))
    index = node["node_id"].split("_")[1]
    said = _spaced(node["clerp"]) if node["clerp"] else ""
    return "\n".join(textwrap.wrap(f"{index} {said}".strip(), _WRAP))


def _spaced(text: str) -> str:
    """A readable text whose blanks stay blanks."""
    return readable(text).replace("·", " ").strip()


def _laid_out(nodes: list[dict], tokens: list[str]) -> tuple[dict[str, _Box], tuple[float, float]]:
    """Boxes by node: the cell of a row and a column holds its nodes in lines of a few."""
    cells: dict[tuple[float, int], list[list[_Box]]] = defaultdict(list)
    names: dict[int, str] = {}
    for node in nodes:
        label, lines = _label(node, tokens), cells[_depth(node), node["ctx_idx"]]
        width = max(map(len, label.split("\n"))) * _LETTER + 2 * _GAP
        box = _Box(label, node["feature_type"], 0.0, 0.0, width, (label.count("\n") + 1) * _LINE + _GAP)
        if not lines or len(lines[-1]) == _IN_A_LINE:
            lines.append([])
        lines[-1].append(box)
        names[id(box)] = node["node_id"]
    heights: dict[float, float] = defaultdict(float)
    widths: dict[int, float] = defaultdict(float)
    for (depth, at), lines in cells.items():
        heights[depth] = max(heights[depth], sum(map(_tall, lines)))
        widths[at] = max(widths[at], *(_wide(line) for line in lines))
    lefts, width = _offsets(widths, _GAP * 2)
    bottoms, height = _offsets(heights, _BETWEEN)
    boxes = {}
    for (depth, at), lines in cells.items():
        y = bottoms[depth] + (heights[depth] - sum(map(_tall, lines))) / 2
        for line in lines:
            x, y = lefts[at] + (widths[at] - _wide(line)) / 2, y + _tall(line)
            for box in line:
                boxes[names[id(box)]] = replace(box, x=x + _GAP / 2 + box.width / 2, y=y - _tall(line) / 2)
                x += box.width + _GAP
    return boxes, (width, height)


def _tall(line: list[_Box]) -> float:
    return max(box.height for box in line) + 2 * _GAP


def _wide(line: list[_Box]) -> float:
    return sum(box.width + _GAP for box in line)


def _offsets(sizes: Mapping[Any, float], gap: float) -> tuple[dict[Any, float], float]:
    """Where each begins when they stand in order with gaps between them, and where the last gap ends."""
    found, at = {}, gap / 2
    for one in sorted(sizes):
        found[one] = at
        at += sizes[one] + gap
    return found, at


def _draw(axes: Axes, boxes: Mapping[str, _Box], edges: list[_Edge]) -> None:
    limit = max(edge.score for edge in edges) or 1.0
    for edge in reversed(edges):
        source, target = boxes[edge.source], boxes[edge.target]
        share = (edge.score / limit) ** 0.5
        axes.add_line(
            Line2D(
                [source.x, target.x],
                [source.y + source.height / 2, target.y - target.height / 2],
                color=_POSITIVE if edge.positive else _NEGATIVE,
                linewidth=0.3 + _WIDEST * share,
                alpha=0.2 + 0.5 * share,
                solid_capstyle="round",
                zorder=1,
            )
        )
    for box in boxes.values():
        corner = (box.x - box.width / 2, box.y - box.height / 2)
        style = {"facecolor": _FILLS[box.kind], "edgecolor": "#888888", "linewidth": 0.6, "zorder": 2}
        axes.add_patch(FancyBboxPatch(corner, box.width, box.height, "round,pad=0,rounding_size=0.05", **style))
        axes.text(box.x, box.y, box.text, ha="center", va="center", fontsize=7, zorder=3, linespacing=1.1)
