"""Load a model: find it, read it, wrap it in nnsight, and prove its points."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from attribution.errors import InvalidRequest, ModelLoadFailed
from attribution.model.families import FAMILIES
from attribution.model.hub import resolve_alias
from attribution.model.probe import probe, prove
from attribution.model.traced import Dimensions, TracedModel

DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class LoadSpec:
    """What to load.

    Attributes:
        model_id: a hub id, an alias, a folder, or "demo" for the embedded model.
        device_map: "auto" (the GPUs when there are any, else the CPU), a device, or accelerate's map.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        attn_implementation: "sdpa", "eager" or another that transformers knows; None lets it choose.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: whether the checkpoint's own Python may run.
    """

    model_id: str
    device_map: str | dict[str, Any] = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def load(spec: LoadSpec) -> TracedModel:
    """Load and prove a model; run this on the thread that will own it.

    Raises:
        InvalidRequest: an unknown dtype.
        ModelLoadFailed: the checkpoint cannot be found or read; the message carries the reason.
    """
    if spec.dtype not in DTYPES:
        raise InvalidRequest(f"dtype is one of {', '.join(DTYPES)}; found {spec.dtype!r}", param="dtype")
    started = time.perf_counter()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    source = resolve_alias(spec.model_id)
    module, tokenizer = _read(spec, source)
    module.eval().requires_grad_(False)
    model = _wrap(spec, source, module, tokenizer)
    return replace(
        model,
        load_seconds=time.perf_counter() - started,
        memory_bytes=sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())),
    )


def trace_model(model_id: str, module: Any, tokenizer: Any) -> TracedModel:
    """Wrap a transformers model that is already in memory; for notebooks and tests."""
    return _wrap(LoadSpec(model_id), model_id, module.eval().requires_grad_(False), tokenizer)


def _read(spec: LoadSpec, source: str) -> tuple[Any, Any]:
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        module = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
            device_map=_device_map(spec.device_map),
            attn_implementation=spec.attn_implementation,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        hint = "" if Path(source).is_dir() else f" ('{source}' is not a folder here either)"
        raise ModelLoadFailed(f"cannot load {spec.model_id!r}{hint}: {reason}", param="model_id") from error
    return module, tokenizer


def _device_map(device_map: str | dict[str, Any]) -> str | dict[str, Any] | None:
    if device_map == "auto" and not torch.cuda.is_available():
        return None
    return device_map


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
        note=None
        if family
        else f"its family {kind!r} has no points here; those with points are {', '.join(FAMILIES)}",
        sites={},
    )
    model = replace(model, sites=probe(model))
    if family is None:
        return model
    failure = prove(model)
    return (
        model
        if failure is None
        else replace(model, family=None, note=f"its points failed their proof: {failure}")
    )
