"""`POST /compare`: several models side by side, loaded or not."""

import asyncio
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from attribution.operations.compare import compare, planned
from server.bodies import read_arguments, wanted_type
from server.comparing import compared
from server.pieces import answer
from server.routes.operations import add_route, checked_arguments, held
from server.state import state_of

router = APIRouter()


async def _handle(request: Request, stack: Annotated[ExitStack, Depends(held)]) -> Response:
    state, kind = state_of(request), wanted_type(request)
    checked = await checked_arguments(compare, await read_arguments(request, state.room, stack))
    checked.pop("show_progress")
    loaded = tuple(entry.id for entry in state.registry.loaded)
    plan = await asyncio.to_thread(planned, **checked, loaded=loaded)
    work = compared(state.registry, plan, trust_remote_code=state.settings.trust_remote_code)
    return await answer(request, work, kind)


add_route(router, compare, _handle)
