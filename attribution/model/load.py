"""Load a model: find it, read it, wrap it in nnsight, and prove its points."""

import os
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from attribution.errors import InvalidRequest, ModelLoadFailed
from attribution.model.families import FAMILIES
from attribution.model.fingerprint import fingerprint
from attribution.model.grouped import SDPA_GROUPED
from attribution.model.guard import gradient_refusal
from attribution.model.hub import resolve_alias
from attribution.model.probe import probe, prove
from attribution.model.quantised import (
    Snapshot,
    check_label,
    check_quantization,
    find_scheme,
    held_bytes,
    load_options,
    scheme_of,
    settle,
)
from attribution.model.traced import Dimensions, TracedModel
from attribution.model.twins import TWIN_BYTES, Twins

DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class LoadSpec:
    """What to load.

    Attributes:
        model_id: a hub id, an alias, a folder, or "demo" for the embedded model.
        device_map: "auto" (the GPUs when there are any, else the CPU), a device, or accelerate's map.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        attn_implementation: "sdpa", "eager" or another that transformers knows; None lets it choose, and on the CPU
            groups the heads of sdpa (`attribution.model.grouped`).
        revision: a branch, tag or commit on the hub.
        trust_remote_code: whether the checkpoint's own Python may run.
        quantization: "nf4" or "int8" quantise a dense checkpoint; these and "gptq" otherwise say what it must be; None
            follows its config.
        twin_bytes: how many bytes of dequantised weights are kept for the gradients of a quantised model.
    """

    model_id: str
    device_map: str | dict[str, Any] = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: str | None = None
    twin_bytes: int = TWIN_BYTES


def load(spec: LoadSpec) -> TracedModel:
    """Load and prove a model; run this on the thread that will own it.

    Raises:
        InvalidRequest: an unknown dtype or quantisation, or a GPU where there is none.
        ModelLoadFailed: the checkpoint cannot be found, read traced, or is not whole; the message says why.
    """
    if spec.dtype not in DTYPES:
        raise InvalidRequest(f"dtype is one of {', '.join(DTYPES)}; found {spec.dtype!r}", param="dtype")
    check_quantization(spec.quantization)
    started = time.perf_counter()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    source = resolve_alias(spec.model_id)
    try:
        module, tokenizer = _read(spec, source)
        model = _wrap(spec, source, module.eval().requires_grad_(False), tokenizer)
    except (InvalidRequest, ModelLoadFailed):
        raise
    except Exception as error:  # the libraries raise anything over a damaged or strange checkpoint
        raise _failed(spec, source, _reason(error)) from error
    return replace(
        model,
        load_seconds=time.perf_counter() - started,
        memory_bytes=held_bytes(module),
    )


def trace_model(model_id: str, module: Any, tokenizer: Any) -> TracedModel:
    """Wrap a transformers model that is already in memory; for notebooks and tests."""
    return _wrap(LoadSpec(model_id), model_id, module.eval().requires_grad_(False), tokenizer)


def _read(spec: LoadSpec, source: str) -> tuple[Any, Any]:
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise _failed(spec, source, "its tokenizer has no vocabulary; are the tokenizer's files there?")
    scheme = find_scheme(source, spec.quantization, **options)
    device_map = _device_map(spec.device_map)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
        device_map=device_map,
        attn_implementation=spec.attn_implementation,
        output_loading_info=True,
        **load_options(scheme, source, spec.dtype, device_map in (None, "cpu"), **options),
        **options,
    )
    module, info = loaded
    if spec.attn_implementation is None and _gains_from_grouping(module):
        module.set_attn_implementation(SDPA_GROUPED)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise _failed(spec, source, f"{len(missing)} of its weights are missing, {missing[0]} for one")
    if scheme is not None:
        check_label(source, scheme, _snapshot(spec, source, module))
        settle(module)
    return module, tokenizer


def _gains_from_grouping(module: Any) -> bool:
    sizes = Dimensions.of(module.config.get_text_config())
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return on_cpu and module.config._attn_implementation == "sdpa" and sizes.n_kv_heads < sizes.n_heads


def _failed(spec: LoadSpec, source: str, reason: str) -> ModelLoadFailed:
    hint = "" if os.path.isdir(source) else f" ({source!r} is not a folder here either)"
    return ModelLoadFailed(f"cannot load {spec.model_id!r}{hint}: {reason}", param="model_id")


def _reason(error: Exception) -> str:
    """The message of a library's error in one line, with its type where that says more."""
    text = " ".join(str(error).split())[:500]
    if text and isinstance(error, OSError | ValueError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _device_map(device_map: str | dict[str, Any]) -> str | dict[str, Any] | None:
    if torch.cuda.is_available():
        return device_map
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(str(one).startswith("cuda") for one in named):
        raise InvalidRequest("device names a GPU, and torch sees none here; take 'cpu' or 'auto'", param="device_map")
    return None if device_map == "auto" else device_map


def _wrap(spec: LoadSpec, source: str, module: Any, tokenizer: Any) -> TracedModel:
    kind = module.config.model_type
    family = FAMILIES.get(kind)
    model = TracedModel(
        id=spec.model_id,
        source=source,
        revision=getattr(module.config, "_commit_hash", None) or spec.revision,
        envoy=TransformersModel(module, tokenizer=tokenizer, task="text-generation"),
        tokenizer=tokenizer,
        dimensions=Dimensions.of(module.config.get_text_config()),
        family=family,
        note=None if family else f"its family {kind!r} has no points here; those with points are {', '.join(FAMILIES)}",
        end_token_ids=_end_tokens(module, tokenizer),
        sites={},
        fingerprint=fingerprint(module),  # before the first forward, at which quantised kernels may repack
    )
    if (scheme := scheme_of(module)) is not None:
        layers = "" if family is None else family.layers
        twins = Twins(module, layers, scheme, _snapshot(spec, source, module), model.work_dtype, spec.twin_bytes)
        model = replace(model, quantization=scheme.name, twins=twins)
    # nothing else of it is used, and `generate` would fill in what a request leaves open: an end token, a penalty
    module.generation_config = GenerationConfig()
    model = replace(model, sites=probe(model))
    if family is None:
        return model
    if model.twins is not None:
        model = replace(model, gradients_refused=gradient_refusal(model))
    failure = _failed_proof(model)
    if model.twins is not None:
        model.twins.clear()
    return model if failure is None else replace(model, family=None, note=f"its points failed their proof: {failure}")


def _snapshot(spec: LoadSpec, source: str, module: Any) -> Snapshot:
    revision = getattr(module.config, "_commit_hash", None) or spec.revision
    return Snapshot(source, revision, f"{module.base_model_prefix}.")


def _end_tokens(module: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for holder in (module.generation_config, module.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)


def _failed_proof(model: TracedModel) -> str | None:
    try:
        return prove(model)
    except Exception as error:  # points whose proof cannot even be carried out are not proved
        return _reason(error)
