"""Autoencoders: list, look at one or at one of its features, let go. What computes is an operation: `POST /features/…`.

The list needs no loaded model, and shows the autoencoders of all of them, with those that wait or failed.
"""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from attribution.errors import InvalidArgument, SourceNotFound
from server.state import state_of

router = APIRouter(prefix="/features", tags=["features"])

ModelId = Annotated[
    str | None, Query(description="The model; else any, where one alone has an autoencoder of this name.")
]


@router.get("")
async def sources(request: Request, model_id: ModelId = None) -> dict[str, Any]:
    """The autoencoders, with `status` "ready", "waiting" (for their model to be loaded) or "failed", and the reason."""
    rows = await asyncio.to_thread(state_of(request).registry.features.status)
    rows = [row for row in rows if model_id in (None, row["model_id"])]
    return {"sources": rows, "count": len(rows)}


@router.get("/{source}")
async def source(request: Request, source: str, model_id: ModelId = None) -> dict[str, Any]:
    """One autoencoder."""
    return await asyncio.to_thread(_row, request, source, model_id)


@router.get("/{source}/{index}")
async def feature(
    request: Request, source: str, index: int, model_id: ModelId = None, top_k: int = 10
) -> dict[str, Any]:
    """One feature: what `describe_feature` returns."""
    row = await asyncio.to_thread(_row, request, source, model_id)
    loaded = state_of(request).registry.choose(model_id or row["model_id"])
    work = loaded.worker.submit(lambda: loaded.session.describe_feature(source, index, top_k))
    return await asyncio.wrap_future(work)


@router.delete("/{source}")
async def unload(request: Request, source: str, model_id: ModelId = None) -> dict[str, Any]:
    """Forget an autoencoder and free its memory; its files stay."""
    row = await asyncio.to_thread(_row, request, source, model_id)
    await asyncio.to_thread(state_of(request).registry.features.remove, row["model_id"], source)
    return {"unloaded": True, "source": source}


def _row(request: Request, name: str, model_id: str | None) -> dict[str, Any]:
    """What is known of the autoencoder of this name."""
    rows = state_of(request).registry.features.status()
    fits = [row for row in rows if row["name"] == name and model_id in (None, row["model_id"])]
    if not fits:
        names = ", ".join(f"{row['name']!r} of {row['model_id']!r}" for row in rows) or "none"
        of = "" if model_id is None else f" of {model_id!r}"
        raise SourceNotFound(f"no autoencoder {name!r}{of}; there is {names}", param="source")
    if len(fits) > 1:
        models = ", ".join(repr(row["model_id"]) for row in fits)
        raise InvalidArgument(
            f"{name!r} is an autoencoder of several models ({models}); give model_id", param="model_id"
        )
    return fits[0]
