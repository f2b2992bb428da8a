"""One decoder layer of a plain transformers model as functions: what the oracles differentiate.

The modules of the layer are called as the model called them (same mask, same rotary tables, eager
attention), once per interpolation point. What a node holds fixed is put in place where it arises: norms are
patched so that they keep the scale of the first, actual input, and the attention function so that it takes
q, k or v at their actual values and returns one head alone. In a float64 model all this computes in float64;
the streams themselves are those of the plain model, whose norms and softmax may compute in float32.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

Path = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer; the norms of what it writes are Gemma 2's alone."""

    norm_in: Any
    attention: Any
    out_proj: Any
    norm_attention: Any
    norm_mid: Any
    mlp: Any
    norm_mlp: Any


def layers_of(model: Any) -> list[Layer]:
    """The layers of a model of any of the five families."""
    decoder = model.get_decoder()
    if hasattr(decoder, "h"):
        return [Layer(m.ln_1, m.attn, m.attn.c_proj, None, m.ln_2, m.mlp, None) for m in decoder.h]
    if hasattr(decoder.layers[0], "pre_feedforward_layernorm"):
        return [
            Layer(
                m.input_layernorm,
                m.self_attn,
                m.self_attn.o_proj,
                m.post_attention_layernorm,
                m.pre_feedforward_layernorm,
                m.mlp,
                m.post_feedforward_layernorm,
            )
            for m in decoder.layers
        ]
    return [
        Layer(m.input_layernorm, m.self_attn, m.self_attn.o_proj, None, m.post_attention_layernorm, m.mlp, None)
        for m in decoder.layers
    ]


def final_norm(model: Any) -> Any:
    """The norm between the last layer and the logits."""
    decoder = model.get_decoder()
    return decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm


def record(model: Any, ids: list[int]) -> dict[str, Any]:
    """What the plain model computes: `pre` (L + 1 of them), `mid`, `z`, `attention` (the output of the output
    projection), `mlp` (what is added to the stream), each [1, position, ...] per layer; `logits` and `ids`."""
    seen: dict[str, Any] = {name: [] for name in ("pre", "mid", "z", "attention", "mlp")}

    def keep_input(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0])

    def keep_output(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output)

    handles = [final_norm(model).register_forward_pre_hook(keep_input("pre"))]
    for layer in layers_of(model):
        handles += [
            layer.norm_in.register_forward_pre_hook(keep_input("pre")),
            layer.out_proj.register_forward_pre_hook(keep_input("z")),
            layer.out_proj.register_forward_hook(keep_output("attention")),
            layer.norm_mid.register_forward_pre_hook(keep_input("mid")),
            (layer.norm_mlp or layer.mlp).register_forward_hook(keep_output("mlp")),
        ]
    with torch.no_grad():
        seen["logits"] = model(torch.tensor([ids]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen | {"ids": ids}


def _calls(model: Any, ids: list[int]) -> list[dict[str, Any]]:
    """How the model calls each eager attention: all arguments but the hidden states."""
    calls: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    handles = [layer.attention.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers_of(model)]
    with torch.no_grad(), eager(model):
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The model with eager attention for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def exact(model: Any) -> Iterator[None]:
    """Eager attention whose softmax is in float64 where the scores are."""
    softmax = torch.nn.functional.softmax

    def own(scores: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return softmax(scores, dim=dim, dtype=torch.float64 if scores.dtype == torch.float64 else dtype)

    with eager(model), patch.object(torch.nn.functional, "softmax", own):
        yield


def scale_of(norm: Any, x: Tensor) -> Tensor:
    """1 / rms (of LayerNorm: 1 / standard deviation) of `x` as `norm` takes it, [..., 1]."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
    return 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _freezing(norm: Any) -> Any:
    """A patch under which `norm` keeps the scale of the first input that it meets (and meets that as it is)."""
    scales: list[Tensor] = []
    real = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not scales:
            scales.append(scale_of(norm, x).detach())
            return real(x)
        if isinstance(norm, torch.nn.LayerNorm):
            return (x - x.mean(-1, keepdim=True)) * scales[0] * norm.weight + norm.bias
        return x * scales[0] * (norm.weight + ("Gemma" in type(norm).__name__))

    return patch.object(norm, "forward", forward)


@contextmanager
def attention_path(
    model: Any, seen: dict[str, Any], index: int, head: int, varies: str, held: dict[str, Tensor] | None = None
) -> Iterator[Path]:
    """The function from resid_pre to what one head writes, [1, position, e], without the projection's bias.

    Of q, k and v (each [1, head, position, d]) those not named in `varies` stay at their actual values, which
    `held` then contains. With `varies="pattern"` it is the pattern that varies: `held["pattern"]` is a leaf.
    """
    layer, code = layers_of(model)[index], sys.modules[type(model).__module__]
    call = _calls(model, seen["ids"])[index]
    real, actual = code.eager_attention_forward, {} if held is None else held

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not actual:
            actual.update(q=q.detach(), k=k.detach(), v=v.detach())
            return real(module, q, k, v, *args, **kwargs)
        given = {"q": q, "k": k, "v": v}
        q, k, v = (given[name] if name in varies else actual[name] for name in "qkv")
        z, pattern = real(module, q, k, v, *args, **kwargs)
        if varies == "pattern":
            actual["pattern"] = pattern.detach().requires_grad_()
            z = (actual["pattern"] @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).transpose(1, 2)
        only = torch.zeros_like(z)
        only[:, :, head] = 1
        return z * only, pattern

    def write(x: Tensor) -> Tensor:
        constant = bias(layer) if actual else 0  # the post-norm freezes at the whole output, bias included
        out = layer.attention(hidden_states=layer.norm_in(x), **call)[0] - constant
        return layer.norm_attention(out) if layer.norm_attention else out

    own_norms = [getattr(layer.attention, name, None) for name in ("q_norm", "k_norm")]
    with ExitStack() as patches:
        for norm in (layer.norm_in, layer.norm_attention, *own_norms):
            if norm is not None:
                patches.enter_context(_freezing(norm))
        patches.enter_context(patch.object(code, "eager_attention_forward", attend))
        with torch.no_grad():
            write(seen["pre"][index])
        yield write


def bias(layer: Layer) -> Tensor:
    """What the output projection writes for z = 0."""
    weight = layer.out_proj.weight
    width = weight.shape[0] if hasattr(layer.out_proj, "nf") else weight.shape[1]  # Conv1D is transposed
    with torch.no_grad():
        return layer.out_proj(weight.new_zeros(1, 1, width))


@contextmanager
def mlp_path(model: Any, seen: dict, index: int, detached: str | None) -> Iterator[Path]:
    """The function from resid_mid to what the MLP writes; the output of the `detached` projection is constant."""
    layer = layers_of(model)[index]

    def write(x: Tensor) -> Tensor:
        out = layer.mlp(layer.norm_mid(x))
        return layer.norm_mlp(out) if layer.norm_mlp else out

    with ExitStack() as patches:
        for norm in (layer.norm_mid, layer.norm_mlp):
            if norm is not None:
                patches.enter_context(_freezing(norm))
        with torch.no_grad():
            write(seen["mid"][index])
        if detached is not None and hasattr(layer.mlp, detached):
            projection = getattr(layer.mlp, detached)
            handle = projection.register_forward_hook(lambda module, args, output: output.detach())
            patches.callback(handle.remove)
        yield write


@contextmanager
def logits_path(model: Any, seen: dict) -> Iterator[Path]:
    """The function from the final residual to the logits, through the model's own forward."""
    norm, decoder = final_norm(model), model.get_decoder()
    stream: list[Tensor] = []

    def decode(*args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=norm(stream[0]))

    def logits(x: Tensor) -> Tensor:
        stream[:] = [x]
        return model(torch.zeros(x.shape[:2], dtype=torch.long)).logits

    with _freezing(norm), patch.object(decoder, "forward", decode):
        with torch.no_grad():
            logits(seen["pre"][-1])
        yield logits
