"""What interventions put in the place of activations: functions of the rows of a site, for `attribution.model.edits`.

The rows are [column, *width]. A direction is [group, width]: one for the whole width of a site, or for each of some
heads; one group stands for all heads. Norms and products are over the width, for each position (and head) by itself,
and are computed in float32, or in float64 when the activations are.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.features.autoencoder import Autoencoder

Function = Callable[[Tensor], Tensor]
Normalise = Literal["relative", "preserve", "both"]


def adding(
    direction: Float[Tensor, "group width"],
    strength: float,
    normalise: Normalise | None = None,
    scale_of: Callable[[Tensor], Tensor | None] | None = None,
) -> Function:
    """x + strength · v.

    Args:
        normalise: "relative": v is scaled to the norm of x, so that the strength is a share of it; "preserve": the
            result is scaled back to the norm of x; "both": first one, then the other; None: neither.
        scale_of: what v is multiplied with for these x, where that depends on them; of no account when it is relative.
    """

    relative = normalise in ("relative", "both")

    def add(x: Tensor, v: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        step = v * norm if relative else v
        if not relative and scale_of is not None and (scale := scale_of(x)) is not None:
            step = step * scale
        result = x + strength * step
        if normalise in ("preserve", "both"):
            result = result * (norm / result.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
        return result

    return _of_groups(_unit(direction) if relative else direction, add)


def scaling(factor: float) -> Function:
    """factor · x."""
    return lambda rows: rows * factor


def zeroing() -> Function:
    """0."""
    return torch.zeros_like


def replacing(value: Float[Tensor, "group width"]) -> Function:
    """The same value at every position."""
    return _of_groups(value, lambda x, v: v.expand_as(x))


def projecting_out(direction: Float[Tensor, "group width"]) -> Function:
    """x − ⟨x, u⟩ u with u = v / ‖v‖."""

    def project(x: Tensor, v: Tensor) -> Tensor:
        return x - (x * v).sum(-1, keepdim=True) * v

    return _of_groups(_unit(direction), project)


def clamping(
    autoencoder: Autoencoder,
    index: int,
    value: float,
    rows_of: Callable[[Tensor], Tensor],
    tell: Callable[[Tensor], None],
) -> Callable[..., Tensor]:
    """x + (value − f) · d, f being the activation of a feature and d what one unit of it writes.

    What the autoencoder does not reconstruct stays. A function of the rows of a site, and where the autoencoder reads
    elsewhere of its rows there, too.

    Args:
        rows_of: makes of the rows of the site that is read what the autoencoder reads.
        tell: is told the activations that were found, [column].
    """

    def clamp(rows: Tensor, read: Tensor | None = None) -> Tensor:
        there = autoencoder.to(rows.device)
        x = rows_of(rows if read is None else read).to(rows.device, there.dtype)
        found = there.activations_of(index, x)
        step = (value - found)[:, None] * there.directions([index])
        scale = there.scale_of(x)
        tell(found)
        result = rows.reshape(len(rows), -1).to(there.dtype) + (step if scale is None else step * scale)
        return result.to(rows.dtype).view(rows.shape)

    return clamp


def _unit(direction: Tensor) -> Tensor:
    """v / ‖v‖ in float64; scaled first, as the squares of very large or small numbers are infinite or 0."""
    scaled = direction.double() / direction.double().abs().amax(-1, keepdim=True)
    return scaled / scaled.norm(dim=-1, keepdim=True)


def _of_groups(direction: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    @cache  # one copy for every device, not one for every step
    def there(device: torch.device, dtype: torch.dtype) -> Tensor:
        return direction.to(device, dtype)

    def of_rows(rows: Tensor) -> Tensor:
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        grouped = rows.reshape(len(rows), -1, direction.shape[-1]).to(dtype)
        return function(grouped, there(rows.device, dtype)).to(rows.dtype).view(rows.shape)

    return of_rows
