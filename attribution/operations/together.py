"""Many calls in one: what a call costs over HTTP beside its work is paid once for all of them."""

import time
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, TypeAdapter, WithJsonSchema, with_config
from typing_extensions import TypedDict

from attribution.errors import InvalidArgument, SightlineError
from attribution.operation import Operation, Progress, Steps, operation
from attribution.operations import ablations, getters, gradients, patching, scores

if TYPE_CHECKING:
    from attribution.session import LocalSession

READING: dict[str, Operation] = {
    value.name: value
    for module in (getters, gradients, scores, ablations, patching)
    for value in vars(module).values()
    if isinstance(value, Operation)
}
"""The operations that read stored samples and change nothing."""
_PIECE = 0.02
"""Seconds of work after which others may use the model: each change of threads costs as much as a short call."""


@with_config(ConfigDict(extra="forbid"))
class Call(TypedDict):
    """An operation by its name, with its arguments by theirs."""

    operation: str
    arguments: dict[str, Any]


CallArg = Annotated[Call, WithJsonSchema(TypeAdapter(Call).json_schema())]
"""Its schema is written out where it stands, since the OpenAPI page follows no references."""


@operation()
def run_calls(
    session: "LocalSession", calls: list[CallArg], show_progress: bool = False, device: str = "cpu"
) -> Steps[list[Any]]:
    """Run several operations on stored samples, one after the other, and return their results in this order.

    Each is what a call of its own would be, and others may use the model between two of them. The first that is
    refused ends them all.

    Args:
        calls: each `{"operation": "attribute_residual", "arguments": {…}}`, of an operation that reads stored samples.
    """
    if not calls:
        raise InvalidArgument("calls is empty; it lists at least one", param="calls")
    results: list[Any] = []
    told = time.perf_counter()
    for number, call in enumerate(calls):
        try:
            chosen = _chosen(call)
            steps = chosen.start(session, chosen.validate({"device": device} | call["arguments"]))
            while len(results) == number:
                try:
                    next(steps)
                except StopIteration as end:
                    results.append(end.value)
                if time.perf_counter() - told > _PIECE or len(results) == len(calls):
                    yield Progress(len(results), len(calls))
                    told = time.perf_counter()
        except SightlineError as error:
            error.message = f"calls.{number}, {call['operation']}: {error.message}"
            error.args = (error.message,)
            raise
    return results


def _chosen(call: Call) -> Operation:
    if call["operation"] not in READING:
        raise InvalidArgument(f"it is none of {', '.join(READING)}", param="calls")
    return READING[call["operation"]]
