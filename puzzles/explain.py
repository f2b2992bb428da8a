"""Which labels say best where a feature fires: the conjunction of up to three with the highest F1.

1. A feature fires where it is above a level: 0, or a share of its highest activation.
2. For every label, and for every two, the tokens on which they hold and the feature fires are counted; F1 is
   2 · both / (fires + holds).
3. A third label is added, or a level above 0 taken, only where F1 gains by it.

What is found on some conversations is then scored on others.
"""

from dataclasses import dataclass

import numpy as np

LEVELS = (0.0, 0.25, 0.5)
GAIN = 0.03
"""What F1 must gain by another label, or by a higher level."""
_FEWEST = 10


@dataclass(frozen=True)
class Explanation:
    """Labels, by their columns, that hold together where a feature is above ``level``, an activation."""

    labels: tuple[int, ...]
    level: float
    f1: float


def f1(fires: np.ndarray, holds: np.ndarray) -> float:
    """2 · both / (fires + holds), of two arrays of flags; 0 where neither is ever true."""
    total = int(fires.sum()) + int(holds.sum())
    return 2 * int((fires & holds).sum()) / total if total else 0.0


def holds(matrix: np.ndarray, labels: tuple[int, ...]) -> np.ndarray:
    """The tokens, of a matrix ``[token, label]``, on which all these labels hold."""
    return np.logical_and.reduce([matrix[:, label] for label in labels])


class Explainer:
    """Finds explanations by a matrix of labels, ``[token, label]``."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        floats = matrix.astype(np.float32)
        self._together = floats.T @ floats

    def explain(self, activations: np.ndarray) -> Explanation | None:
        """The best explanation of a feature's activations, ``[token]``; None for one that fires on fewer than ten."""
        best: Explanation | None = None
        for share in LEVELS:
            level = share * float(activations.max())
            fires = activations > level
            if fires.sum() < _FEWEST:
                break
            found = self._best(fires, level)
            if best is None or found.f1 > best.f1 + GAIN:
                best = found
        return best

    def _best(self, fires: np.ndarray, level: float) -> Explanation:
        firing = self.matrix[fires].astype(np.float32)
        scores = 2 * (firing.T @ firing) / (fires.sum() + self._together)
        single = np.diag(scores)
        one, pair = int(single.argmax()), np.unravel_index(int(scores.argmax()), scores.shape)
        labels: tuple[int, ...] = (one,)
        score = float(single[one])
        if scores[pair] > score + GAIN:
            labels, score = (int(pair[0]), int(pair[1])), float(scores[pair])
            third, more = self._third(fires, labels)
            if more > score + GAIN:
                labels, score = (*labels, third), more
        return Explanation(labels, level, score)

    def _third(self, fires: np.ndarray, labels: tuple[int, ...]) -> tuple[int, float]:
        both = holds(self.matrix, labels)
        counts = self.matrix[both].sum(axis=0)
        firing = self.matrix[both & fires].sum(axis=0)
        scores = 2 * firing / (fires.sum() + counts)
        return int(scores.argmax()), float(scores.max())
