"""The plan of a comparison: what was asked, checked before any model is loaded."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from attribution.compare.asked import Asked
from attribution.compare.measured import measured
from attribution.errors import InvalidArgument, InvalidRequest
from attribution.model.hub import canonical
from attribution.model.known import check_known
from attribution.model.load import DTYPES, LoadSpec
from attribution.operation import Progress, Steps

if TYPE_CHECKING:
    from attribution.session import LocalSession

R = TypeVar("R")


@dataclass(frozen=True)
class Plan:
    """A comparison to be carried out, one model after the other.

    Attributes:
        models: by the names that the caller gave them.
        given: what each of them is asked.
        top_features: how many features of a term are shown.
        descriptions: whether with their descriptions.
        dtype, device_map: with which models are loaded that are not.
    """

    models: list[str]
    given: Asked
    top_features: int
    descriptions: bool
    dtype: str
    device_map: str

    def spec(self, name: str, *, trust_remote_code: bool = False) -> LoadSpec:
        """How a model is loaded that is not."""
        return LoadSpec(name, device_map=self.device_map, dtype=self.dtype, trust_remote_code=trust_remote_code)

    def steps(self, session: "LocalSession") -> Steps[dict[str, Any]]:
        """The measuring of a session's model."""
        return measured(session, self.given, self.top_features, descriptions=self.descriptions)

    @property
    def total(self) -> int:
        """Sentences to be run, over all models."""
        return len(self.models) * len(self.given.sentences)

    def progress(self, number: int, step: Progress | None = None) -> Progress:
        """How far everything is when the model of this number is so far; None is its beginning."""
        return Progress(number * len(self.given.sentences) + (0 if step is None else step.done), self.total)

    def counted(self, number: int, steps: Generator[Progress, None, R]) -> Generator[Progress, None, R]:
        """The steps of one model, counted over all of them."""
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            yield self.progress(number, step)


def check_models(names: Sequence[str], dtype: str, loaded: Collection[str]) -> None:
    """See that models can be compared; `loaded` are those that need not be loaded.

    Raises:
        InvalidArgument: there is none, or one comes twice.
        InvalidRequest: there is no such dtype.
        ModelNotFound: there is no model of some name.
    """
    if not names:
        raise InvalidArgument("models is empty; name at least one", param="models")
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype is one of {', '.join(DTYPES)}; found {dtype!r}", param="dtype")
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(canonical(name), name)) is not name or list(names).count(name) > 1:
            also = "" if other == name else f", as {other!r}"
            raise InvalidArgument(f"models names {name!r} twice{also}; a model is compared with others", param="models")
    check_known([name for name in names if canonical(name) not in loaded])
