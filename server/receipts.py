"""What an intervention did, counted where it was made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Receipt:
    """Counts the forward passes and the positions at which one intervention was made in one completion.

    Attributes:
        described: what the intervention is, as JSON.
        steps: forward passes in which it was made, at however many layers.
        edges: for a knockout, how many pairs of a query and a key were removed; None for others.
        observes: whether it finds activations of a feature before it changes them.
    """

    described: dict[str, Any]
    steps: int = 0
    edges: int | None = None
    observes: bool = False
    _ranges: list[range] = field(default_factory=list)
    _layers: set[int] = field(default_factory=set)
    _last: int = -1
    _found: int = 0
    _active: int = 0
    _sum: float = 0.0
    _least: float = math.inf
    _most: float = -math.inf

    def observe(self, activations: Tensor) -> None:
        """A feature had these activations at the positions where it is changed, [column]."""
        self._found += len(activations)
        self._active += int((activations > 0).sum())
        self._sum += float(activations.double().sum())
        self._least = min(self._least, float(activations.min()))
        self._most = max(self._most, float(activations.max()))

    def count(self, ends: int, positions: Iterable[range], layer: int | None, edges: int = 0) -> None:
        """It was made at some positions of one layer, in ascending order.

        Args:
            ends: how many tokens the sequence has been fed after this forward pass: it tells one from the next.
            layer: None for a module that is in no layer.
            edges: how many pairs were removed.
        """
        if layer is not None:
            self._layers.add(layer)
        if ends == self._last:  # another layer of the same forward pass
            return
        self._last = ends
        self.steps += 1
        if self.edges is not None:
            self.edges += edges
        for one in positions:
            self._add(one)

    def _add(self, positions: range) -> None:
        """Positions that go on where the last ones stopped are one range with them."""
        last = self._ranges[-1] if self._ranges else None
        if last is not None and positions.start == last.start + len(last) * last.step and positions.step == last.step:
            self._ranges[-1] = range(last.start, positions.stop, last.step)
        else:
            self._ranges.append(positions)

    def as_json(self) -> dict[str, Any]:
        """The receipt: `steps` 0 says that it was never made."""
        counts = {
            "steps": self.steps,
            "positions": sum(map(len, self._ranges)),
            "ranges": [[one.start, one[-1] + 1, one.step] for one in self._ranges],
            "layers": sorted(self._layers),
        }
        found = {"activation_before": self._activation()} if self.observes else {}
        return self.described | counts | found | ({} if self.edges is None else {"edges": self.edges})

    def _activation(self) -> dict[str, Any] | None:
        """What was found before it was changed; None when nothing was."""
        if not self._found:
            return None
        mean = self._sum / self._found
        return {"mean": mean, "min": self._least, "max": self._most, "active_positions": self._active}
