"""Position windows: parsing, and the arithmetic against brute force."""

from itertools import product

import pytest

from attribution.errors import BadPositions
from attribution.positions import Window, overlap, parse_window


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        # a prompt of 4 tokens and 3 generated ones: 4 + 3 − 1 = 6 fed positions
        (None, [0, 1, 2, 3, 4, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("prompt", [0, 1, 2, 3]),
        ("generated", [4, 5]),
        ("last", [3]),
        ({"start": 2}, [2, 3, 4, 5]),
        ({"stop": 2}, [0, 1]),
        ({"step": 2}, [0, 2, 4]),
        ({"start": 1, "stop": 6, "step": 3}, [1, 4]),
        ({"start": 5, "stop": 6}, [5]),
        ({"start": 0, "stop": 10**30}, [0, 1, 2, 3, 4, 5]),
        ({"start": 6}, []),
        ({"start": 10**30}, []),
        ({"step": 10**30}, [0]),
        ({"start": None, "stop": None, "step": None}, [0, 1, 2, 3, 4, 5]),
        ({"start": 4, "stop": None}, [4, 5]),
    ],
    ids=repr,
)
def test_a_window_keeps_the_positions_that_it_names(value: object, kept: list[int]) -> None:
    assert list(parse_window(value).span(4, 6)) == kept


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("everything", "positions is one of all, prompt, generated, last or .* found 'everything'"),
        ("All", "found 'All'"),
        ("", "found ''"),
        (3, "found 3"),
        (True, "found True"),
        ([0, 1], r"found \[0, 1\]"),
        ({}, r"found \{\}"),
        ({"begin": 1}, r"found \{'begin': 1\}"),
        ({"start": 1, "end": 2}, "found .*'end': 2"),
        ({"start": -1}, r"positions\.start is an integer of at least 0; found -1"),
        ({"start": 1.0}, r"positions\.start .* found 1\.0"),
        ({"start": 0.0}, r"positions\.start .* found 0\.0"),
        ({"start": False}, r"positions\.start .* found False"),
        ({"start": ""}, r"positions\.start .* found ''"),
        ({"start": "1"}, r"positions\.start .* found '1'"),
        ({"stop": 0}, r"positions\.stop is an integer of at least 1; found 0"),
        ({"stop": -3}, r"positions\.stop .* found -3"),
        ({"stop": True}, r"positions\.stop .* found True"),
        ({"step": 0}, r"positions\.step is an integer of at least 1; found 0"),
        ({"step": -1}, r"positions\.step .* found -1"),
        ({"start": 3, "stop": 3}, r"positions\.stop \(3\) must be above positions\.start \(3\)"),
        ({"start": 5, "stop": 2}, r"positions\.stop \(2\) must be above positions\.start \(5\)"),
    ],
    ids=repr,
)
def test_a_window_that_does_not_parse_is_refused_by_what_was_found(value: object, says: str) -> None:
    with pytest.raises(BadPositions, match=says) as refused:
        parse_window(value)
    assert refused.value.param == "positions"


def test_the_part_of_a_window_between_two_positions_is_that_of_brute_force() -> None:
    for first, last, step, start, stop in product(range(5), range(9), (1, 2, 3, 7), range(9), range(11)):
        window = range(first, last, step)
        expected = [position for position in window if start <= position < stop]
        assert list(overlap(window, start, stop)) == expected


def test_the_parts_of_a_window_in_consecutive_pieces_make_up_the_window() -> None:
    for first, step, piece in product(range(6), (1, 2, 5), (1, 2, 3, 4)):
        window = range(first, 17, step)
        parts = [overlap(window, start, start + piece) for start in range(0, 20, piece)]
        assert [position for part in parts for position in part] == list(window)


def test_a_window_without_end_has_a_part_anywhere() -> None:
    assert list(overlap(range(3, 1 << 40, 4), 10**9, 10**9 + 6)) == [10**9 + 3]  # 10^9 is 0 modulo 4


def test_every_window_is_a_part_of_the_fed_positions() -> None:
    names = ("all", "prompt", "generated", "last", None)
    for name, start, stop, step in product(names, range(4), (None, 1, 3, 9), (1, 2)):
        for prompt, generated in product(range(1, 5), range(1, 4)):
            tokens = prompt + generated - 1
            fed = range(tokens)
            kept = list(Window(name, start, stop, step).span(prompt, tokens))
            expected = {
                "all": list(fed),
                "prompt": [p for p in fed if p < prompt],
                "generated": [p for p in fed if p >= prompt],
                "last": [prompt - 1],
                None: list(fed)[start:stop:step],
            }[name]
            if name is not None and step != 1:
                continue  # a named window has no step
            assert kept == expected
