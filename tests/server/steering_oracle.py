"""An oracle of interventions: a plain transformers model with PyTorch hooks, fed the whole text at every step.

Nothing here knows nnsight, a key/value cache, or Sightline's table of points. q and k are what `apply_rotary_pos_emb`
is given, v what the eager attention takes; the stream between attention and MLP is changed by what attention adds.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """A function of what is at a point of some layers: [position, width], or [position, head, d_head] of some heads.

    `positions` are those of the whole text that it may touch; without `heads`, q, k, v and z are flat.
    """

    point: str
    layers: tuple[int, ...]
    function: Function
    positions: range = range(10**6)
    heads: tuple[int, ...] | None = None


def steered_logits(model: Any, ids: list[int], edits: list[Edit]) -> Tensor:
    """The logits at every position of one text, [position, vocab]."""
    with torch.no_grad(), hooked(model, edits):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].clone()
    for edit in edits:
        if edit.point == "logits":
            _apply(edit, logits)
    return logits


@contextmanager
def hooked(model: Any, edits: list[Edit]) -> Iterator[None]:
    """While this is open, the model computes with the edits."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with ExitStack() as stack:
        for index, layer in enumerate(_layers(model)):
            here = [edit for edit in edits if index in edit.layers]
            for handle in _hooks(model, layer, here):
                stack.callback(handle.remove)
        _patch_attention(model, edits, stack)
        yield
    model.set_attn_implementation(before)


def _layers(model: Any) -> Any:
    decoder = model.get_decoder()
    return getattr(decoder, "layers", None) or decoder.h


def _hooks(model: Any, layer: Any, edits: list[Edit]) -> list[Any]:
    gemma, gpt2 = model.config.model_type == "gemma2", model.config.model_type == "gpt2"
    attention = layer.attn if gpt2 else layer.self_attn
    added = layer.post_attention_layernorm if gemma else attention
    written = layer.post_feedforward_layernorm if gemma else layer.mlp
    projection = attention.c_proj if gpt2 else attention.o_proj
    n_heads, pre = model.config.num_attention_heads, []

    def at(*names: str) -> list[Edit]:
        return [edit for edit in edits if edit.point in names]

    def enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = _changed(at("resid_pre"), args[0])
        pre[:] = [changed]
        return (changed, *args[1:])

    def add(module: Any, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor = _changed(at("attn_out"), tensor)
        if at("resid_mid"):
            tensor = _changed(at("resid_mid"), pre[0] + tensor) - pre[0]
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    return [
        layer.register_forward_pre_hook(enter),
        added.register_forward_hook(add),
        written.register_forward_hook(lambda module, args, output: _changed(at("mlp_out"), output)),
        layer.register_forward_hook(lambda module, args, output: _changed(at("resid_post"), output)),
        projection.register_forward_pre_hook(lambda module, args: (_changed(at("z"), args[0], n_heads), *args[1:])),
    ]


def _patch_attention(model: Any, edits: list[Edit], stack: ExitStack) -> None:
    code = sys.modules[type(model).__module__]
    rotary: Any = getattr(code, "apply_rotary_pos_emb", None)
    attention = code.eager_attention_forward
    calls = {"rotate": 0, "attend": 0}

    def at(name: str, layer: int, value: Tensor) -> Tensor:
        """[row, head, position, d_head]"""
        chosen = [edit for edit in edits if edit.point == name and layer in edit.layers]
        flat = value.transpose(1, 2).flatten(2)
        return _changed(chosen, flat, value.shape[1]).unflatten(2, (value.shape[1], -1)).transpose(1, 2)

    def rotate(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = calls["rotate"]
        calls["rotate"] += 1
        return rotary(at("q", layer, q), at("k", layer, k), *args, **kwargs)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = calls["attend"]
        calls["attend"] += 1
        if rotary is None:
            q, k = at("q", layer, q), at("k", layer, k)
        return attention(module, q, k, at("v", layer, v), *args, **kwargs)

    stack.enter_context(patch.object(code, "eager_attention_forward", attend))
    if rotary is not None:
        stack.enter_context(patch.object(code, "apply_rotary_pos_emb", rotate))


def _changed(edits: list[Edit], value: Tensor, heads: int = 1) -> Tensor:
    """[row, position, width], of which the width is that of so many heads."""
    value = value.clone()
    for edit in edits:
        part = value[0] if edit.heads is None else value[0].unflatten(-1, (heads, -1))
        _apply(edit, part)
    return value


def _apply(edit: Edit, rows: Tensor) -> None:
    """[position, …], in place."""
    chosen = [position for position in range(len(rows)) if position in edit.positions]
    if not chosen:
        return
    if edit.heads is None:
        rows[chosen] = edit.function(rows[chosen])
    else:
        for position in chosen:
            rows[position, list(edit.heads)] = edit.function(rows[position, list(edit.heads)])
