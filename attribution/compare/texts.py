"""A text as the tokens of one model: which characters each stands for, where it may be cut, and where terms occur.

1. The text is encoded with the tokenizer's own special tokens; those before it are its start, those behind it are left
   out. A tokenizer that adds none but has a bos token starts with that.
2. Each token has the characters that it stands for. A character of several bytes may be cut between tokens, which then
   all have it.
3. A border is a place between two characters at which one token ends and the next begins: what follows it can be scored
   given what precedes it. The start is a border when there is something before it; else the first token has nothing
   that it could be predicted from, and the first border comes after it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from attribution.errors import UnsupportedModel
from attribution.model.traced import TracedModel
from attribution.prompts import check_tokens, token_text

Span = tuple[int, int]
_SHOWN = 40


@dataclass(frozen=True)
class Encoded:
    """A text and its tokens.

    Attributes:
        ids: what the model is given: the start and the tokens of the text.
        start: how many of them come before the text; 0 where the tokenizer has nothing to begin with.
        spans: of each token of the text, the characters that it stands for: first, and one past the last.
        problem: why the tokens do not stand for this text, in a sentence; None when they do.
    """

    text: str
    ids: list[int]
    start: int
    spans: list[Span]
    problem: str | None

    def tokens_of(self, span: Span) -> list[int]:
        """The tokens, counted from the first of the text, that have a character in this span."""
        return [at for at, (first, end) in enumerate(self.spans) if first < span[1] and end > span[0]]

    def covered(self, tokens: Sequence[int]) -> str:
        """The part of the text that some tokens stand for together."""
        spans = [self.spans[at] for at in tokens]
        return self.text[min(first for first, _ in spans) : max(end for _, end in spans)] if spans else ""


def encode(model: TracedModel, text: str, name: str) -> Encoded:
    """The tokens of a text; `name` is the argument that it came from.

    Raises:
        UnsupportedModel: the tokenizer does not say which characters its tokens stand for.
        ContextLengthExceeded: there are more tokens than the model's window takes.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"the tokenizer of {model.id!r}, a {type(tokenizer).__name__}, does not tell which characters its tokens "
            "stand for; a fast tokenizer (tokenizer.json) does",
            param="model",
        )
    found = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True, return_special_tokens_mask=True)
    own = [at for at, special in enumerate(found["special_tokens_mask"]) if not special]
    if not own:
        return Encoded(text, [], 0, [], "its tokenizer makes no token of it")
    start = [int(token) for token in found["input_ids"][: own[0]]]
    if not start and tokenizer.bos_token_id is not None:
        start = [int(tokenizer.bos_token_id)]  # type: ignore[arg-type]
    ids = start + [int(found["input_ids"][at]) for at in own]
    check_tokens(model, ids, name)
    spans = [(int(first), int(end)) for first, end in (found["offset_mapping"][at] for at in own)]
    return Encoded(text, ids, len(start), spans, _problem(model, text, ids[len(start) :]))


def _problem(model: TracedModel, text: str, ids: list[int]) -> str | None:
    """A tokenizer that lowers the case, drops characters or has no token for some gives the tokens of another text."""
    decoded = str(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if decoded in (text, f" {text}"):  # some put a blank before every text
        return None
    pairs = zip(decoded, text, strict=False)
    at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(decoded), len(text)))
    return (
        f"its tokens stand for another text, from character {at} on: {decoded[at : at + _SHOWN]!r} in place of "
        f"{text[at : at + _SHOWN]!r}"
    )


def start_of(model: TracedModel) -> list[str]:
    """What this model's texts begin with, as texts of tokens; empty where its tokenizer has nothing."""
    found = encode(model, "a", "text")
    return [token_text(model, token) for token in found.ids[: found.start]]


def borders(spans: Sequence[Sequence[int]], start: int) -> dict[int, int]:
    """The borders of a text: for each, by its character, the first token after it.

    Args:
        spans: of the tokens of the text.
        start: how many tokens come before the text.
    """
    ends = [0, *accumulate((end for _, end in spans), max)]
    firsts = [*accumulate((first for first, _ in reversed(spans)), min)][::-1]
    found: dict[int, int] = {}
    for token in range(0 if start else 1, len(spans)):
        if ends[token] <= firsts[token]:
            found.setdefault(ends[token], token)
    return found


def byte_count(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text.encode())


def occurrences(text: str, term: str, *, case_sensitive: bool = True, whole_words: bool = False) -> list[Span]:
    """Where a term occurs in a text, in characters; occurrences may overlap.

    Args:
        whole_words: whether no letter, digit or underscore may stand beside it, where it itself ends in one.
    """
    before = r"(?<!\w)" if whole_words and re.match(r"\w", term) else ""
    behind = r"(?!\w)" if whole_words and re.search(r"\w\Z", term) else ""
    pattern = re.compile(f"(?={before}({re.escape(term)}){behind})", 0 if case_sensitive else re.IGNORECASE)
    return [match.span(1) for match in pattern.finditer(text)]
