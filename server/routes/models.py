"""Loading and unloading models, and what could be loaded."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from attribution.model.hub import list_local_models
from attribution.model.load import LoadSpec
from server.registry import LoadedModel
from server.schemas import LoadBody, UnloadBody
from server.state import state_of

router = APIRouter(prefix="/models", tags=["models"])


@router.get("")
async def available(request: Request) -> dict[str, Any]:
    """The models on this machine, and those that are loaded."""
    state = state_of(request)
    found = await asyncio.to_thread(list_local_models, state.settings.models_dir)
    rows = [asdict(one) | {"path": None if one.path is None else str(one.path)} for one in found]
    return {"available": rows, "loaded": [describe(entry) for entry in state.registry.loaded]}


@router.post("/load")
async def load(request: Request, body: LoadBody) -> dict[str, Any]:
    """Load a model and prove its points; returns when it can serve."""
    state = state_of(request)
    spec = LoadSpec(
        model_id=body.model_id,
        device_map=body.device_map,
        dtype=body.dtype,
        attn_implementation=body.attn_implementation,
        revision=body.revision,
        quantization=body.quantization,
        trust_remote_code=state.settings.trust_remote_code,
    )
    entry = await state.registry.load(spec, tuple(savepoint.spec() for savepoint in body.savepoints))
    return {"ok": True} | describe(entry)


@router.post("/unload")
async def unload(request: Request, body: UnloadBody) -> dict[str, Any]:
    """Unload a model and free its memory."""
    return {
        "ok": True,
        "model": body.model_id,
        "bytes_freed": await state_of(request).registry.unload(body.model_id),
    }


def describe(entry: LoadedModel) -> dict[str, Any]:
    """What a loaded model is."""
    return entry.model.describe() | {"savepoints": [asdict(savepoint) for savepoint in entry.savepoints]}
