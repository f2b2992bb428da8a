"""Whose features are asked for: texts, messages, token ids, a recorded answer or a stored sample; which positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from attribution import checks
from attribution.arguments import Index
from attribution.errors import BadPositions, InvalidArgument
from attribution.features.source import Source
from attribution.features.topk import Tokens, held_by_answer, held_by_sample
from attribution.model.traced import TracedModel
from attribution.positions import parse_window
from attribution.prompts import Message, check_tokens, only_given, tokens_of
from attribution.recorded import read_answer

if TYPE_CHECKING:
    from attribution.session import LocalSession


def _listed(value: object) -> object:
    return list(value) if isinstance(value, range | tuple) else getattr(value, "tolist", lambda: value)()


Where = Annotated[
    str | dict[str, Any] | list[Index] | None,
    BeforeValidator(_listed, json_schema_input_type=str | dict[str, Any] | list[int] | None),
]
"""A window, as of a savepoint, or a list of positions; negative ones count from the end."""


@dataclass(frozen=True)
class Asked:
    """The arguments that say whose features are asked for; one of `_ONE_OF` is given."""

    text: str | list[str] | None
    messages: list[Message] | None
    token_ids: list[int] | None
    run_id: str | None
    choice: int
    dataset_id: str | None
    sample_id: int | str | None
    positions: Any


_ONE_OF = ("text", "messages", "token_ids", "run_id", "dataset_id")


def tokens_asked(
    session: "LocalSession",
    asked: Asked,
    sources: Sequence[Source],
    prepend_bos: bool | None,
    *,
    add_special_tokens: bool,
) -> list[Tokens]:
    """The sequences that are asked about; several only of several texts.

    Args:
        sources: whose features; they say how a text begins.
        prepend_bos: how a text begins, whatever they say; None leaves it to them.

    Raises:
        InvalidArgument, OutOfRange, BadPositions, ContextLengthExceeded: naming the argument.
        RunNotFound, SampleMismatch, StorageFailed: as `read_answer`.
        DatasetNotFound, SampleNotFound, SampleMismatch, StorageFailed: as `LocalSession.sample`.
    """
    model, at = session.model, asked.positions
    given = {name: getattr(asked, name) for name in _ONE_OF}
    name = only_given(given)
    if (asked.sample_id is None) != (asked.dataset_id is None):
        raise InvalidArgument("a stored sample has a dataset_id and a sample_id; one is missing", param="sample_id")
    if asked.run_id is not None:
        return [_answer(session, asked.run_id, asked.choice, at)]
    if asked.dataset_id is not None and asked.sample_id is not None:
        return [_sample(session, asked.dataset_id, asked.sample_id, at)]
    if asked.text is not None:
        special, bos = beginning(model, sources, prepend_bos, add_special_tokens=add_special_tokens)
        return _texts(model, asked.text, at, special=special, bos=bos)
    return [_given(model, tokens_of(model, given[name] or [], special=False, name=name), at, name)]


def beginning(
    model: TracedModel, sources: Sequence[Source], prepend_bos: bool | None, *, add_special_tokens: bool
) -> tuple[bool, int | None]:
    """Whether texts get the tokenizer's own special tokens, and the token that they are to begin with, if any.

    Raises:
        InvalidArgument: the sources were trained with different ones, and `prepend_bos` is None.
    """
    wanted = {one.prepend_bos for one in sources} - {None} if prepend_bos is None else {prepend_bos}
    if len(wanted) > 1:
        apart = ", ".join(f"{one.name!r} {one.prepend_bos}" for one in sources if one.prepend_bos is not None)
        raise InvalidArgument(
            f"the autoencoders were trained with different prepend_bos ({apart}): name one with source, or say "
            "prepend_bos yourself",
            param="prepend_bos",
        )
    begins = next(iter(wanted), None)
    bos: Any = model.tokenizer.bos_token_id if begins else None
    return add_special_tokens and begins is not False, bos


def _texts(
    model: TracedModel, text: str | list[str], positions: Any, *, special: bool, bos: int | None
) -> list[Tokens]:
    if text == []:
        raise InvalidArgument("text is an empty list; give at least one text", param="text")
    asked = []
    for number, one in enumerate([text] if isinstance(text, str) else text):
        name = "text" if isinstance(text, str) else f"text.{number}"
        ids = tokens_of(model, one, special=special, name=name)
        if not one:
            raise InvalidArgument(f"{name} has no token; give a text", param=name)
        asked.append(_given(model, begun(ids, bos), positions, name))
    return asked


def begun(ids: list[int], bos: int | None) -> list[int]:
    """Tokens that begin with a special one, if any, which is put before them where it is not there."""
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _given(model: TracedModel, ids: list[int], positions: Any, name: str) -> Tokens:
    check_tokens(model, ids, name)
    return Tokens(ids, _positions(positions, len(ids), len(ids), name))


def _answer(session: "LocalSession", run_id: str, choice: int, positions: Any) -> Tokens:
    model = session.model
    answer = read_answer(model, session.runs_dir, run_id, choice)
    fed = answer.token_ids[: answer.fed]
    check_tokens(model, fed, "run_id")
    at = _positions(positions, answer.prompt, len(fed), f"the run {run_id!r}")
    return Tokens(fed, at, held_by_answer(model, answer), answer.intervened)


def _sample(session: "LocalSession", dataset_id: str, sample_id: int | str, positions: Any) -> Tokens:
    sample = session.sample(dataset_id, sample_id)
    ids = sample.token_ids
    at = _positions(positions, len(ids), len(ids), f"sample {sample_id!r}")
    return Tokens(ids, at, held_by_sample(session.model, sample))


def _positions(given: Any, prompt: int, count: int, name: str) -> list[int]:
    """The positions that a window or a list names among those of a sequence of `count` tokens."""
    if isinstance(given, list):
        for position in given:
            if not -count <= position < count:
                allowed = f"{name} has the positions 0 to {count - 1}, and -1 to -{count} from its end"
                raise checks.out_of_range("positions", position, allowed)
        return checks.positions("positions", [position % count for position in given], count)
    window = parse_window(given)
    if window.stop is not None and window.stop > count:
        raise BadPositions(f"positions.stop is {window.stop}, and {name} has {count} tokens", param="positions")
    found = list(window.span(prompt, count))
    if not found:
        raise BadPositions(
            f"positions select no token of {name}, which has {count}, {prompt} of them the prompt", param="positions"
        )
    return found
