"""One decoder layer, as attribution needs it: its norms, projections and attention as tensors, its modules as envoys.

What a layer computes for some rows alone is computed by its own modules, called with those rows. Weights are read from
a dense twin where the model is quantised (`TracedModel.layer`), and gradients are traced there.
"""

import sys
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.attention import attention_pattern, attention_scores, hidden_edges, kv_heads_of
from attribution.errors import GradientsRefused, UnsupportedModel
from attribution.model.dequantise import dense_weight
from attribution.model.families import Family
from attribution.model.traced import TracedModel
from attribution.norms import Norm


def family_of(model: TracedModel) -> Family:
    """The family of a model whose points are proved.

    Raises:
        UnsupportedModel: they are not.
    """
    if model.family is None:
        raise UnsupportedModel(f"nothing in {model.id!r} can be attributed: {model.note}", param="model")
    return model.family


def read_norm(model: TracedModel, module: Any) -> Norm:
    """The norm that a module computes, in the dtype of the attribution."""
    kind, dtype = family_of(model).norm, model.work_dtype
    weight = module.weight.detach().to(dtype)
    if kind == "layer":
        return Norm(weight, module.bias.detach().to(dtype), module.eps, centred=True)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(1 + weight if kind == "rms_plus_one" else weight, None, eps, centred=False)


class Block:
    """Layer `layer` of a model.

    Rows are positions of one sample, without a batch axis. Values are in the model's dtype; weights, norms and rotary
    angles in `model.work_dtype`.

    Raises:
        UnsupportedModel: the points of the model are not proved.
    """

    def __init__(self, model: TracedModel, layer: int) -> None:
        self.model, self.layer, self.family = model, layer, family_of(model)
        self.dims, self.dtype = model.dimensions, model.work_dtype
        self.own: Any = model.module.get_submodule(f"{self.family.layers}.{layer}")
        self._attention = self.own.get_submodule(self.family.attention)
        self.device = next(self.own.parameters()).device

    @cached_property
    def envoy(self) -> Any:
        """The layer to trace: dense, also where the model is quantised.

        Raises:
            GradientsRefused: it is quantised in a way whose dense weights are not known.
        """
        if self.model.gradients_refused is not None:
            raise GradientsRefused(
                f"{self.model.id!r} gives no gradients: {self.model.gradients_refused}", param="model"
            )
        return self.model.layer(self.layer)

    def module(self, path: str) -> Any:
        """The envoy of a part of the layer."""
        return self.envoy.get(path)

    # --- norms

    def norm(self, path: str | None) -> Norm | None:
        """One of the layer's norms, by its path."""
        return None if path is None else read_norm(self.model, self.own.get_submodule(path))

    @cached_property
    def attn_norm(self) -> Norm:
        """What attention reads the stream through."""
        return read_norm(self.model, self.own.get_submodule(self.family.attn_norm))

    @cached_property
    def query_norm(self) -> Norm | None:
        """The norm of q per head."""
        return self.norm(self.family.query_norm)

    @cached_property
    def key_norm(self) -> Norm | None:
        """The norm of k per head."""
        return self.norm(self.family.key_norm)

    @cached_property
    def mlp_norm(self) -> Norm:
        """What the MLP reads the stream through."""
        return read_norm(self.model, self.own.get_submodule(self.family.mlp_norm))

    # --- projections

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype in which the traced modules compute."""
        return self.module(self.family.up)._module.weight.dtype

    @property
    def mlp_width(self) -> int:
        """The width of the MLP at its widest."""
        return max(self.module(self.family.up)._module.weight.shape)

    def weight(self, name: str) -> Float[Tensor, "heads d_head d_model"]:
        """The weight of q, k, v (what reads the normed stream) or o (what writes to it), per head."""
        place = self.family.projections[name]
        module = self.module(place.module)._module
        weight = dense_weight(module)
        if name == "o":
            return weight.T.unflatten(0, (self.dims.n_heads, -1))
        if place.third is not None:
            weight = weight.chunk(3, dim=0)[place.third]
        return weight.unflatten(0, (self._heads(name), -1))

    @property
    def o_bias(self) -> Float[Tensor, "d_model"] | None:
        """The bias of the output projection."""
        module = self.module(self.family.projections["o"].module)._module
        return None if module.bias is None else module.bias.detach()

    def cut(self, name: str, projected: Tensor) -> Float[Tensor, "*rows heads d_head"]:
        """The output of the projection module of q, k or v, cut into heads."""
        place = self.family.projections[name]
        if place.third is not None:
            projected = projected.chunk(3, dim=-1)[place.third]
        return projected.unflatten(-1, (self._heads(name), -1))

    def _heads(self, name: str) -> int:
        return self.dims.n_heads if self.family.projections[name].heads == "query" else self.dims.n_kv_heads

    @torch.no_grad()
    def project(self, resid: Float[Tensor, "pos d_model"], names: str = "qkv") -> list[Tensor]:
        """q, k, v of some rows by the model's own modules, [pos, heads, d_head], before their norms and rotary."""
        normed = self.own.get_submodule(self.family.attn_norm)(resid.to(self.device)[None])
        outputs = {}
        for name in names:
            path = self.family.projections[name].module
            if path not in outputs:
                outputs[path] = self.own.get_submodule(path)(normed)[0]
        return [self.cut(name, outputs[self.family.projections[name].module]) for name in names]

    @torch.no_grad()
    def head_normed(self, name: str, value: Float[Tensor, "pos heads d_head"]) -> Float[Tensor, "pos heads d_head"]:
        """q or k after its own norm, where the family has one."""
        path = self.family.query_norm if name == "q" else self.family.key_norm
        return value if path is None else self.own.get_submodule(path)(value)

    # --- attention

    @property
    def scaling(self) -> float:
        """What q · k is multiplied with."""
        return float(self._attention.scaling)

    @property
    def softcap(self) -> float | None:
        """The softcap of the scores."""
        return getattr(self._attention, "attn_logit_softcapping", None)

    @property
    def window(self) -> int | None:
        """How many positions back the layer sees, itself included; None is all."""
        kinds = getattr(self.model.module.config, "layer_types", None)
        sliding = kinds is not None and kinds[self.layer] == "sliding_attention"
        return self.model.module.config.sliding_window if sliding else None

    def rotate(
        self, value: Float[Tensor, "*rows pos heads d_head"], positions: list[int]
    ) -> Float[Tensor, "*rows pos heads d_head"]:
        """q or k turned by the model's own rotary embedding, in the dtype of `value`; linear in it."""
        rotary = getattr(self.model.module.get_decoder(), "rotary_emb", None)
        if rotary is None:
            return value
        apply = sys.modules[type(self._attention).__module__].apply_rotary_pos_emb
        device = rotary.inv_freq.device
        table = torch.arange(max(positions) + 1, device=device)[None]
        # the class's own forward: the instance's is nnsight's and belongs to a trace
        cos, sin = type(rotary).forward(rotary, value.new_empty(0, device=device), table)
        cos, sin = cos[:, positions].to(value), sin[:, positions].to(value)
        rows = value.transpose(-2, -3).reshape(-1, value.shape[-2], len(positions), value.shape[-1])
        turned, _ = apply(rows, rows[:, :0], cos, sin)
        return turned.view(value.transpose(-2, -3).shape).transpose(-2, -3)

    def hidden(self, queries: list[int], keys: int) -> Tensor:
        """The edges that the layer does not see, [query, key], for keys 0 … keys − 1."""
        return hidden_edges(torch.tensor(queries), torch.arange(keys), self.window)

    def pattern(
        self, resid: Float[Tensor, "key d_model"], queries: list[int], heads: list[int]
    ) -> Float[Tensor, "heads query key"]:
        """The attention pattern, exactly as the model computes it, given the stream at positions 0 … key − 1."""
        q, k = self.project(resid, "qk")
        q, k = self.head_normed("q", q[queries]), self.head_normed("k", k)
        return self.pattern_of(q[:, heads], k[:, self.kv_heads_of(heads)], queries)

    def kv_heads_of(self, heads: list[int]) -> list[int]:
        """The key/value heads that the scores of some query heads need."""
        return kv_heads_of(heads, self.dims.n_heads, self.dims.n_kv_heads)

    def pattern_of(
        self, q: Float[Tensor, "query heads d_head"], k: Float[Tensor, "key kv_heads d_head"], queries: list[int]
    ) -> Float[Tensor, "heads query key"]:
        """The pattern of q and k as their points have them: after their norms, before rotary; k from position 0 on."""
        scores = attention_scores(self.rotate(q, queries), self.rotate(k, list(range(len(k)))), self.scaling)
        return attention_pattern(scores, self.hidden(queries, len(k)).to(q.device), self.softcap)

    # --- what is written to the stream

    def head_writes(
        self, z: Float[Tensor, "pos heads d_head"], heads: list[int]
    ) -> Float[Tensor, "pos chosen d_model"]:
        """What some heads write to the stream, in the dtype of the attribution; `z` holds all heads.

        Gemma 2 norms the sum of the heads: each head's part is scaled as the sum is.
        """
        z = z.to(self.device, self.dtype)
        writes = torch.einsum("phd,hde->phe", z[:, heads], self.weight("o")[heads].to(self.dtype))
        scale = self.attn_write_scale(z)
        return writes if scale is None else writes * scale[:, None]

    def attn_write_scale(self, z: Float[Tensor, "pos heads d_head"]) -> Float[Tensor, "pos d_model"] | None:
        """The frozen post-norm of attention as a factor per position and width; None without one."""
        norm = self.norm(self.family.attn_post_norm)
        if norm is None:
            return None
        weight = self.weight("o").flatten(0, 1).to(self.dtype)
        out = z.to(self.device, self.dtype).flatten(1) @ weight
        return norm.at(out if self.o_bias is None else out + self.o_bias).norm_scale * norm.weight

    @torch.no_grad()
    def attn_out(self, z: Float[Tensor, "pos heads d_head"]) -> Float[Tensor, "pos d_model"]:
        """What attention adds to the stream, by the model's own modules and in its dtype."""
        out = self.own.get_submodule(self.family.projections["o"].module)(z.to(self.device).flatten(1)[None])
        if self.family.attn_post_norm is not None:
            out = self.own.get_submodule(self.family.attn_post_norm)(out)
        return out[0]
