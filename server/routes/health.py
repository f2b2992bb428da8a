"""Health and metrics."""

from importlib.metadata import version
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.state import state_of

router = APIRouter(tags=["server"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the server runs, on what, and which models can serve. Needs no key."""
    registry = state_of(request).registry
    return {
        "status": "ok",
        "version": version("sightline"),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "gpu": _gpu(),
        "loaded_models": [entry.id for entry in registry.loaded],
        "queue_length": registry.queue_length,
    }


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    body, content_type = state_of(request).metrics.render()
    return Response(body, media_type=content_type)


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(), "memory_total": total, "memory_used": total - free}
