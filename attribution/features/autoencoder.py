"""Sparse autoencoders and transcoders as pure functions of tensors. No model, no files, nothing kept between calls.

With x what is read, and y what is written (x itself, or for a transcoder what the MLP adds to the stream):

1. x is normalised where the autoencoder was trained so, and b_dec is taken off it where that is asked for.
2. pre = x W_enc + b_enc, times ‖W_dec‖ per feature where activations are rescaled by it.
3. f = activation(pre): relu, the k largest and then relu, relu above a threshold, or a gate.
4. ŷ = f W_dec + b_dec (+ x W_skip), and the normalisation of step 1 undone.

The formulas are those of SAELens 6, whose directories `attribution.features.reading` reads.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Activation = Literal["relu", "topk", "jumprelu", "gated"]
Normalisation = Literal["none", "layer_norm", "constant_norm"]

_ENCODED_AT_ONCE = 1 << 26
"""Activations of features that are computed at once by `topk`, rows × features."""


@dataclass(frozen=True)
class Gate:
    """What a gated autoencoder has instead of one bias: (x W + b_gate > 0) · relu(x (W e^r_mag) + b_mag)."""

    b_gate: Float[Tensor, "feature"]
    b_mag: Float[Tensor, "feature"]
    r_mag: Float[Tensor, "feature"]


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder, or a transcoder when `d_out` is of another place than what it reads.

    Attributes:
        activation: what makes features of pre-activations.
        b_enc: None for a gated one.
        threshold: of "jumprelu", per feature.
        k: of "topk".
        W_skip: what a skip transcoder adds: x W_skip, [d_in, d_out].
        subtracts_b_dec: whether b_dec is taken off what is read.
        rescaled: whether activations are multiplied by the norm of their decoder row, and divided by it when decoded.
        normalisation: what is done to each row before it is read.
        restores: whether that is undone after it is written; a transcoder, which writes elsewhere, does not.
        centred: whether the mean over the width is taken off what is read (models whose writes are centred).
    """

    activation: Activation
    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"] | None
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]
    threshold: Float[Tensor, "feature"] | None = None
    k: int | None = None
    gate: Gate | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    subtracts_b_dec: bool = False
    rescaled: bool = False
    normalisation: Normalisation = "none"
    restores: bool = True
    centred: bool = False

    @property
    def d_in(self) -> int:
        """The width of what is read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """The width of what is written."""
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        return self.W_enc.dtype

    @cached_property
    def decoder_norm(self) -> Float[Tensor, "feature"]:
        """‖W_dec‖ of each feature, at least 1e-8."""
        return self.W_dec.norm(dim=-1).clamp(min=1e-8)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Autoencoder":
        """The same on another device or in another dtype; itself when nothing changes."""
        if (device is None or self.W_enc.device == torch.device(device)) and dtype in (None, self.dtype):
            return self
        moved: dict[str, Any] = {
            one.name: value.to(device, dtype)
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), Tensor)
        }
        if self.gate is not None:
            moved["gate"] = Gate(*(getattr(self.gate, one.name).to(device, dtype) for one in fields(Gate)))
        return replace(self, **moved)

    # --- reading

    def pre_activations(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows feature"]:
        """What the activation function sees; of a gated autoencoder, what its relu sees."""
        projected = self._projected(x)
        if self.gate is not None:
            return projected.mul_(self.gate.r_mag.exp()).add_(self.gate.b_mag)
        return projected.mul_(self.decoder_norm) if self.rescaled else projected

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows feature"]:
        """The activations of the features, at least 0."""
        candidates = self._candidates(x)
        if self.activation != "topk":
            return candidates.relu_()
        values, indices = candidates.topk(self._kept, dim=-1, sorted=False)
        return torch.zeros_like(candidates).scatter_(-1, indices, values.relu_())

    @torch.no_grad()
    def topk(self, x: Float[Tensor, "row d_in"], k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
        """The k strongest features of each row, strongest first, and their indices; 0 where fewer are active.

        Computed for a bounded number of rows at once.
        """
        rows = max(1, _ENCODED_AT_ONCE // self.n_features)
        parts = [self._candidates(part).topk(k, dim=-1) for part in x.split(rows)]
        values = torch.cat([values for values, _ in parts]).relu_()
        if self.activation == "topk":
            values[:, self._kept :] = 0
        return values, torch.cat([indices for _, indices in parts])

    @property
    def _kept(self) -> int:
        assert self.k is not None
        return min(self.k, self.n_features)

    def _candidates(self, x: Tensor) -> Tensor:
        """What becomes the activations by relu, and for "topk" by keeping the largest: 0 where there is none."""
        if self.gate is not None:
            projected = self._projected(x)
            closed = projected <= -self.gate.b_gate
            # a new matrix for each call, as would W_enc · e^r be, costs as much as a second product
            return projected.mul_(self.gate.r_mag.exp()).add_(self.gate.b_mag).masked_fill_(closed, 0)
        pre = self.pre_activations(x)
        if self.threshold is not None:
            return pre.masked_fill_(pre <= self.threshold, 0)
        return pre

    def _projected(self, x: Tensor) -> Tensor:
        """x W_enc + b_enc in memory that is the caller's to write on; of a gated autoencoder without a bias."""
        read = self._read(x)[0]
        if self.b_enc is None:
            return read @ self.W_enc
        return torch.addmm(self.b_enc, read.reshape(-1, self.d_in), self.W_enc).view(*read.shape[:-1], self.n_features)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the encoder reads, with the scale and the shift that the normalisation took away."""
        x = self.given(x)
        scale = shift = None
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True)
            x = (x - shift) / (scale + 1e-5)
        elif self.normalisation == "constant_norm":
            coefficient = self.d_in**0.5 / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
            scale = 1 / coefficient
            x = x * coefficient
        return (x - self.b_dec if self.subtracts_b_dec else x), scale, shift

    def given(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """What is read, in its own dtype and on its device, without the mean where that is taken off."""
        x = x.to(self.W_enc.device, self.dtype)
        return x - x.mean(-1, keepdim=True) if self.centred else x

    # --- writing

    def decode(
        self, features: Float[Tensor, "*rows feature"], x: Float[Tensor, "*rows d_in"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """What the features write.

        Args:
            x: what was read; needed by a skip transcoder and where rows are normalised.
        """
        if self.rescaled:
            features = features / self.decoder_norm
        written = features @ self.W_dec + self.b_dec
        if x is None:
            assert self.W_skip is None
            assert self.normalisation == "none" or not self.restores
            return written
        if self.W_skip is not None:
            written = written + self.given(x) @ self.W_skip
        if not self.restores:
            return written
        _, scale, shift = self._read(x)
        written = written if scale is None else written * scale
        return written if shift is None else written + shift

    def reconstruct(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x), x)

    def directions(self, indices: list[int] | Tensor) -> Float[Tensor, "chosen d_out"]:
        """What one unit of each feature writes, before a normalisation is undone (`scale_of`)."""
        rows = self.W_dec[indices]
        return rows / self.decoder_norm[indices][:, None] if self.rescaled else rows

    def scale_of(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows 1"] | None:
        """What `directions` are multiplied with when these rows were read; None is 1."""
        return self._read(x)[1] if self.restores else None

    @torch.no_grad()
    def activations_of(self, index: int, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row"]:
        """What `encode` gives of one feature, without a matrix of all of them."""
        if self.activation != "topk":
            return self.feature(index).encode(x)[:, 0]
        values, indices = self.topk(x, self._kept)
        return values.masked_fill_(indices != index, 0).sum(-1)

    def feature(self, index: int) -> "Autoencoder":
        """One feature as an autoencoder of its own, which activates as here; not of "topk", where all compete."""
        assert self.activation != "topk"
        gate = self.gate
        return replace(
            self,
            W_enc=self.W_enc[:, [index]],
            b_enc=None if self.b_enc is None else self.b_enc[[index]],
            W_dec=self.W_dec[[index]],
            threshold=None if self.threshold is None else self.threshold[[index]],
            gate=None if gate is None else Gate(gate.b_gate[[index]], gate.b_mag[[index]], gate.r_mag[[index]]),
        )

    def readers(self, indices: list[int] | Tensor) -> Float[Tensor, "chosen d_in"]:
        """The gradient of each feature's pre-activation with respect to what the encoder reads."""
        columns = self.W_enc[:, indices].T
        if self.gate is not None:
            return columns * self.gate.r_mag[indices].exp()[:, None]
        return columns * self.decoder_norm[indices][:, None] if self.rescaled else columns
