"""A frozen model by hand: what the stream is when something is added, with patterns, norms and MLPs as they were.

Weights are those of the plain transformers model, patterns and streams are seen by its own eager attention
(`tests.attribution.plain`), everything in float64. Nothing here knows gradients, nnsight or Sightline.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tests.attribution.plain import watch
from tests.attribution.plain_layers import final_norm, layers_of, scale_of


@dataclass
class ByHand:
    """A transcoder as formulas.

    With `normalised`, rows are read as (x − mean) / (std + 1e-5), and with `restores` that is undone when written.
    """

    point: str
    activation: Literal["relu", "topk", "jumprelu"]
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    k: int
    W_skip: Tensor | None = None
    normalised: bool = False
    restores: bool = True

    def pre(self, read: Tensor, at: Tensor) -> Tensor:
        """Pre-activations, with the scale of the rows that `at` had."""
        if self.normalised:
            read = (read - read.mean(-1, keepdim=True)) / (at.std(-1, keepdim=True) + 1e-5)
        return read @ self.W_enc + self.b_enc

    def features(self, read: Tensor) -> Tensor:
        """Activations."""
        pre = self.pre(read, read)
        if self.activation == "topk":
            for row in pre:
                lowest = sorted(row.tolist())[-self.k]
                row[row < lowest] = 0
        if self.activation == "jumprelu":
            pre = torch.where(pre > self.threshold, pre, 0)
        return pre.clamp(min=0)

    def scale(self, at: Tensor) -> Tensor:
        """What is written is multiplied by this."""
        return at.std(-1, keepdim=True) if self.normalised and self.restores else torch.ones_like(at[..., :1])

    def linear(self, read: Tensor, at: Tensor) -> Tensor:
        """What is written that is linear in what is read."""
        out = torch.zeros_like(at) if self.W_skip is None else (read @ self.W_skip) * self.scale(at)
        return out + read.mean(-1, keepdim=True) if self.normalised and self.restores else out


def by_hand(
    point: str,
    activation: Literal["relu", "topk", "jumprelu"],
    seed: int,
    *,
    skip: bool = False,
    normalised: bool = False,
) -> ByHand:
    """A random transcoder of 48 → 48 with 40 features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return ByHand(
        point=point,
        activation=activation,
        W_enc=draw(48, 40) * 0.2,
        b_enc=draw(40) * 0.1,
        W_dec=draw(40, 48) * 0.2,
        b_dec=draw(48) * 0.1,
        threshold=draw(40).abs() * 0.3,
        k=7,
        W_skip=draw(48, 48) * 0.1 if skip else None,
        normalised=normalised,
    )


@dataclass
class Frozen:
    """One sequence through a plain model of any family, with everything held as it was but the stream."""

    model: Any
    ids: list[int]
    transcoders: dict[int, ByHand]
    mlp_out: list[Tensor] = field(init=False)
    reads: list[Tensor] = field(init=False)
    embedding: Tensor = field(init=False)

    def __post_init__(self) -> None:
        seen = watch(self.model, self.ids)
        self.patterns = seen["pattern"][:, 0].double()
        self.embedding, self.mlp_out = seen["resid_pre"][0, 0].double(), list(seen["mlp_out"][:, 0].double())
        self.scales: dict[Any, Tensor] = {}
        self.reads = []
        self.reads, self.final = self.run({})
        self.active = {layer: one.features(self.reads[layer]) for layer, one in self.transcoders.items()}

    def run(self, added: dict[tuple[int, int], Tensor]) -> tuple[list[Tensor], Tensor]:
        """What each layer's transcoder reads, and the final normed stream.

        `added`: by depth (0 the embedding, layer + 1 the MLP of a layer) and position.
        """
        first = not self.reads
        x, reads = self._with(self.embedding, added, 0), []
        for index, layer in enumerate(layers_of(self.model)):
            attended = self._attend(layer, self._norm(layer.norm_in, x), self.patterns[index])
            x = x + (self._norm(layer.norm_attention, attended) if layer.norm_attention else attended)
            reads.append(self._read(layer.norm_mid, x, index))
            out = self.mlp_out[index]
            if (one := self.transcoders.get(index)) is not None and not first:
                at = self.reads[index]
                out = out + one.linear(reads[index], at) - one.linear(at, at)
            x = x + self._with(out, added, index + 1)
        return reads, self._norm(final_norm(self.model), x)

    def _with(self, value: Tensor, added: dict[tuple[int, int], Tensor], depth: int) -> Tensor:
        value = value.clone()
        for (at, position), vector in added.items():
            if at == depth:
                value[position] += vector
        return value

    def _norm(self, norm: Any, x: Tensor, *, bare: bool = False) -> Tensor:
        """A norm with the scale of the first input that it was given."""
        if norm not in self.scales:
            self.scales[norm] = scale_of(norm, x)
        centred = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
        if bare:
            return centred * self.scales[norm]
        weight = norm.weight + ("Gemma" in type(norm).__name__)
        return centred * self.scales[norm] * weight + getattr(norm, "bias", 0)

    def _read(self, norm: Any, mid: Tensor, index: int) -> Tensor:
        point = self.transcoders[index].point if index in self.transcoders else "mlp_in"
        normed, bare = self._norm(norm, mid), self._norm(norm, mid, bare=True)
        return {"mlp_in": normed, "mlp_normalised": bare, "resid_mid": mid}[point]

    def _attend(self, layer: Any, normed: Tensor, pattern: Tensor) -> Tensor:
        attention = layer.attention
        fused = hasattr(attention, "c_attn")
        v = attention.c_attn(normed).chunk(3, dim=-1)[2] if fused else attention.v_proj(normed)
        heads = len(pattern)
        width = layer.out_proj.weight.shape[0 if hasattr(layer.out_proj, "nf") else 1] // heads
        v = v.view(len(normed), -1, width)
        v = v.repeat_interleave(heads // v.shape[1], dim=1)
        z = torch.einsum("hqk,khd->qhd", pattern, v)
        return layer.out_proj(z.flatten(1))
