"""Recorded runs: list, look at, download, delete."""

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from safetensors.torch import save as save_safetensors

from attribution.errors import InvalidRequest, StorageFailed
from server.state import state_of

router = APIRouter(prefix="/runs", tags=["runs"])


@router.get("")
async def runs(request: Request) -> dict[str, Any]:
    """The recorded runs, newest first."""
    return {"runs": await asyncio.to_thread(state_of(request).runs.summaries)}


@router.get("/{run_id}")
async def run(request: Request, run_id: str) -> dict[str, Any]:
    """The run.json of one run."""
    return await asyncio.to_thread(state_of(request).runs.read, run_id)


@router.get("/{run_id}/{choice}/{name}", response_model=None)
async def tensor(
    request: Request,
    run_id: str,
    choice: int,
    name: str,
    file_format: Annotated[Literal["pt", "safetensors"], Query(alias="format")] = "pt",
    start: Annotated[int | None, Query(ge=0)] = None,
    stop: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """One tensor of a run, whole or rows [start, stop) of its position axis."""
    store = state_of(request).runs
    record = await asyncio.to_thread(store.read, run_id)
    path = await asyncio.to_thread(store.file, run_id, choice, name)
    if file_format == "pt" and start is None and stop is None:
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)
    meta = record["choices"][choice]["activations"][name]
    body = await asyncio.to_thread(_packed, path, meta, file_format, start, stop)
    return Response(body, media_type="application/octet-stream")


@router.delete("/{run_id}")
async def delete(request: Request, run_id: str) -> dict[str, Any]:
    """Delete a run."""
    freed = await asyncio.to_thread(state_of(request).runs.delete, run_id)
    return {"deleted": True, "run_id": run_id, "bytes_freed": freed}


def _packed(path: Path, meta: dict[str, Any], file_format: str, start: int | None, stop: int | None) -> bytes:
    try:
        tensor = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError) as error:
        raise StorageFailed(f"{path} cannot be read: {error}") from error
    rows = tensor.shape[meta["axis"]]
    first, last = start or 0, rows if stop is None else stop
    if not first <= last <= rows:
        raise InvalidRequest(f"start and stop select rows of 0 to {rows}; found {start}:{stop}", param="start")
    tensor = tensor.narrow(meta["axis"], first, last - first)
    tensor = tensor.contiguous().clone()
    if file_format == "safetensors":
        return save_safetensors({path.stem: tensor})
    buffer = BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()
