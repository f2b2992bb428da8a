"""Oracles: what a plain transformers model computes, seen by PyTorch hooks and by its own attention.

Nothing here knows nnsight or Sightline's table of points. q and k are what `apply_rotary_pos_emb` is given;
v, z and the pattern are what the eager attention takes and returns; the stream is the hidden states. attn_out
is what the attention returns (Gemma 2: normed, by hand); mid = pre + attn_out and mlp_out = post − mid.
"""

import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")


def watch(model: Any, ids: list[list[int]] | list[int]) -> dict[str, Tensor]:
    """Every point, [layer, row, position, ...] (pattern: [layer, row, head, query, key]), and the logits.

    The model is switched to eager attention for it: sdpa shows no pattern.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    seen: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "z", "pattern", "attn_out", "last")}
    code = sys.modules[type(model).__module__]
    rotary, attention = getattr(code, "apply_rotary_pos_emb", None), code.eager_attention_forward

    def rotate(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["q"].append(q.transpose(1, 2))
        seen["k"].append(k.transpose(1, 2))
        return rotary(q, k, *args, **kwargs)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        z, pattern = attention(module, q, k, v, *args, **kwargs)
        if rotary is None:
            seen["q"].append(q.transpose(1, 2))
            seen["k"].append(k.transpose(1, 2))
        seen["v"].append(v.transpose(1, 2))
        seen["z"].append(z)
        seen["pattern"].append(pattern)
        return z, pattern

    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or decoder.h
    final_norm = getattr(decoder, "norm", None) or decoder.ln_f
    handles = [
        final_norm.register_forward_pre_hook(lambda module, args: seen["last"].append(args[0])),
        *(
            (layer.self_attn if hasattr(layer, "self_attn") else layer.attn).register_forward_hook(
                lambda module, args, output, layer=layer: seen["attn_out"].append(_added(layer, output[0]))
            )
            for layer in layers
        ),
    ]
    batch = torch.tensor(ids if isinstance(ids[0], list) else [ids])
    with torch.no_grad(), patch.object(code, "eager_attention_forward", attend):
        if rotary is None:
            result = model(batch, output_hidden_states=True)
        else:
            with patch.object(code, "apply_rotary_pos_emb", rotate):
                result = model(batch, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(before)
    pre = torch.stack(result.hidden_states[:-1])
    post = torch.cat([pre[1:], seen.pop("last")[0][None]])
    points = {name: torch.stack(tensors) for name, tensors in seen.items()}
    mid = pre + points["attn_out"]
    return points | {
        "resid_pre": pre,
        "resid_mid": mid,
        "mlp_out": post - mid,
        "resid_post": post,
        "logits": result.logits,
    }


def _added(layer: Any, attention: Tensor) -> Tensor:
    """What the attention adds to the stream: Gemma 2 puts x / rms(x) · (1 + weight) in between."""
    if not hasattr(layer, "pre_feedforward_layernorm"):
        return attention
    norm = layer.post_attention_layernorm
    return attention / (attention.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight)


def module_value(model: Any, ids: list[int], path: str, side: str) -> Tensor:
    """The first tensor at one side of a module, [position, ...], by a PyTorch hook."""
    seen: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(output if side == "output" else (args or tuple(kwargs.values()))[0])

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    value = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return value[0]


def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], Tensor]:
    """transformers' own greedy generation: the tokens, and the raw logits of each, [token, vocab]."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for other shapes, and for NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def prompts_of(lengths: list[int], vocab: int = 281) -> list[list[int]]:
    """Prompts of these lengths with tokens that look random and differ."""
    return [[(37 * row + 101 * i + i * i * 13 + 5) % vocab for i in range(n)] for row, n in enumerate(lengths)]
