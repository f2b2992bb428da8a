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
    """A model family: the list of layers, and the place of every point in a layer."""

    layers: str
    attention: str
    points: dict[str, Place]


def _llama_like(**changes: Place) -> Family:
    points = {
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
    return Family(layers="model.layers", attention="self_attn", points=points | changes)


FAMILIES: dict[str, Family] = {
    "llama": _llama_like(),
    "qwen2": _llama_like(),
    # q_norm and k_norm already work on [.., heads, d_head]
    "qwen3": _llama_like(q=Place("self_attn.q_norm"), k=Place("self_attn.k_norm")),
    "gemma2": _llama_like(
        attn_out=Place("post_attention_layernorm"),
        resid_mid=Place("pre_feedforward_layernorm", "input"),
        mlp_out=Place("post_feedforward_layernorm"),
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
    ),
}
