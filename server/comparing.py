"""Comparing models on a server: each on its own thread, and those that are not loaded one after the other."""

import asyncio
from contextlib import aclosing
from typing import Any

from attribution.compare.plan import Plan
from attribution.compare.together import combined
from attribution.errors import SightlineError
from attribution.model.hub import canonical
from attribution.operations.compare import free_memory
from server.pieces import Outcome, Pieces, pieces
from server.registry import ModelRegistry


async def compared(registry: ModelRegistry, plan: Plan, *, trust_remote_code: bool) -> Pieces:
    """Measure every model of a plan, and put what was found side by side; a model that fails does not end it.

    Raises:
        SightlineError: all of them failed.
    """
    found: dict[str, dict[str, Any] | SightlineError] = {}
    for number, name in enumerate(plan.models):
        yield plan.progress(number)
        try:
            async with aclosing(_measured(registry, plan, name, trust_remote_code)) as work:
                async for step in work:
                    if isinstance(step, Outcome):
                        found[name] = step.value
                    else:
                        yield plan.progress(number, step)
        except SightlineError as error:
            found[name] = type(error)(error.message, param=error.param)  # without the frames that hold the model
        free_memory()
    yield Outcome(await asyncio.to_thread(combined, plan.given, found))


async def _measured(registry: ModelRegistry, plan: Plan, name: str, trust_remote_code: bool) -> Pieces:
    loaded = next((entry for entry in registry.loaded if entry.id == canonical(name)), None)
    if loaded is not None:
        loaded.worker.refuse_when_full()
        async with aclosing(pieces(loaded.worker, plan.steps(loaded.session))) as work:
            async for step in work:
                yield step
        return
    async with registry.guest(plan.spec(name, trust_remote_code=trust_remote_code)) as guest:
        async with aclosing(pieces(guest.worker, plan.steps(guest.session))) as work:
            async for step in work:
                yield step
