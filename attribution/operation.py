"""An operation, declared once: a local function, a method of the client, and a route of the server.

    @operation()
    def get_head_output(session: LocalSession, dataset_id: DatasetId, …) -> Tensor: ...

1. The signature gives the pydantic model of the arguments; unknown ones are refused.
2. `get_head_output = operations.get_head_output` in the body of `LocalSession` or `ModelClient` makes it a typed
   method there: it hands itself and its arguments to `run` of the session, which is all that a session must have.
3. `POST /attribution/get_head_output` (or another `path`) hands the body to `validate` and `start`, as
   `LocalSession.run` does.

A long operation is a generator: it yields `Progress` after each bounded piece of work and returns its result. Between
two pieces others may use the model, the caller may show how far it is, or leave.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from attribution.arguments import refusal

if TYPE_CHECKING:
    from attribution.session import LocalSession

P = ParamSpec("P")
R = TypeVar("R")

CALLERS_OWN = ("device", "show_progress")
"""Arguments that concern the caller's process: they do not travel."""


@dataclass(frozen=True)
class Progress:
    """How far a long operation is: `done` of `total` samples."""

    done: int
    total: int


Steps = Generator[Progress, None, R]


@runtime_checkable
class Runs(Protocol):
    """What has operations as methods: it runs them, here or elsewhere."""

    def run(self, operation: "Operation[..., Any]", arguments: dict[str, Any]) -> Any:
        """Run an operation. `arguments` are named, as the caller gave them."""
        ...


class Operation(Generic[P, R]):
    """A function of a session that runs the same locally and over HTTP.

    Attributes:
        name: of the method.
        path: of the route, without the first slash.
        params: the pydantic model of the arguments, the session left out.
        safe: whether it may be sent again after a lost connection: it changes nothing, or the same thing to the same.
        long: whether it reports progress.
        of_model: whether it runs on one loaded model, which a caller names as `model`.
    """

    def __init__(
        self, function: Callable[..., Any], *, safe: bool, path: str | None = None, of_model: bool = True
    ) -> None:
        self.function, self.safe, self.of_model = function, safe, of_model
        self.name, self.__doc__ = function.__name__, function.__doc__
        self.path = path or f"attribution/{self.name}"
        self.long = inspect.isgeneratorfunction(inspect.unwrap(function))
        _, *parameters = inspect.signature(function).parameters.values()
        self.signature = inspect.Signature(parameters)
        self.params = _params_model(function, parameters)

    @overload
    def __get__(self, session: None, owner: type) -> "Operation[P, R]": ...
    @overload
    def __get__(self, session: Runs, owner: type) -> Callable[P, R]: ...
    def __get__(self, session: Runs | None, owner: type) -> Any:
        """The operation itself, or bound to a session."""
        if session is None:
            return self

        def method(*args: Any, **kwargs: Any) -> Any:
            return session.run(self, self.named(*args, **kwargs))

        method.__name__, method.__doc__ = self.name, self.__doc__
        method.__signature__ = self.signature  # type: ignore[attr-defined]
        return method

    def named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name.

        Raises:
            TypeError: Python's own, for a call that does not fit the signature.
        """
        return dict(self.signature.bind(*args, **kwargs).arguments)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments checked and converted, defaults filled in.

        Raises:
            InvalidArgument: naming the argument, what was found and what is allowed.
        """
        try:
            checked = self.params.model_validate(dict(arguments))
        except ValidationError as error:
            raise refusal(self.name, error) from error
        return {name: getattr(checked, name) for name in self.params.model_fields}

    def start(self, session: "LocalSession", arguments: Mapping[str, Any]) -> Steps[R]:
        """The pieces of the work; a short operation is one piece. The result is the generator's return value."""
        if self.long:
            return (yield from self.function(session, **arguments))
        return self.function(session, **arguments)


def _params_model(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> type[BaseModel]:
    fields: dict[str, Any] = {
        one.name: (one.annotation, ... if one.default is inspect.Parameter.empty else one.default) for one in parameters
    }
    config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(function.__name__, __config__=config, **fields)


@runtime_checkable
class _Declare(Protocol):
    @overload
    def __call__(self, function: "Callable[Concatenate[LocalSession, P], Steps[R]]") -> Operation[P, R]: ...
    @overload
    def __call__(self, function: "Callable[Concatenate[LocalSession, P], R]") -> Operation[P, R]: ...


def operation(*, safe: bool = True, path: str | None = None, of_model: bool = True) -> _Declare:
    """Declare an operation; see the head of this module. `safe`, `path` and `of_model` as in `Operation`."""

    def declare(function: Callable[..., Any]) -> Any:
        return Operation(function, safe=safe, path=path, of_model=of_model)

    return declare
