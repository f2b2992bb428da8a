"""Texts as tokens: their characters, their borders, and where terms occur."""

from typing import Any

import pytest

from attribution.compare.texts import borders, byte_count, encode, occurrences, start_of
from attribution.errors import ContextLengthExceeded, UnsupportedModel
from tests.comparing import BOS, blank_tokenizer, byte_tokenizer, tiny, unigram
from tests.models import WINDOW

TEXT = "the ä 漢"  # 4 + 2 + 1 + 3 bytes


def bytewise(**options: bool) -> Any:
    return unigram("bytes", byte_tokenizer(**options), [1.0] * 257)


def test_every_byte_of_a_character_has_the_character():
    found = encode(bytewise(), TEXT, "text")
    assert [TEXT[first:end] for first, end in found.spans] == [*"the ", "ä", "ä", " ", "漢", "漢", "漢"]
    assert (found.start, found.problem, len(found.ids)) == (0, None, byte_count(TEXT))
    assert found.tokens_of((6, 7)) == [7, 8, 9]
    assert found.tokens_of((4, 6)) == [4, 5, 6]
    assert found.covered([5, 7]) == "ä 漢"


@pytest.mark.parametrize("adds", [False, True])
def test_a_text_begins_with_bos_where_the_tokenizer_has_one_whether_it_adds_it_or_not(adds: bool):
    model = bytewise(bos=True, adds=adds)
    found = encode(model, TEXT, "text")
    assert (found.start, found.ids[0], len(found.ids)) == (1, 256, 1 + byte_count(TEXT))
    assert found.spans[0] == (0, 1)
    assert start_of(model) == [BOS]


def test_a_special_token_that_is_written_in_the_text_is_text():
    found = encode(tiny("tiny"), "a<|im_end|>b", "text")
    assert [found.text[first:end] for first, end in found.spans] == ["a", "<|im_end|>", "b"]
    assert (found.start, found.problem) == (0, None)


def test_without_bos_nothing_comes_before_a_text():
    assert start_of(bytewise()) == []


@pytest.mark.parametrize(
    ("text", "prepends", "tokens", "spans", "found"),
    [
        ("the cat", False, ["the", "▁cat"], [(0, 3), (3, 7)], {0: 0, 3: 1}),
        ("the cat", True, ["▁the", "▁cat"], [(0, 3), (3, 7)], {0: 0, 3: 1}),
        (" the ä", False, ["▁the", "▁", "<0xC3>", "<0xA4>"], [(0, 4), (4, 5), (5, 6), (5, 6)], {0: 0, 4: 1, 5: 2}),
        (" the", True, ["▁", "▁the"], [(0, 1), (0, 4)], {0: 0}),
        ("\nthe", True, ["▁", "<0x0A>", "the"], [(0, 1), (0, 1), (1, 4)], {0: 0, 1: 2}),
    ],
)
def test_blanks_in_tokens_and_bytes_of_unknown_characters(
    text: str, prepends: bool, tokens: list[str], spans: list[tuple[int, int]], found: dict[int, int]
):
    tokenizer = blank_tokenizer(prepends=prepends)
    model = unigram("blanks", tokenizer, [1.0] * len(tokenizer))
    encoded = encode(model, text, "text")
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["<s>", *tokens]
    assert (encoded.start, encoded.spans, encoded.problem) == (1, spans, None)
    assert borders(encoded.spans, 1) == found


def test_tokens_of_another_text_are_told_with_the_first_difference():
    assert encode(bytewise(lowercase=True), "ab Cd", "text").problem == (
        "its tokens stand for another text, from character 3 on: 'cd' in place of 'Cd'"
    )
    assert encode(bytewise(lowercase=True), "ab cd", "text").problem is None


def test_a_text_beyond_the_window_is_refused_with_its_name():
    with pytest.raises(ContextLengthExceeded, match=f"sentences.3 has {WINDOW + 2} tokens") as refused:
        encode(bytewise(bos=True), "a" * (WINDOW + 1), "sentences.3")
    assert refused.value.param == "sentences.3"


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    model = bytewise()
    object.__setattr__(model, "tokenizer", Slow())
    with pytest.raises(UnsupportedModel, match="does not tell which characters its tokens stand for"):
        encode(model, "a", "text")


@pytest.mark.parametrize(
    ("spans", "start", "expected"),
    [
        ([(0, 1), (1, 3), (3, 4)], 1, {0: 0, 1: 1, 3: 2}),
        ([(0, 1), (1, 3), (3, 4)], 0, {1: 1, 3: 2}),  # the first token is not scored
        ([(0, 1), (0, 1), (1, 2)], 0, {1: 2}),  # a character in two tokens is not cut
        ([(0, 1), (0, 1), (1, 2)], 1, {0: 0, 1: 2}),
        ([(0, 2)], 0, {}),
        ([(0, 2)], 2, {0: 0}),
        ([(0, 2), (1, 3), (3, 4)], 0, {3: 2}),  # tokens that overlap
        ([(0, 5), (6, 11)], 0, {5: 1}),  # offsets without the blank: it is the second token's
        ([(0, 0), (0, 2), (2, 3)], 0, {0: 1, 2: 2}),  # a token of no character before the text
        ([], 1, {}),
    ],
)
def test_borders_lie_where_one_token_ends_and_the_next_begins(
    spans: list[tuple[int, int]], start: int, expected: dict[int, int]
):
    assert borders(spans, start) == expected


@pytest.mark.parametrize(
    ("text", "term", "options", "expected"),
    [
        ("aaa", "aa", {}, [(0, 2), (1, 3)]),
        ("Cell cell", "cell", {}, [(5, 9)]),
        ("Cell cell", "cell", {"case_sensitive": False}, [(0, 4), (5, 9)]),
        ("STRASSE Straße", "straße", {"case_sensitive": False}, [(8, 14)]),
        ("cellar, cell.", "cell", {"whole_words": True}, [(8, 12)]),
        ("cellar, cell.", "cell", {}, [(0, 4), (8, 12)]),
        ("a.b a+b", "a.b", {}, [(0, 3)]),  # no pattern
        ("x(y)z (y)", "(y)", {"whole_words": True}, [(1, 4), (6, 9)]),  # an end that is no letter needs no border
        ("漢字漢", "漢", {}, [(0, 1), (2, 3)]),
        ("a\nb", "a\nb", {"whole_words": True}, [(0, 3)]),
        ("a", "b", {}, []),
    ],
)
def test_terms_are_found_by_characters(text: str, term: str, options: dict[str, bool], expected: list[tuple[int, int]]):
    assert occurrences(text, term, **options) == expected
