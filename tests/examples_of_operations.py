"""A call of every operation, and calls that it refuses; what `test_local_remote` runs on both sides.

A new operation takes three lines here: its name, the arguments, and what of them can be wrong.
"""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.autoencoders import N_FEATURES, save_random
from tests.models import D_MODEL, N_HEADS, N_LAYERS

DATASET, LENGTHS = "set", (11, 8, 13)
FOLDER = Path(tempfile.mkdtemp())  # of autoencoders, which are read where the model is
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
PROMPTS = [[(7 * length + 3 * at) % 250 for at in range(length)] for length in LENGTHS]


@dataclass(frozen=True)
class Example:
    """Arguments that work; each of `bad` changes some of them into a call that is refused.

    `varies`: keys of the result that no two calls share.
    """

    arguments: dict[str, Any]
    bad: tuple[dict[str, Any], ...] = ()
    varies: tuple[str, ...] = ()


def grads(*shape: int) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(0))


ABSENT: tuple[dict[str, Any], ...] = (
    {"dataset_id": "absent"},
    {"dataset_id": "not a name"},
    {"sample_id": 99},
    {"sample_id": -1},
    {"sample_id": 1.5},
)
LAYER: tuple[dict[str, Any], ...] = ({"layer": N_LAYERS + 1}, {"layer": True}, {"layer": "0"})
POSITIONS: tuple[dict[str, Any], ...] = ({"pos_ids": [LENGTHS[0]]}, {"pos_ids": [2, 2]}, {"pos_ids": []})

SAMPLE = {"dataset_id": DATASET, "sample_id": 0}
AT = SAMPLE | {"layer": 1, "pos_ids": [4, 2, 9]}
HEAD = AT | {"head": 5}
ANSWER = {"labels": [5, 6, 7], "candidate_ids": [4, 5, 6, 7]}
CONTRAST = {"positive": ["yes, and", PROMPTS[0]], "negative": ["no", PROMPTS[1], PROMPTS[2]]}
NODE = HEAD | {"node_type": "attn_v", "output_grad": grads(1, 3), "src_pos_ids": [0, 1]}
RESIDUAL = SAMPLE | {"pos_ids": [4, 2, 9], "downstream_grads": grads(2, 1, 3), "downstream_layers": [2, 2.5]}
BAD_NODE = (
    *ABSENT,
    *LAYER,
    {"node_type": "attn_x"},
    {"head": N_HEADS},
    {"output_grad": grads(1, 2)},
    {"output_grad": None},
    {"output_grad": [1.0]},
    {"rule": "trapezoid"},
    {"steps": -1},
)

KNOCKOUT = {
    "token_ids": PROMPTS[0],
    "layers": "1:",
    "heads": [5, 0],
    "edges": [[-1, 0], ["4:6", 2]],
    "tokens": [3, " the"],
}
BAD_KNOCKOUT = (
    {"prompt": "both"},
    {"tokens": ["several tokens"]},
    {"tokens": [100_000]},
    {"position": LENGTHS[0]},
)
PATCHED = ANSWER | {
    "dataset_id": DATASET,
    "clean_id": 2,
    "corrupted_id": 0,
    "positions": [1, 2],
    "pos_ids": [1, 2, 3],
    "against": [4, 4, 4],
}
BAD_PATCH = (
    {"clean_id": 99},
    {"corrupted_id": "absent"},
    {"clean_dataset_id": "absent"},
    {"positions": None},
    {"positions": [LENGTHS[0]]},
    {"positions": [1, 1]},
    {"pos_ids": [LENGTHS[0], 1, 2]},
    {"labels": None},
    {"against": [4]},
)

EXAMPLES: dict[str, Example] = {
    "forward": Example(
        SAMPLE | {"sample_id": "new", "prompt": "Hello there"},
        (
            {"prompt": None},
            {"prompt": ""},
            {"token_ids": [1]},
            {"prompt": None, "token_ids": [100_000]},
            {"prompt": None, "run_id": "0" * 32},
            {"prompt": None, "token_ids": [1] * 500},
            {"sample_id": 0},
        ),
    ),
    "batch_forward": Example(
        {"dataset_id": "many", "prompts": ["one", "and two", PROMPTS[0]], "sample_ids": [3, "b", 1]},
        ({"sample_ids": [1]}, {"sample_ids": [1, 1, 2]}, {"prompts": []}, {"prompts": ["a", [], "c"]}, {"prompts": 7}),
    ),
    "estimate_memory": Example({"prompts": ["one", "two"]}, ({"prompts": [""]},), ("disk_free", "memory_available")),
    "list_cached_samples": Example({"dataset_id": DATASET}, ({"dataset_id": "absent"}, {"dataset_id": "../x"})),
    "clear_cache": Example({"dataset_id": "gone"}, ({"dataset_id": "absent"}, {"dataset_id": ".."}), ("bytes",)),
    "clear_all_cache": Example({}, (), ("bytes",)),
    "empty_cuda_cache": Example({}),
    "get_hidden_states": Example(AT, (*ABSENT, *LAYER, *POSITIONS)),
    "get_attn_weights": Example(HEAD, (*ABSENT, *LAYER, *POSITIONS, {"head": N_HEADS})),
    "get_attn_weights_batch": Example(
        {"dataset_id": DATASET, "sample_ids": [0, 2], "layer": 1, "head": 5, "pos_ids": [4, 2]},
        ({"sample_ids": [0, 99]}, {"sample_ids": []}, {"pos_ids": [50]}, {"head": -1}),
    ),
    "get_head_output": Example(HEAD, (*ABSENT, *LAYER, *POSITIONS, {"head": N_HEADS})),
    "get_attn_output": Example(AT, (*ABSENT, *LAYER, *POSITIONS)),
    "get_mlp_output": Example(AT, (*ABSENT, *LAYER, *POSITIONS)),
    "compute_node_gradient": Example(NODE, BAD_NODE),
    "node_gradient_report": Example(
        SAMPLE | ANSWER | {"node_type": "lm_head", "layer": N_LAYERS, "pos_ids": [1, 2, 3], "sample_id": None},
        ({"labels": [5, 6]}, {"labels": [5, 6, 99]}, {"labels": None}, {"candidate_ids": [5, 5]}),
    ),
    "compute_node_gradient_batch": Example(
        {"dataset_id": DATASET, "sample_ids": [2, 0], "output_grads": grads(2, 1, 3)}
        | {"node_type": "mlp_i", "layer": 2, "pos_ids": [1, 2, 3], "steps": 0},
        ({"output_grads": grads(1, 1, 3)}, {"output_grads": [1]}, {"sample_ids": []}, {"sample_ids": [2, 98]}),
    ),
    "attribute_residual": Example(
        RESIDUAL,
        (*ABSENT, *POSITIONS, {"downstream_layers": [2]}, {"from_layer": 9}, {"downstream_grads": grads(2, 2)}),
    ),
    "attribute_residual_terms": Example(RESIDUAL, (*ABSENT, {"to_layer": 7}, {"downstream_layers": ["x", 1]})),
    "attribute_attn_weights": Example(
        HEAD | {"downstream_grads": [grads(1, 3), grads(1, 3) * 2]},
        (*ABSENT, *LAYER, *POSITIONS, {"head": N_HEADS}, {"downstream_grads": []}),
    ),
    "ablate": Example(
        SAMPLE
        | ANSWER
        | {"heads": [(0, 1), (2, 5)], "mlps": [1], "mode": "mean", "pos_ids": [1, 2, 3]}
        | {"layers": [0], "positions": [2, 0]},
        (
            *ABSENT,
            {"heads": [(0, N_HEADS)]},
            {"heads": [0]},
            {"mlps": [N_LAYERS]},
            {"layers": [-1]},
            {"positions": []},
            {"mode": "noise"},
            {"mode": "resample"},
            {"source_id": 1},
            {"labels": [5]},
        ),
    ),
    "gradient_x_activation": Example(
        SAMPLE | ANSWER | {"pos_ids": [1, 2, 3], "mode": "mean"},
        (*ABSENT, *POSITIONS, {"labels": None}, {"labels": [5]}, {"mode": "noise"}, {"mode": "position_mean"}),
    ),
    "run_calls": Example(
        {
            "calls": [
                {"operation": "attribute_residual", "arguments": RESIDUAL},
                {"operation": "ablate", "arguments": SAMPLE | ANSWER | {"heads": [(0, 1)], "pos_ids": [1, 2, 3]}},
                {"operation": "get_head_output", "arguments": HEAD},
            ]
        },
        (
            {"calls": []},
            {"calls": [{"operation": "clear_cache", "arguments": {"dataset_id": DATASET}}]},
            {"calls": [{"operation": "get_head_output"}]},
            {"calls": [{"operation": "get_head_output", "arguments": HEAD | {"layer": N_LAYERS}}]},
            {"calls": [{"operation": "get_head_output", "arguments": HEAD | {"colour": 1}}]},
        ),
    ),
    "ablate_sweep": Example(
        SAMPLE | ANSWER | {"sets": [{"heads": [(0, 1)]}, {"mlps": [1]}, {}], "mode": "mean", "pos_ids": [1, 2, 3]},
        (
            *ABSENT,
            {"sets": []},
            {"sets": [{"heads": [(0, 1)]}, {"heads": [(N_LAYERS, 0)]}]},
            {"sets": [{"experts": [1]}]},
            {"sets": [{"layers": [N_LAYERS]}]},
            {"sets": None},
            {"over": "heads"},
            {"mode": "position_mean"},
            {"mode": "resample"},
            {"mode": "resample", "source_id": [0, 2]},
            {"mode": "resample", "source_id": 0, "source_dataset_id": "absent"},
        ),
    ),
    "patch": Example(
        PATCHED | {"heads": [(0, 1)], "points": ["resid_mid[1:]", "mlp_out[0]"]},
        (
            *BAD_PATCH,
            {"heads": None, "points": None},
            {"heads": [(0, N_HEADS)]},
            {"points": ["z[0]", "pattern[1]"]},
            {"points": [f"z[{N_LAYERS}]"]},
        ),
    ),
    "patch_sweep": Example(
        PATCHED | {"over": "heads", "per_position": True, "layers": [2, 0]},
        (*BAD_PATCH, {"over": "pattern"}, {"layers": [N_LAYERS]}, {"layers": [1, 1]}),
    ),
    "knockout": Example(
        KNOCKOUT | {"include_patterns": True, "position": -2, "top_k": 3},
        (
            *BAD_KNOCKOUT,
            {"layers": N_LAYERS},
            {"layers": "most"},
            {"heads": [N_HEADS]},
            {"edges": [[-1, LENGTHS[0]]]},
            {"edges": [[2, 5]]},
            {"edges": [[3, "*"]]},
            {"edges": [[1, 0, 0]]},
            {"top_k": 0},
            {"specifications": [{}]},
        ),
    ),
    "knockout_sweep": Example(
        {name: KNOCKOUT[name] for name in ("token_ids", "tokens")}
        | {"specifications": [{"layers": 1, "heads": [head]} for head in range(N_HEADS)] + [{"edges": [["*", 1]]}, {}]},
        (*BAD_KNOCKOUT, {"specifications": []}, {"specifications": [{}, {"heads": [N_HEADS]}]}),
    ),
    "create_steering_vector": Example(
        CONTRAST | {"name": "made", "selector": "resid_post[1:]", "normalise": "unit", "overwrite": True},
        (
            {"name": "../x"},
            {"name": "kept", "overwrite": False},
            {"positive": []},
            {"positive": "one text"},
            {"negative": ["a", []]},
            {"negative": [[100_000]]},
            {"negative": CONTRAST["positive"]},
            {"selector": f"resid_post[{N_LAYERS}]"},
            {"selector": "pattern[0]"},
            {"selector": "logits"},
            {"positions": "first"},
            {"positions": {"start": 99}},
            {"positions": "generated"},
            {"normalise": 0},
            {"normalise": True},
            {"normalise": "max"},
        ),
        ("provenance",),
    ),
    "save_feature_vector": Example(
        {"name": "direction", "source": "kept", "index": 3, "normalise": "unit", "overwrite": True},
        (
            {"name": "../x"},
            {"name": "kept", "overwrite": False},
            {"source": "absent"},
            {"source": None, "layer": N_LAYERS},
            {"index": N_FEATURES},
            {"index": -1},
            {"normalise": 0},
        ),
        ("provenance",),
    ),
    "list_steering_vectors": Example({}, (), ("vectors",)),
    "get_steering_vector": Example({"name": "kept"}, ({"name": "absent"}, {"name": "a/b"}), ("provenance",)),
    "delete_steering_vector": Example({"name": "gone"}, ({"name": "absent"}, {"name": ".x"}), ("bytes_freed",)),
    "lens": Example(
        {"token_ids": PROMPTS[0], "layers": [0, -1], "positions": "-3:", "top_k": 2, "tokens": [7, " the"]},
        (
            {"token_ids": None},
            {"prompt": "x"},
            {"dataset_id": DATASET},
            {"token_ids": None, "dataset_id": DATASET},
            {"token_ids": None, "dataset_id": DATASET, "sample_id": 99},
            {"layers": N_LAYERS + 1},
            {"layers": "first"},
            {"positions": [0, -LENGTHS[0]]},
            {"top_k": 0},
            {"tokens": ["two words"]},
        ),
    ),
    "features_topk": Example(
        {"text": ["the rest", "or in a while"], "k": 4, "positions": [0, -1]},
        (
            {"text": None},
            {"text": []},
            {"text": ["a", ""]},
            {"messages": []},
            {"layer": N_LAYERS},
            {"layer": 0},
            {"source": "absent"},
            {"k": N_FEATURES + 1},
            {"k": 0},
            {"positions": "generated"},
            {"positions": [99]},
            {"positions": [0, 0]},
            {"positions": 1.5},
            {"text": None, "dataset_id": DATASET},
            {"text": None, "dataset_id": DATASET, "sample_id": 99},
            {"text": None, "run_id": "0" * 32},
        ),
    ),
    "load_features": Example(
        {"folder": str(FOLDER / "kept"), "name": "kept", "descriptions": str(FOLDER / "said.jsonl")},
        (
            {"folder": str(FOLDER / "absent")},
            {"folder": str(FOLDER)},
            {"folder": str(FOLDER / "wide")},
            {"folder": str(FOLDER / "deep")},
            {"folder": str(FOLDER / "other")},
            {"folder": str(FOLDER / "second")},
            {"name": "a b"},
            {"point": "resid_post[0]"},
            {"point": "resid[0]"},
            {"writes": "mlp_out[1]"},
            {"descriptions": str(FOLDER / "absent")},
            {"source_id": "5-res"},
            {"model_name": "another"},
        ),
    ),
    "list_features": Example({}),
    "describe_feature": Example(
        {"source": "kept", "index": 3, "top_k": 4},
        ({"source": "absent"}, {"index": N_FEATURES}, {"index": -1}, {"top_k": 0}),
    ),
    "trace_circuit": Example(
        {
            "token_ids": PROMPTS[1],
            "targets": [3, " the"],
            "sources": ["gone"],
            "max_feature_nodes": 12,
            "thresholds": {"edge": 0.9},
            "position": -2,
            "checks": 2,
        },
        (
            {"token_ids": None},
            {"prompt": "both"},
            {"targets": []},
            {"targets": ["two words"]},
            {"targets": [3, 3]},
            {"targets": [100_000]},
            {"thresholds": {"node": 1.5}},
            {"thresholds": {"nodes": 0.5}},
            {"max_feature_nodes": 0},
            {"max_logits": 0},
            {"logit_probability": 0.0},
            {"position": LENGTHS[1]},
            {"sources": []},
            {"sources": ["absent"]},
            {"sources": ["gone", "kept"]},
            {"checks": -1},
            {"max_bytes": 1000},
            {"max_bytes": 70_000},
            {"slug": "a b"},
        ),
    ),
    "search_features": Example(
        {"query": "THREE", "limit": 2},
        ({"query": " "}, {"limit": 0}, {"source": "absent"}, {"layer": 0}),
    ),
    "unload_features": Example({"source": "gone"}, ({"source": "absent"},)),
    "measure_text": Example(
        {"sentences": ["the rest is in a while", "ä 漢"], "domain_terms": ["rest", "t", "漢", "absent"]},
        (
            {"sentences": []},
            {"sentences": "one text"},
            {"sentences": ["a", ""]},
            {"sentences": ["a " * 300]},
            {"domain_terms": [""]},
            {"domain_terms": ["a", "a"]},
            {"domain_terms": "a"},
            {"top_features": -1},
            {"top_features": 10_000},
        ),
    ),
    "compare": Example(
        {"models": ["demo"], "sentences": ["paint right", "K B"], "domain_terms": ["right"]},
        (
            {"models": []},
            {"models": ["demo", "demo"]},
            {"models": ["demo", "no/such-model"]},
            {"models": "demo"},
            {"sentences": []},
            {"sentences": ["a " * 3000]},
            {"domain_terms": ["a", "a"]},
            {"dtype": "float8"},
            {"model": "demo"},
        ),
    ),
}


def store_samples(session: Any) -> None:
    """What the examples read, and what those that delete delete."""
    for number, tokens in enumerate(PROMPTS):
        session.forward(DATASET, number, token_ids=tokens)
    session.forward("gone", 0, token_ids=PROMPTS[0])
    for name in ("kept", "gone"):
        session.create_steering_vector(name, selector="mlp_out[1]", overwrite=True, **CONTRAST)
    for name in ("kept", "gone"):
        session.load_features(str(FOLDER / name), name, overwrite=True)


def save_autoencoders() -> None:
    """Those that the examples load, and those that are refused."""
    save_random(FOLDER / "kept")
    save_random(FOLDER / "gone", "mlp_in[2]", "mlp_out[2]", n_features=60)
    save_random(FOLDER / "second", "attn_out[0]")
    save_random(FOLDER / "wide", d_in=D_MODEL + 1, d_dec=D_MODEL + 1)
    save_random(FOLDER / "deep", f"resid_pre[{N_LAYERS}]")
    save_random(FOLDER / "other", name="gpt2-small")
    said = ['{"index": 3, "description": "three", "layer": "1-res"}', "broken", '{"index": 70, "description": "x"}']
    (FOLDER / "said.jsonl").write_text("\n".join(said))


save_autoencoders()
