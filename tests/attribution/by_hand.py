"""An oracle: whole models of the five families in plain tensor arithmetic, with attention scores masked by hand.

Only the weights and the config of the transformers model are read, no module of it is called. Everything is float64.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Removed = tuple[int, int, int, int]
"""(layer, head, query, key)"""


@dataclass(frozen=True)
class ByHand:
    """Logits [position, vocab], and for each layer the pattern [head, query, key] and z [position, head, d_head]."""

    logits: Tensor
    patterns: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)


def run_by_hand(model: Any, ids: list[int], removed: Iterable[Removed] = ()) -> ByHand:
    """The forward pass of `model` over one sequence, without the edges in `removed`."""
    config, weights = model.config, {name: value.double() for name, value in model.state_dict().items()}
    removed = list(removed)
    patterns: list[Tensor] = []
    outputs: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [query, head, d], k and v [key, kv_head, d] → [query, head · d]"""
        group = q.shape[1] // k.shape[1]
        k, v = (one.repeat_interleave(group, dim=1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
        cap = getattr(config, "attn_logit_softcapping", None)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * 99
        for query in range(len(ids)):
            for key in range(len(ids)):
                slid = kinds[layer] == "sliding_attention" and query - key >= config.sliding_window
                if key > query or slid:
                    scores[:, query, key] = -math.inf
        for at, head, query, key in removed:
            if at == layer:
                scores[head, query, key] = -math.inf
        pattern = torch.exp(scores - scores.max(-1, keepdim=True).values)
        pattern = pattern / pattern.sum(-1, keepdim=True)
        patterns.append(pattern)
        outputs.append(torch.einsum("hqk,khd->qhd", pattern, v))
        return outputs[-1].flatten(1)

    logits = (_gpt2 if config.model_type == "gpt2" else _llama_like)(config, weights, ids, attend)
    return ByHand(logits, patterns, outputs)


def _llama_like(config: Any, w: dict[str, Tensor], ids: list[int], attend: Any) -> Tensor:
    gemma, d_head = (
        config.model_type == "gemma2",
        w["model.layers.0.self_attn.q_proj.weight"].shape[0] // config.num_attention_heads,
    )
    scaling = (config.query_pre_attn_scalar if gemma else d_head) ** -0.5

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * (w[name] + gemma)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def act(x: Tensor) -> Tensor:
        return _gelu(x) if gemma else x * torch.sigmoid(x)

    angles = torch.outer(
        torch.arange(len(ids)).double(),
        config.rope_parameters["rope_theta"] ** (-torch.arange(0, d_head, 2).double() / d_head),
    )

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = w["model.embed_tokens.weight"][ids] * (math.sqrt(config.hidden_size) if gemma else 1)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        normed = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (linear(normed, f"{at}.self_attn.{n}_proj").unflatten(-1, (-1, d_head)) for n in "qkv")
        if config.model_type == "qwen3":
            q, k = norm(q, f"{at}.self_attn.q_norm.weight"), norm(k, f"{at}.self_attn.k_norm.weight")
        written = linear(attend(layer, turn(q), turn(k), v, scaling), f"{at}.self_attn.o_proj")
        x = x + (norm(written, f"{at}.post_attention_layernorm.weight") if gemma else written)
        normed = norm(x, f"{at}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm.weight")
        written = act(linear(normed, f"{at}.mlp.gate_proj")) * linear(normed, f"{at}.mlp.up_proj")
        written = linear(written, f"{at}.mlp.down_proj")
        x = x + (norm(written, f"{at}.post_feedforward_layernorm.weight") if gemma else written)
    logits = linear(norm(x, "model.norm.weight"), "lm_head")
    cap = config.final_logit_softcapping if gemma else None
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _gpt2(config: Any, w: dict[str, Tensor], ids: list[int], attend: Any) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
        return x / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for layer in range(config.n_layer):
        at = f"transformer.h.{layer}"
        parts = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (config.n_head, -1)) for part in parts)
        x = x + linear(attend(layer, q, k, v, q.shape[-1] ** -0.5), f"{at}.attn.c_proj")
        x = x + linear(_gelu(linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")), f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
