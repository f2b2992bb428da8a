"""What Sightline knows about each model family, as data: where every point of the public surface is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a point is read inside a layer: a module below the layer, one side of it, and how its last axis is cut.

    Attributes:
        module: path below the layer; "" is the layer itself.
        side: "output" or "input" of that module.
        heads: "query" or "kv" when the last axis is to be cut into that many heads, else None.
        third: for a fused projection, which third of the last axis.
    """

    module: str
    side: str = "output"
    heads: str | None = None
    third: int | None = None


@dataclass(frozen=True)
class Family:
    """A model family: the list of layers, the place of every point in a layer, and the parts of a layer.

    Attributes:
        layers: path of the list of layers.
        attention: the attention module, below a layer, as all that follows but `final_norm`.
        points: where each point is read.
        norm: "rms" (x / rms · w), "rms_plus_one" (x / rms · (1 + w)) or "layer" (LayerNorm).
        attn_norm, mlp_norm: the norms that attention and MLP read the residual stream through.
        attn_post_norm, mlp_post_norm: the norms of what they write, or None.
        final_norm: path of the norm before the output head.
        query_norm, key_norm: the norms of q and k per head, or None.
        projections: q, k, v and o; `third` when the first three are one module.
        mlp: the MLP module.
        gate, up, down: its projections; a gate of None is an MLP without one.
    """

    layers: str
    attention: str
    points: dict[str, Place]
    norm: str
    attn_norm: str
    mlp_norm: str
    final_norm: str
    projections: dict[str, Place]
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    mlp: str = "mlp"
    gate: str | None = None
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


def _llama_like(points: dict[str, Place] | None = None, **changes: str) -> Family:
    defaults = {
        "layers": "model.layers",
        "attention": "self_attn",
        "norm": "rms",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "final_norm": "model.norm",
        "gate": "mlp.gate_proj",
    }
    places = {
        "resid_pre": Place("", "input"),
        "q": Place("self_attn.q_proj", heads="query"),
        "k": Place("self_attn.k_proj", heads="kv"),
        "v": Place("self_attn.v_proj", heads="kv"),
        "z": Place("self_attn.o_proj", "input", heads="query"),
        "attn_out": Place("self_attn.o_proj"),
        "resid_mid": Place("post_attention_layernorm", "input"),
        "mlp_out": Place("mlp"),
        "resid_post": Place(""),
    }
    projections = {
        "q": Place("self_attn.q_proj", heads="query"),
        "k": Place("self_attn.k_proj", heads="kv"),
        "v": Place("self_attn.v_proj", heads="kv"),
        "o": Place("self_attn.o_proj"),
    }
    return Family(points=places | (points or {}), projections=projections, **(defaults | changes))  # type: ignore[arg-type]


FAMILIES: dict[str, Family] = {
    "llama": _llama_like(),
    "qwen2": _llama_like(),
    # q_norm and k_norm already work on [.., heads, d_head]
    "qwen3": _llama_like(
        {"q": Place("self_attn.q_norm"), "k": Place("self_attn.k_norm")},
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
    ),
    "gemma2": _llama_like(
        {
            "attn_out": Place("post_attention_layernorm"),
            "resid_mid": Place("pre_feedforward_layernorm", "input"),
            "mlp_out": Place("post_feedforward_layernorm"),
        },
        norm="rms_plus_one",
        mlp_norm="pre_feedforward_layernorm",
        attn_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    "gpt2": Family(
        layers="transformer.h",
        attention="attn",
        points={
            "resid_pre": Place("", "input"),
            "q": Place("attn.c_attn", heads="query", third=0),
            "k": Place("attn.c_attn", heads="query", third=1),
            "v": Place("attn.c_attn", heads="query", third=2),
            "z": Place("attn.c_proj", "input", heads="query"),
            "attn_out": Place("attn.c_proj"),
            "resid_mid": Place("ln_2", "input"),
            "mlp_out": Place("mlp"),
            "resid_post": Place(""),
        },
        norm="layer",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="transformer.ln_f",
        projections={
            "q": Place("attn.c_attn", heads="query", third=0),
            "k": Place("attn.c_attn", heads="query", third=1),
            "v": Place("attn.c_attn", heads="query", third=2),
            "o": Place("attn.c_proj"),
        },
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
}
