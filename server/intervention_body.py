"""An intervention as a request has it: which fields each type takes, and whether they go together."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

from attribution.arguments import DatasetId, Positions
from attribution.errors import InvalidRequest
from attribution.interventions.edges import EdgeArg, Selection
from attribution.interventions.functions import Normalise

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

_SITE = ("selector", "positions", "heads")
_FIELDS: dict[str, tuple[str, ...]] = {
    "add": (*_SITE, "vector", "name", "strength", "normalise"),
    "scale": (*_SITE, "factor"),
    "ablate": (*_SITE, "mode", "dataset_id", "value"),
    "project_out": (*_SITE, "vector", "name"),
    "knockout": ("layers", "heads", "edges"),
    "feature": ("source", "layer", "index", "operation", "strength", "value", "positions", "normalise"),
}
"""What each type takes."""
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "add": (("selector",), ("vector", "name")),
    "scale": (("selector",), ("factor",)),
    "ablate": (("selector",),),
    "project_out": (("selector",), ("vector", "name")),
    "knockout": (("layers",), ("edges",)),
    "feature": (("index",),),
}
"""Of what it needs, each group has to have exactly one given."""


def one_of(param: str, kinds: str) -> WrapValidator:
    """Say what a field with several shapes takes, in place of one error per shape."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            raise InvalidRequest(f"{param} is {kinds}; found {str(value)[:80]!r}", param=param) from error

    return WrapValidator(check)


def _numbers(value: object) -> object:
    """One finite number or a list of them."""
    given = value if isinstance(value, list) else [value]
    wrong = [
        one for one in given if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one)
    ]
    if value is not None and wrong:
        which = f"; {str(wrong[0])[:80]!r} is none" if isinstance(value, list) else ""
        raise ValueError(f"a finite number, or a list of them, is expected{which}")
    return value


class Strict(BaseModel):
    """A body whose unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InterventionBody(Strict):
    """An intervention of a request; `_FIELDS` says what each type takes."""

    type: Literal["add", "scale", "ablate", "project_out", "knockout", "feature"]
    selector: str | None = None
    positions: Any = None
    heads: Positions | None = None
    vector: list[_Number] | None = None
    name: str | None = None
    strength: _Number | None = None
    normalise: Normalise | None = None
    factor: _Number | None = None
    mode: Literal["zero", "mean"] | None = None
    dataset_id: DatasetId | None = None
    value: Annotated[list[float] | float | None, BeforeValidator(_numbers)] = None
    source: str | None = None
    layer: Annotated[int, Field(strict=True)] | None = None
    index: Annotated[int, Field(strict=True)] | None = None
    operation: Literal["add", "clamp"] | None = None
    layers: Selection | None = None
    edges: list[EdgeArg] | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The fields that were set, null counting as left out."""
        fields = type(self).model_fields
        return tuple(name for name in fields if name != "type" and getattr(self, name) is not None)


def check_fields(body: InterventionBody) -> None:
    """See that an intervention has what its type needs, and nothing that it does not take.

    Raises:
        InvalidRequest: naming the field.
    """
    takes = _FIELDS[body.type]
    for name in body.given:
        if name not in takes:
            hint = "; the edges say which positions" if (body.type, name) == ("knockout", "positions") else ""
            raise InvalidRequest(f"{body.type!r} takes no {name!r}; it takes {', '.join(takes)}{hint}", param=name)
    for group in _NEEDED[body.type]:
        found = [name for name in group if name in body.given]
        if not found:
            raise InvalidRequest(f"{body.type!r} needs {' or '.join(map(repr, group))}", param=group[0])
        if len(found) > 1:
            raise InvalidRequest(f"{body.type!r} takes {' or '.join(map(repr, group))}, not both", param=found[1])
    if body.type == "ablate":
        _check_mode(body)
    if body.type == "feature":
        _check_operation(body)


def _check_mode(body: InterventionBody) -> None:
    sources = [name for name in ("dataset_id", "value") if name in body.given]
    if body.mode == "mean" and len(sources) != 1:
        raise InvalidRequest(
            "mode 'mean' needs 'dataset_id', whose stored samples are averaged, or 'value', and not both", param="mode"
        )
    if isinstance(body.value, float):
        raise InvalidRequest(
            f"value is a list of numbers, as many as the site is wide; found {body.value}", param="value"
        )
    if body.mode != "mean" and sources:
        raise InvalidRequest(f"mode 'zero' takes no {sources[0]!r}; mode 'mean' does", param=sources[0])


def _check_operation(body: InterventionBody) -> None:
    """See that the numbers of an intervention by feature are those of its operation.

    Raises:
        InvalidRequest: naming the field.
    """
    if body.operation == "clamp":
        wrong = next((name for name in ("strength", "normalise") if name in body.given), None)
        if wrong is not None:
            raise InvalidRequest(f"operation 'clamp' takes no {wrong!r}; it takes 'value'", param=wrong)
        if not isinstance(body.value, float):
            found = "" if body.value is None else "; found a list"
            raise InvalidRequest(
                f"operation 'clamp' needs 'value', the activation to be had, a number{found}", param="value"
            )
        if body.value < 0:
            raise InvalidRequest(f"value is {body.value}; an activation is never below 0", param="value")
    elif body.value is not None:
        raise InvalidRequest("operation 'add' takes no 'value'; it takes 'strength'", param="value")
