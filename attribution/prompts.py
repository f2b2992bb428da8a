"""From what a caller gives to the tokens of a sample: a text, messages, token ids, or a recorded run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jinja2 import TemplateError
from pydantic import BeforeValidator

from attribution import checks
from attribution.arguments import Positions
from attribution.errors import ContextLengthExceeded, InvalidArgument
from attribution.model.traced import TracedModel
from attribution.recorded import read_answer

Message = dict[str, Any]


def _prompt(value: object) -> object:
    known = isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__")
    items = [] if known else list(value)  # type: ignore[call-overload]
    if isinstance(value, str) or (items and all(isinstance(item, dict) for item in items)):
        return value
    if known or any(isinstance(item, dict | str) for item in items):
        raise ValueError("a text, a list of messages, or a list of token ids is expected")
    return value


Prompt = Annotated[
    str | list[Message] | Positions,
    BeforeValidator(_prompt, json_schema_input_type=str | list[Message] | list[int]),
]
"""A text, the messages of a conversation, or token ids."""


def tokens_of(model: TracedModel, prompt: str | list[Message] | list[int], *, special: bool, name: str) -> list[int]:
    """The tokens of a prompt.

    Args:
        special: whether a text gets the tokenizer's own special tokens, as "<bos>"; a conversation never does, its
            template has them.
        name: the argument that the prompt came from.

    Raises:
        InvalidArgument: the chat template refuses the messages, or there is none.
    """
    if isinstance(prompt, str):
        return list(model.tokenizer.encode(prompt, add_special_tokens=special))
    if prompt and isinstance(prompt[0], dict):
        return _templated(model, prompt, name)  # type: ignore[arg-type]
    return list(prompt)  # type: ignore[arg-type]


def check_tokens(model: TracedModel, token_ids: list[int], name: str) -> None:
    """See that a model can run these tokens; `name` is the argument that they came from.

    Raises:
        InvalidArgument: there is no token.
        OutOfRange: a token that is not in the vocabulary.
        ContextLengthExceeded: there are more than the window takes.
    """
    dims = model.dimensions
    if not token_ids:
        raise InvalidArgument(f"{name} has no token; a sample has at least one", param=name)
    if len(token_ids) > dims.window:
        raise ContextLengthExceeded(
            f"{name} has {len(token_ids)} tokens and the window of {model.id!r} takes {dims.window}", param=name
        )
    for token in {min(token_ids), max(token_ids)}:
        checks.in_range(name, token, dims.d_vocab, f"the token ids of {model.id!r}")


def given_tokens(
    model: TracedModel,
    prompt: str | None,
    messages: list[Message] | None,
    token_ids: list[int] | None,
    *,
    special: bool = True,
) -> list[int]:
    """The tokens of whichever of a text, messages and token ids is given; `special` as in `tokens_of`.

    Raises:
        InvalidArgument: none or several are given, or the chat template refuses the messages.
        ContextLengthExceeded, OutOfRange, InvalidArgument: they are too many or too few, or none of the model's.
    """
    given = {"prompt": prompt, "messages": messages, "token_ids": token_ids}
    name = only_given(given)
    tokens = tokens_of(model, given[name] or [], special=special, name=name)
    check_tokens(model, tokens, name)
    return tokens


def only_given(given: Mapping[str, object]) -> str:
    """The name of the one argument that is not None.

    Raises:
        InvalidArgument: none is, or several.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        *first, last = given
        raise InvalidArgument(
            f"exactly one of {', '.join(first)} and {last} is expected; found {' and '.join(names) or 'none'}",
            param=next(iter(given)),
        )
    return names[0]


def token_id_of(model: TracedModel, token: int | str, name: str) -> int:
    """The id of a token given by its id or by a text that is this one token; `name` is the argument.

    Raises:
        OutOfRange: an id that is not in the vocabulary.
        InvalidArgument: a text of none or several tokens.
    """
    if not isinstance(token, str):
        return checks.in_range(name, token, model.dimensions.d_vocab, f"the token ids of {model.id}")
    found = model.tokenizer.encode(token, add_special_tokens=False)
    if len(found) != 1:
        raise InvalidArgument(
            f"the text {token!r} is {len(found)} tokens of {model.id}, {found[:8]}; a text of one token is expected "
            "(many begin with a space), or an id",
            param=name,
        )
    return int(found[0])


def token_text(model: TracedModel, token: int) -> str:
    """A token as text."""
    return str(model.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _templated(model: TracedModel, messages: list[Message], name: str) -> list[int]:
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise InvalidArgument(f"{model.id!r} has no chat template; give a text or token ids", param=name)
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InvalidArgument(f"{name}: every message has a role; found {str(message)[:80]}", param=name)
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=messages[-1]["role"] != "assistant", tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: the chat template refuses these messages: {error}", param=name) from error
    return list(tokenizer.encode(text, add_special_tokens=False))  # type: ignore[arg-type]


def run_tokens(model: TracedModel, runs_dir: Path, run_id: str, choice: int) -> list[int]:
    """All tokens of a recorded answer, prompt and completion.

    Raises:
        RunNotFound, OutOfRange, SampleMismatch, StorageFailed: as `read_answer`.
    """
    return read_answer(model, runs_dir, run_id, choice).token_ids
