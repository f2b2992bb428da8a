"""Heat maps: scores of heads and MLPs, and the pattern of a head beside its attribution."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.plots.style import AMOUNT, SIGNED, Picture, bare, every, limit_of, numbers, readable

_TICKS = 32  # more than these do not fit side by side


def head_map(
    scores: Float[Tensor, "layer column"], title: str, *, unit: str = "attribution (nats)", marked: int = 0
) -> Figure:
    """A heat map of one score per head and MLP: layers upwards, heads to the right, the MLP in a column of its own.

    Args:
        scores: `[layers, heads + 1]`, the MLP last, as `attribute_residual` gives it for one node.
        unit: what the colours mean.
        marked: how many of the highest scores are framed; where there is room the value is written into the cell.

    Raises:
        InvalidArgument: a score is not finite.
    """
    values = numbers("scores", scores)
    layers, columns = values.shape
    spread = np.insert(values, columns - 1, np.nan, axis=1)  # a gap before the MLPs
    width, height = min(0.55, 14 / (columns + 1)), min(0.5, 12 / layers)
    figure = Picture(
        figsize=(max(4.0, 1.6 + width * (columns + 1)), max(2.6, 1.4 + height * layers)), layout="constrained"
    )
    axes = figure.subplots()
    limit = limit_of(values)
    image = axes.imshow(spread, cmap=SIGNED, vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    heads, rows = range(0, columns - 1, every(columns - 1, _TICKS)), range(0, layers, every(layers, _TICKS))
    axes.set_xticks([*heads, columns], [*(str(head) for head in heads), "MLP"])
    axes.set_yticks(rows, [str(layer) for layer in rows])
    axes.set(xlabel="head", ylabel="layer", title=title)
    bare(axes)
    written = min(width, height) > 0.35
    _mark(axes, values, np.argsort(values, axis=None)[::-1][:marked], limit if written else None)
    figure.colorbar(image, ax=axes, label=unit, fraction=0.05, pad=0.02, aspect=30)
    return figure


def _mark(axes: Axes, values: np.ndarray, cells: np.ndarray, limit: float | None) -> None:
    """Frame cells, and write their values where a limit of the colours is given."""
    last = values.shape[1] - 1
    for layer, column in zip(*np.unravel_index(cells, values.shape), strict=True):
        at, value = column + (column == last), values[layer, column]
        if limit is None:
            axes.plot(at, layer, marker="s", markersize=7, markerfacecolor="none", markeredgecolor="black")
        else:
            colour = "white" if abs(value) > 0.6 * limit else "black"
            text = f"{value:.1f}" if limit >= 1 else f"{value:.2g}"
            axes.text(at, layer, text, ha="center", va="center", color=colour, fontsize=8)


def pattern_map(
    aw: Float[Tensor, "query key"],
    aa: Float[Tensor, "query key"],
    tokens: Sequence[str],
    title: str,
    *,
    queries: Sequence[int] | None = None,
    most_keys: int = 40,
    unit: str = "attribution (nats)",
) -> Figure:
    """The pattern of a head and its attribution side by side, with the tokens of the sample on both axes.

    Args:
        aw: attention, as from `attribute_attn_weights`.
        aa: its attribution; negative values (`signed=True`) are drawn in blue.
        tokens: one per key.
        queries: positions of the rows among the tokens; None when they are all positions.
        most_keys: of more keys only these many are drawn, those with the most attention and attribution; the labels of
            the axes say what share of it they hold.

    Raises:
        InvalidArgument, OutOfRange, ShapeMismatch: naming the argument.
    """
    weights, scores = numbers("aw", aw), numbers("aa", aa)
    rows = list(range(len(weights)) if queries is None else queries)
    check_pattern(weights, scores, tokens, rows)
    if most_keys < 1:
        raise InvalidArgument(f"most_keys is {most_keys}; at least one is drawn", param="most_keys")
    keys = _most(weights, scores, most_keys)
    size = (3.4 + 0.36 * len(keys), max(3.0, 1.8 + 0.2 * min(len(rows), 50)))
    figure = Picture(figsize=(min(20.0, size[0]), size[1]), layout="constrained")
    limit, signed = limit_of(scores), bool((scores < 0).any())
    scales = {"cmap": SIGNED, "vmin": -limit, "vmax": limit} if signed else {"cmap": AMOUNT, "vmin": 0, "vmax": limit}
    drawn = [("attention", weights, "attention (share of a query)", {"cmap": AMOUNT, "vmin": 0, "vmax": 1})]
    drawn += [("attribution", scores, unit, scales)]
    for axes, (name, values, label, scale) in zip(figure.subplots(1, 2, sharey=True), drawn, strict=True):
        image = axes.imshow(values[:, keys], aspect="auto", interpolation="nearest", **scale)
        share = np.abs(values[:, keys]).sum() / (np.abs(values).sum() or 1)
        some = f" ({len(keys)} of {len(tokens)}, {share:.0%} of the sum)" if len(keys) < len(tokens) else ""
        axes.set(title=name, xlabel=f"key{some}")
        axes.set_xticks(range(len(keys)), [_label(tokens, key) for key in keys], rotation=90, fontsize=7)
        gap = every(len(rows), 50)
        axes.set_yticks(range(0, len(rows), gap), [_label(tokens, row) for row in rows[::gap]], fontsize=7)
        figure.colorbar(image, ax=axes, label=label)
    figure.axes[0].set_ylabel("query")
    figure.suptitle(title)
    return figure


def _label(tokens: Sequence[str], position: int) -> str:
    return f"{readable(tokens[position])} {position}"


def _most(weights: np.ndarray, scores: np.ndarray, most: int) -> list[int]:
    """The keys with the most attention and attribution, in their order."""
    total = np.abs(weights).sum(0) / limit_of(weights.sum(0)) + np.abs(scores).sum(0) / limit_of(np.abs(scores).sum(0))
    return sorted(np.argsort(-total, kind="stable")[:most].tolist())


def check_pattern(weights: np.ndarray, scores: np.ndarray, tokens: Sequence[str], rows: list[int]) -> None:
    """Raises ShapeMismatch or OutOfRange when attention, attribution, tokens and positions do not fit each other."""
    if scores.shape != weights.shape:
        raise checks.mismatch("aa", f"the shape {list(scores.shape)}", f"{list(weights.shape)}, as aw")
    if len(tokens) != weights.shape[1]:
        raise checks.mismatch("tokens", f"{len(tokens)} entries", f"{weights.shape[1]}, one per key")
    if len(rows) != len(weights):
        raise checks.mismatch("queries", f"{len(rows)} entries", f"{len(weights)}, one per row")
    for row in rows:
        checks.in_range("queries", row, len(tokens), "the positions of the tokens")
