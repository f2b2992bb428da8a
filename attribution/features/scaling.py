"""Rows centred and scaled by constants, so that training means the same in every model; then folded into weights."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Autoencoder


@dataclass(frozen=True)
class Scale:
    """Rows are seen as (row − mean) · factor, with a mean square of 1 per coordinate."""

    mean: Float[Tensor, "width"]
    factor: float

    @classmethod
    def of(cls, rows: Float[Tensor, "row width"]) -> "Scale":
        """The constants of some rows.

        Raises:
            InvalidArgument: there are none, or they are all the same, or not finite.
        """
        if not len(rows):
            raise InvalidArgument("there are no rows to train on", param="rows")
        mean = rows.mean(0)
        spread = float((rows - mean).square().sum(-1).mean())
        if not math.isfinite(spread) or spread <= 0:
            found = "not finite" if not math.isfinite(spread) else "all the same"
            raise InvalidArgument(f"the {len(rows)} rows to begin with are {found}: nothing to train on", param="rows")
        return cls(mean, math.sqrt(rows.shape[1] / spread))

    def __call__(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The rows as training sees them."""
        return (rows - self.mean) * self.factor


def folded(autoencoder: Autoencoder, reads: Scale, writes: Scale) -> Autoencoder:
    """An autoencoder of scaled rows as one of the rows themselves, which takes no b_dec off what it reads.

    Of a decoder row nothing changes: activations come out in the units of what is written.
    """
    assert autoencoder.gate is None
    assert autoencoder.normalisation == "none"
    assert autoencoder.b_enc is not None
    norm = autoencoder.decoder_norm if autoencoder.rescaled else torch.ones_like(autoencoder.b_enc)
    shift = autoencoder.b_dec @ autoencoder.W_enc if autoencoder.subtracts_b_dec else 0.0
    encoder = autoencoder.W_enc * reads.factor
    b_enc = autoencoder.b_enc - shift - reads.mean @ encoder
    gain = norm / writes.factor
    b_dec = autoencoder.b_dec / writes.factor + writes.mean
    skip = autoencoder.W_skip
    if skip is not None:
        skip = skip * (reads.factor / writes.factor)
        b_dec = b_dec - reads.mean @ skip
    return replace(
        autoencoder,
        W_enc=encoder * gain,
        b_enc=b_enc * gain,
        W_dec=autoencoder.W_dec / norm[:, None],
        b_dec=b_dec,
        # what is compared with a threshold is x W_enc + b_enc, times ‖W_dec‖ where activations are rescaled by it
        threshold=None if autoencoder.threshold is None else autoencoder.threshold / writes.factor,
        W_skip=skip,
        subtracts_b_dec=False,
        rescaled=False,
    )
