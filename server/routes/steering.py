"""Steering vectors: list, look at, delete. `POST /steering/vectors`, which computes one, is an operation.

These need no loaded model, and show the vectors of all of them.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from attribution.steering import VectorStore
from server.bodies import reply, wanted_type
from server.state import state_of

router = APIRouter(prefix="/steering/vectors", tags=["steering"])


@router.get("")
async def vectors(request: Request) -> dict[str, Any]:
    """All steering vectors, by name."""
    found = await asyncio.to_thread(_store(request).list)
    return {"vectors": found, "count": len(found)}


@router.get("/{name}", response_model=None)
async def vector(request: Request, name: str) -> Response:
    """One steering vector with its numbers, in JSON or, as `Accept` has it, in an envelope of safetensors."""
    found = await asyncio.to_thread(_store(request).read, name)
    return await reply(found.describe() | {"vector": found.vector}, wanted_type(request))


@router.delete("/{name}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Delete a steering vector."""
    freed = await asyncio.to_thread(_store(request).delete, name)
    return {"deleted": True, "name": name, "bytes_freed": freed}


def _store(request: Request) -> VectorStore:
    return state_of(request).registry.vectors
