"""What is asked of each model: the sentences, the terms, and how these are found."""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.compare.texts import Span, occurrences
from attribution.errors import InvalidArgument


@dataclass(frozen=True)
class Asked:
    """Sentences, terms, and where the terms occur.

    Attributes:
        found: for each term its occurrences: the index of a sentence, and a span of its characters.
    """

    sentences: list[str]
    terms: list[str]
    found: list[list[tuple[int, Span]]]

    def spans_in(self, sentence: int) -> list[Span]:
        """Where terms occur in a sentence, each place once."""
        return sorted({span for places in self.found for index, span in places if index == sentence})


def asked(sentences: Sequence[str], terms: Sequence[str], *, case_sensitive: bool, whole_words: bool) -> Asked:
    """The sentences and terms of a call, checked.

    Raises:
        InvalidArgument: there is no sentence, an empty one or one that is no text, or a term is empty or comes twice.
    """
    if not sentences:
        raise InvalidArgument("sentences is empty; give at least one", param="sentences")
    for name, texts in (("sentences", sentences), ("domain_terms", terms)):
        for index, text in enumerate(texts):
            _check(f"{name}.{index}", text)
    if len(set(terms)) < len(terms):
        twice = next(term for index, term in enumerate(terms) if term in terms[:index])
        raise InvalidArgument(f"domain_terms names {twice!r} twice", param="domain_terms")
    found = [
        [
            (index, span)
            for index, sentence in enumerate(sentences)
            for span in occurrences(sentence, term, case_sensitive=case_sensitive, whole_words=whole_words)
        ]
        for term in terms
    ]
    return Asked(list(sentences), list(terms), found)


def _check(name: str, text: str) -> None:
    if not text:
        raise InvalidArgument(f"{name} is empty; give a text", param=name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{name} is no text: its character {error.start} is half of a pair (a lone surrogate) and has no bytes",
            param=name,
        ) from error
