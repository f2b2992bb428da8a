"""Sweeps as pictures: what every cell of a grid changes, or brings back."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.plots.style import COLOURS, SIGNED, bare, every, limit_of, numbers, shortened
from attribution.sweeps import Swept, swept

_UNITS = {"log_prob": "log-probability (nats)", "logit_diff": "logit difference"}
_LAYERS, _COLUMNS = 40, 64  # ticks that fit
_LETTERS = 9  # of a title, per inch
_SEEN = 0.005  # of the greatest effect: what is smaller would be white


def sweep_map(
    result: Mapping[str, Any],
    title: str,
    *,
    tokens: Sequence[str] | None = None,
    metric: str = "log_prob",
    show: str | None = None,
    most_positions: int = 64,
) -> Figure:
    """What `ablate_sweep` or `patch_sweep` found: layers upwards, heads or positions to the right.

    White is no effect. An axis with one entry is not drawn but named below the title; a sweep with one axis is drawn as
    bars.

    Args:
        tokens: those of the sample, to stand at its positions.
        metric: "log_prob" or, of patching, "logit_diff".
        show: "recovery", the share of the clean value that comes back, or "change", from the run in which nothing was
            changed; None is recovery where there is one, else change.
        most_positions: of more positions those with the greatest effects are drawn, and none that has next to none; the
            label of the axis says what the others have at most.

    Raises:
        InvalidArgument: it is no such result, has no such metric or recovery, has more than two axes with several
            entries, or a value is not finite.
        ShapeMismatch: there are fewer tokens than positions.
    """
    found = swept(result, metric)
    values, label = _shown(found, show, metric)
    names = [name for name, axis in found.axes.items() if len(axis) > 1] or ["layer"]
    if len(names) > 2:
        raise InvalidArgument(
            f"result has the axes {', '.join(names)}; two can be drawn: sweep over one layer, as layers=[3]",
            param="result",
        )
    values = values.reshape([len(found.axes[name]) for name in names if name in found.axes] or [values.size])
    fixed = [f"{name} {axis[0]}" for name, axis in found.axes.items() if name not in names]
    title = f"{title}\n({', '.join(fixed)})" if fixed else title
    labels = {name: _labels(name, found.axes.get(name, [0]), tokens) for name in names}
    if len(names) == 1:
        return _bars(values, names[0], labels[names[0]], title, label)
    return _cells(values, names, labels, title, label, most_positions)


def _shown(found: Swept, show: str | None, metric: str) -> tuple[np.ndarray, str]:
    """The values that are drawn, and what they are."""
    if show not in (None, "recovery", "change"):
        raise InvalidArgument(f"show is 'recovery' or 'change'; found {show!r}", param="show")
    if show == "recovery" and found.recovery is None:
        reason = found.note or "an ablation has no clean value to bring back"
        raise InvalidArgument(f"there is no recovery: {reason}; show='change' draws the differences", param="show")
    if show == "change" or found.recovery is None:
        return numbers("result", found.change), f"change of\n{_UNITS[metric]}"
    return numbers("result", found.recovery), f"recovery\nof {_UNITS[metric].split(' (')[0]}"


def _labels(name: str, axis: list[int], tokens: Sequence[str] | None) -> list[str]:
    if name != "position" or tokens is None:
        return [str(one) for one in axis]
    if len(tokens) <= max(axis):
        raise checks.mismatch("tokens", f"{len(tokens)} entries", f"at least {max(axis) + 1}, one per position")
    return [f"{shortened(tokens[one])} {one}" for one in axis]


def _bars(values: np.ndarray, name: str, labels: list[str], title: str, label: str) -> Figure:
    figure = Figure(figsize=(min(14.0, max(5.6, 1.6 + 0.3 * len(values))), 3.0), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(values)), values, color=[COLOURS[1] if value > 0 else COLOURS[0] for value in values])
    axes.axhline(0, color="black", linewidth=0.8)
    _ticks(axes, labels, _COLUMNS, turned=name == "position")
    axes.set(xlabel=name)
    _title(figure, axes, title)
    axes.set_ylabel(label, fontsize=9)
    bare(axes)
    return figure


def _cells(
    values: np.ndarray, names: list[str], labels: dict[str, list[str]], title: str, label: str, most: int
) -> Figure:
    limit, (below, across) = limit_of(values), names
    some, kept = "", list(range(values.shape[1]))
    if across == "position" and values.shape[1] > most:
        kept = _greatest(values, most, limit)
        rest = np.abs(np.delete(values, kept, axis=1)).max()
        some = f" ({len(kept)} of {values.shape[1]}; elsewhere at most {rest:.2g})"
        values, labels = values[:, kept], labels | {across: [labels[across][column] for column in kept]}
    rows, columns = values.shape
    width, height = max(0.24, min(0.5, 12 / columns)), min(0.45, 10 / rows)
    size = (min(18.0, max(5.6, 2.4 + width * columns)), max(2.6, 1.7 + height * rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    _ticks(axes, labels[across], _COLUMNS, turned=across == "position")
    gap = every(rows, _LAYERS)
    axes.set_yticks(range(0, rows, gap), labels[below][::gap], fontsize=8)
    axes.set(xlabel=f"{across}{some}", ylabel=below)
    _title(figure, axes, title)
    bare(axes)
    for column in range(1, columns):
        if kept[column] > kept[column - 1] + 1:
            axes.axvline(column - 0.5, color="white", linewidth=4)  # positions were left out here
    if columns <= 16 and rows <= 24:
        _write(axes, values, limit)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=20).set_label(label, fontsize=9)
    return figure


def _title(figure: Figure, axes: Axes, title: str) -> None:
    """The title in lines that the figure has room for."""
    width = int(figure.get_size_inches()[0] * _LETTERS)
    axes.set_title("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=11)


def _ticks(axes: Axes, labels: list[str], room: int, *, turned: bool) -> None:
    gap = every(len(labels), room)
    axes.set_xticks(range(0, len(labels), gap), labels[::gap], rotation=90 if turned else 0, fontsize=8)


def _greatest(values: np.ndarray, most: int, limit: float) -> list[int]:
    """The columns with the greatest effects in any row, in their order, but for those that would be white."""
    if most < 1:
        raise InvalidArgument(f"most_positions is {most}; at least one is drawn", param="most_positions")
    effects = np.abs(values).max(0)
    greatest, *others = np.argsort(-effects, kind="stable")[:most].tolist()
    return sorted([greatest, *(column for column in others if effects[column] > _SEEN * limit)])


def _write(axes: Axes, values: np.ndarray, limit: float) -> None:
    """The values in their cells, where they do not round to 0."""
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.1f}" if limit > 2 else f"{value:.2f}"
        if not float(text):
            continue
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
