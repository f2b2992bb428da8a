"""Sweeps: one run for every cell of a grid with named axes, and what came out of them as a table.

The axes are "layer", then "head" where single heads are taken, then "position" where single positions are; or "set",
of sets that the caller lists. `axes` of a result has the layers, heads and positions themselves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument

if TYPE_CHECKING:
    from attribution.model.traced import TracedModel

METRICS = ("log_prob", "logit_diff")
MOST_CELLS = 100_000


@dataclass(frozen=True)
class Cell:
    """One run of a grid; `positions` of None are all."""

    layer: int
    head: int | None
    positions: tuple[int, ...] | None


def grid(
    model: "TracedModel", layers: list[int] | None, positions: list[int] | None, tokens: int, *, heads: bool, each: bool
) -> dict[str, list[int]]:
    """The axes of a sweep.

    Args:
        layers: None is all of them.
        tokens: how many the sample has.
        heads: whether every head is a cell of its own.
        each: whether every position is; None is then all of them.

    Raises:
        InvalidArgument: there would be too many cells, or nothing to run over.
        OutOfRange: a layer that the model does not have.
    """
    dims = model.dimensions
    if layers is not None:
        if not layers or len(set(layers)) < len(layers):
            raise InvalidArgument("layers names at least one layer, and none of them twice", param="layers")
        for layer in layers:
            checks.in_range("layers", layer, dims.n_layers, f"the layers of {model.id}")
    axes = {"layer": list(range(dims.n_layers)) if layers is None else list(layers)}
    if heads:
        axes["head"] = list(range(dims.n_heads))
    if each:
        axes["position"] = list(range(tokens)) if positions is None else list(positions)
    if (cells := prod(map(len, axes.values()))) > MOST_CELLS:
        raise InvalidArgument(
            f"this sweep has {cells:,} cells, each a forward pass; at most {MOST_CELLS:,} are run: name fewer layers "
            "or positions",
            param="positions",
        )
    return axes


def cells_of(axes: Mapping[str, list[int]], positions: list[int] | None) -> Iterator[Cell]:
    """The cells of a grid, the last axis fastest; `positions` are those of each where they are not an axis."""
    every = None if positions is None else tuple(positions)
    for at in product(*axes.values()):
        named = dict(zip(axes, at, strict=True))
        where = (named["position"],) if "position" in named else every
        yield Cell(named["layer"], named.get("head"), where)


def shaped(values: Tensor, axes: Mapping[str, list[int]]) -> Tensor:
    """Values, one per cell, along the axes of the grid."""
    return values.unflatten(0, [len(axis) for axis in axes.values()])


@dataclass(frozen=True)
class Swept:
    """A sweep's result, whichever operation it came from.

    Attributes:
        values: of each cell.
        change: from the run without any change to this, in nats or logits.
        recovery: None of ablations, and where clean and corrupted do not differ, as `note` then says.
    """

    axes: dict[str, list[int]]
    values: Float[Tensor, "*axes"]
    change: Float[Tensor, "*axes"]
    recovery: Float[Tensor, "*axes"] | None
    note: str | None


def swept(result: Mapping[str, Any], metric: str = "log_prob") -> Swept:
    """What `ablate_sweep` or `patch_sweep` returned.

    Raises:
        InvalidArgument: it is something else, or has no such metric.
    """
    if metric not in METRICS:
        raise InvalidArgument(f"metric is {metric!r}; it is one of {', '.join(METRICS)}", param="metric")
    if "axes" not in result or not {"after", "log_prob"} & set(result):
        raise InvalidArgument(
            f"result is what ablate_sweep or patch_sweep return; found the keys {sorted(result)}", param="result"
        )
    axes = dict(result["axes"])
    if "after" in result:
        if metric != "log_prob":
            raise InvalidArgument(f"an ablation has no {metric}, only log_prob", param="metric")
        return Swept(axes, result["after"], result["after"] - result["before"], None, None)
    found = result[metric]
    if found is None:
        raise InvalidArgument(f"no {metric} was computed: patch_sweep takes `against` for it", param="metric")
    return Swept(axes, found["patched"], found["patched"] - found["corrupted"], found["recovery"], found["note"])


def sweep_table(
    result: Mapping[str, Any], metric: str = "log_prob", top: int | None = None
) -> list[dict[str, int | float | None]]:
    """The cells of a sweep, those that change most first.

    Args:
        result: of `ablate_sweep` or `patch_sweep`.
        metric: "log_prob" or, of patching, "logit_diff".
        top: how many rows; None is all.

    Returns:
        For each cell its place on every axis, `value`, `change` (from the run in which nothing was changed) and
        `recovery` (None of ablations, and where there is nothing to recover).

    Raises:
        InvalidArgument: as `swept`, or `top` is below 1.
    """
    found = swept(result, metric)
    if top is not None and top < 1:
        raise InvalidArgument(f"top is {top}; it is at least 1", param="top")
    changes = found.change.flatten()
    order = torch.argsort(changes.abs(), descending=True, stable=True)[:top].tolist()
    places = list(product(*found.axes.values()))
    recovery = None if found.recovery is None else found.recovery.flatten()
    return [
        {
            **dict(zip(found.axes, places[at], strict=True)),
            "value": float(found.values.flatten()[at]),
            "change": float(changes[at]),
            "recovery": None if recovery is None else float(recovery[at]),
        }
        for at in order
    ]
