"""What the pictures share: colours that all readers tell apart, ticks that stay readable, checks of numbers."""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from attribution.errors import InvalidArgument

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito (2008), without its yellow, which is too light for lines."""

OTHERS = "#999999"
"""Whatever has no colour of its own."""

SIGNED, AMOUNT = "RdBu_r", "viridis"
"""Colour maps: of values with a sign, white at 0; of amounts from 0."""

_LONGEST = 8  # characters of a token that is shortened
_GAPS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 1000)


class Picture(Figure):
    """A figure that a notebook shows by itself: figures that pyplot did not make are otherwise a line of text there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def numbers(name: str, values: Tensor | np.ndarray | Sequence) -> np.ndarray:
    """Values to draw, in float64 on the CPU.

    Raises:
        InvalidArgument: there is none, or one is not finite: a picture would leave it out silently.
    """
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if not array.size:
        raise InvalidArgument(f"{name} is empty; there is nothing to draw", param=name)
    if wrong := int((~np.isfinite(array)).sum()):
        raise InvalidArgument(
            f"{name} has {wrong} values that are not finite (NaN or inf); a picture would leave them out", param=name
        )
    return array


def every(count: int, room: int) -> int:
    """The gap between ticks that leaves at most `room` of `count`: a round number."""
    return next((gap for gap in _GAPS if count <= room * gap), -(-count // room))


def limit_of(values: np.ndarray) -> float:
    """The largest magnitude, 1 when all values are 0."""
    return float(np.abs(values).max()) or 1.0


def bare(axes: Axes) -> None:
    """Take the frame away."""
    for spine in axes.spines.values():
        spine.set_visible(False)


def readable(token: str) -> str:
    """A token as it can be written on an axis: blanks seen, nothing taken for a formula or without glyph."""
    seen = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    seen = "".join({" ": "·", "\n": "↵", "\t": "→", "$": r"\$"}.get(letter, letter) for letter in seen)
    return "".join(letter if ord(letter) in _glyphs() else "□" for letter in seen) or "∅"


def shortened(token: str) -> str:
    """A readable token of a few letters, as it fits into a cell or below one."""
    return readable(token if len(token) <= _LONGEST else f"{token[: _LONGEST - 1]}…")


@cache
def _glyphs() -> frozenset[int]:
    """What the font of every matplotlib can write."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())
