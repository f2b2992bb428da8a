"""Interventions as a request has them, each with what it does to a plain model: what several tests run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.models import D_HEAD, D_MODEL, N_HEADS, N_KV_HEADS, VOCAB
from tests.server.steering_oracle import Edit

PROMPT_TOKENS = 22  # of support.HELLO
ALL, LAYERS = range(10**6), (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One request: its interventions, and the same for the oracle."""

    interventions: list[dict[str, Any]]
    edits: list[Edit]


def vector(width: int, seed: int) -> Tensor:
    """A vector that looks random, in float32."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def d_head(family: str) -> int:
    """The width of a head."""
    return D_MODEL // N_HEADS if family in ("qwen2", "gpt2") else D_HEAD


def kv_heads(family: str) -> int:
    """How many key/value heads there are."""
    return N_HEADS if family == "gpt2" else N_KV_HEADS


def _unit(v: Tensor) -> Tensor:
    return v / v.norm()


def _without(v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x - (x @ _unit(v))[..., None] * _unit(v)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def cases(family: str) -> dict[str, Case]:
    """By name; all types, points, normalisations, windows and heads."""
    wide, head = vector(D_MODEL, 1), vector(d_head(family), 2)
    flat, vocabulary = vector(N_HEADS * d_head(family), 3), vector(VOCAB, 4)
    some, share = wide.tolist(), lambda x: x + 0.5 * _norm(x) * _unit(wide)

    def kept(x: Tensor) -> Tensor:
        y = x + 3.0 * wide
        return y * _norm(x) / _norm(y)

    def both(x: Tensor) -> Tensor:
        y = x - 0.8 * _norm(x) * _unit(wide)
        return y * _norm(x) / _norm(y)

    add = {"type": "add", "vector": some}
    generated = range(PROMPT_TOKENS, 10**6)
    return {
        "add": Case(
            [add | {"selector": "resid_post[1]", "strength": 2}], [Edit("resid_post", (1,), lambda x: x + 2 * wide)]
        ),
        "share": Case(
            [add | {"selector": "resid_pre[*]", "strength": 0.5, "normalise": "relative"}],
            [Edit("resid_pre", LAYERS, share)],
        ),
        "norm kept": Case(
            [add | {"selector": "resid_mid[0:2]", "strength": 3, "normalise": "preserve"}],
            [Edit("resid_mid", (0, 1), kept)],
        ),
        "both, generated": Case(
            [add | {"selector": "attn_out[2]", "strength": -0.8, "normalise": "both", "positions": "generated"}],
            [Edit("attn_out", (2,), both, generated)],
        ),
        "heads of z": Case(
            [{"type": "add", "selector": "z[1]", "heads": [4, 0], "vector": head.tolist()}],
            [Edit("z", (1,), lambda x: x + head, heads=(0, 4))],
        ),
        "all of z": Case(
            [{"type": "add", "selector": "z[-1]", "vector": flat.tolist(), "strength": 1.5}],
            [Edit("z", (2,), lambda x: x + 1.5 * flat)],
        ),
        "a head of q, prompt": Case(
            [{"type": "add", "selector": "q[0]", "heads": [2], "vector": head.tolist(), "positions": "prompt"}],
            [Edit("q", (0,), lambda x: x + head, range(PROMPT_TOKENS), heads=(2,))],
        ),
        "scale, stepping": Case(
            [{"type": "scale", "selector": "mlp_out[*]", "factor": 0.3, "positions": {"start": 3, "step": 2}}],
            [Edit("mlp_out", LAYERS, lambda x: x * 0.3, range(3, 10**6, 2))],
        ),
        "scale a head of k": Case(
            [{"type": "scale", "selector": "k[2]", "factor": -1, "heads": [1]}],
            [Edit("k", (2,), lambda x: -x, heads=(1,))],
        ),
        "zero heads": Case(
            [{"type": "ablate", "selector": "z[0]", "heads": [1, 5]}],
            [Edit("z", (0,), torch.zeros_like, heads=(1, 5))],
        ),
        "zero, last": Case(
            [{"type": "ablate", "selector": "mlp_out[1]", "mode": "zero", "positions": "last"}],
            [Edit("mlp_out", (1,), torch.zeros_like, range(PROMPT_TOKENS - 1, PROMPT_TOKENS))],
        ),
        "zero v": Case([{"type": "ablate", "selector": "v[1]"}], [Edit("v", (1,), torch.zeros_like)]),
        "a value, across the prompt's end": Case(
            [{"type": "ablate", "selector": "resid_post[0]", "mode": "mean", "value": some} | _between(20, 25)],
            [Edit("resid_post", (0,), lambda x: wide.expand_as(x), range(20, 25))],
        ),
        "project out": Case(
            [{"type": "project_out", "selector": "resid_pre[1]", "vector": some}],
            [Edit("resid_pre", (1,), _without(wide))],
        ),
        "project out of heads": Case(
            [{"type": "project_out", "selector": "z[2]", "vector": head.tolist(), "heads": [0, 1, 3]}],
            [Edit("z", (2,), _without(head), heads=(0, 1, 3))],
        ),
        "add, then scale": Case(
            [add | {"selector": "resid_post[1]"}, {"type": "scale", "selector": "resid_post[1]", "factor": 1.5}],
            [Edit("resid_post", (1,), lambda x: (x + wide) * 1.5)],
        ),
        "scale, then add": Case(
            [{"type": "scale", "selector": "resid_post[1]", "factor": 1.5}, add | {"selector": "resid_post[1]"}],
            [Edit("resid_post", (1,), lambda x: x * 1.5 + wide)],
        ),
        "many places": Case(
            [
                {"type": "scale", "selector": "resid_post[2]", "factor": 0.5},
                add | {"selector": "resid_mid[2]", "strength": -1},
                {"type": "ablate", "selector": "mlp_out[2]"} | _between(0, 9),
                {"type": "scale", "selector": "attn_out[0]", "factor": 2, "positions": "generated"},
            ],
            [
                Edit("resid_post", (2,), lambda x: x * 0.5),
                Edit("resid_mid", (2,), lambda x: x - wide),
                Edit("mlp_out", (2,), torch.zeros_like, range(9)),
                Edit("attn_out", (0,), lambda x: x * 2, generated),
            ],
        ),
        "logits": Case(
            [{"type": "add", "selector": "logits", "vector": vocabulary.tolist(), "strength": 4}],
            [Edit("logits", (), lambda x: x + 4 * vocabulary)],
        ),
        "nothing": Case([], []),
    }


def _between(start: int, stop: int) -> dict[str, Any]:
    return {"positions": {"start": start, "stop": stop}}
