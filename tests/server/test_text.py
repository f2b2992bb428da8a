"""From tokens to text as it is sent: whole characters, and nothing that may become a stop string."""

import random

import pytest

from server.generation.text import TextStream
from tests.server.support import decode, encode, tokenizer


def _pieces(ids: list[int], *stop: str) -> tuple[list[str], TextStream]:
    """What can be sent after each token, and once more after the last."""
    stream = TextStream(tokenizer(), stop)
    pieces = []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
        if stream.stopped:
            return pieces, stream
    stream.finish()
    return [*pieces, stream.take()], stream


def _letters(text: str) -> list[int]:
    """One token per byte, whatever merges there are."""
    byte_tokens = {decode([token]): token for token in range(256)}
    return [byte_tokens[letter] for letter in text]


def test_a_character_of_several_tokens_is_sent_whole():
    ids = encode("aß你🙂")
    assert len(ids) == 1 + 2 + 3 + 4
    pieces, stream = _pieces(ids)
    assert pieces == ["a", "", "ß", "", "", "你", "", "", "", "🙂", ""]
    assert stream.text == "aß你🙂"


def test_half_a_character_at_the_end_is_shown_as_such():
    pieces, stream = _pieces(encode("a你")[:-1])
    assert pieces == ["a", "", "", "\ufffd"]
    assert stream.text == "a\ufffd"


def test_special_tokens_have_no_text():
    pieces, _ = _pieces(encode("a<|im_end|>b<|endoftext|>"))
    assert "".join(pieces) == "ab"


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_tokens_are_the_text_of_all_of_them(seed: int):
    ids = random.Random(seed).choices(range(len(tokenizer())), k=60)
    pieces, stream = _pieces(ids)
    assert "".join(pieces) == decode(ids)
    assert stream.text == decode(ids)


def test_what_may_become_a_stop_string_waits_and_is_sent_when_it_does_not():
    pieces, _ = _pieces(_letters("xababac"), "ababz")
    #           x    a   b   a   b   a (b a holds on: "aba" may go on)  c
    assert pieces == ["x", "", "", "", "", "ab", "abac", ""]


def test_the_text_ends_before_the_stop_string_and_nothing_of_it_is_sent():
    pieces, stream = _pieces(_letters("xababzq"), "ababz")
    assert pieces == ["x", "", "", "", "", ""]
    assert stream.stopped
    assert stream.text == "x"


def test_the_longest_of_several_beginnings_is_held_back():
    pieces, stream = _pieces(_letters("abcdx"), "bcdef", "dy")
    assert pieces == ["a", "", "", "", "bcdx", ""]
    pieces, stream = _pieces(_letters("abcdy"), "bcdef", "dy")
    assert pieces == ["a", "", "", "", "bc"]
    assert stream.text == "abc"


def test_a_stop_string_within_one_token_cuts_the_token():
    ids = encode(" the")
    assert len(ids) == 1
    pieces, stream = _pieces(ids, "h")
    assert pieces == [" t"]
    assert stream.stopped


def test_of_two_stop_strings_in_one_token_the_earlier_one_cuts():
    ids = encode(" the")
    _, stream = _pieces(ids, "e", "h")
    assert stream.text == " t"


def test_a_stop_string_over_many_tokens_and_characters_is_found():
    ids = encode("one 你好 two")
    _, stream = _pieces(ids, "你好 t")
    assert stream.text == "one "


def test_what_was_held_back_is_sent_at_the_end():
    pieces, stream = _pieces(_letters("xab"), "abc")
    assert pieces == ["x", "", "", "ab"]
    assert not stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_random_text_with_random_stop_strings_is_cut_at_the_first_of_them(seed: int):
    chance = random.Random(seed)
    text = "".join(chance.choices("ab", k=40))
    stops = ["".join(chance.choices("ab", k=chance.randint(2, 6))) for _ in range(3)]
    pieces, stream = _pieces(_letters(text), *stops)
    # by hand: the first moment at which any stop string is complete decides
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    at = min((start for end, start in ends if end == min(end for end, _ in ends)), default=len(text))
    assert stream.text == text[:at]
    assert "".join(pieces) == text[:at]
