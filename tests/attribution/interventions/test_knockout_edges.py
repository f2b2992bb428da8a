"""Edges as callers write them."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from attribution.errors import InvalidArgument, NoKeyLeft, OutOfRange
from attribution.interventions.edges import (
    EdgeArg,
    EdgeSpec,
    Selection,
    Span,
    check_edges,
    parse_selection,
    refuse_empty_rows,
    removed_edges,
)

T = 5


def pairs(*edges: object, queries: range = range(T), keys: int = T, length: int = T) -> set[tuple[int, int]]:
    """The removed edges as (query, key)."""
    found = removed_edges([EdgeSpec.parse(edge) for edge in edges], queries, keys, length)
    return {(queries[query], key) for query, key in found.nonzero().tolist()}


@pytest.mark.parametrize(
    ("edge", "expected"),
    [
        ([3, 1], {(3, 1)}),
        ([-1, 0], {(4, 0)}),
        ([-2, -4], {(3, 1)}),
        (["3", " -5 "], {(3, 0)}),
        ([np.int64(3), torch.tensor(1)], {(3, 1)}),
        (["*", 2], {(2, 2), (3, 2), (4, 2)}),
        (["1:3", 0], {(1, 0), (2, 0)}),
        ([4, "1:3"], {(4, 1), (4, 2)}),
        ([4, {"start": 1, "stop": 3}], {(4, 1), (4, 2)}),
        (["-2:", "2:-1"], {(3, 2), (3, 3), (4, 2), (4, 3)}),
        (["2:4", "1:4"], {(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)}),  # the future is not there to be removed
        ([{"start": 3}, ":1"], {(3, 0), (4, 0)}),
        (["*", "1:"], {(q, k) for q in range(T) for k in range(1, T) if k <= q}),
    ],
)
def test_an_edge_is_the_pairs_that_its_sides_name(edge: object, expected: set[tuple[int, int]]):
    assert pairs(edge) == expected


def test_several_edges_are_their_union():
    assert pairs([4, 0], [4, 0], ["*", 3]) == {(4, 0), (3, 3), (4, 3)}
    assert pairs() == set()


def test_while_decoding_negative_numbers_count_from_the_end_of_the_prompt():
    step = {"queries": range(7, 8), "keys": 8, "length": T}
    assert pairs([-1, 0], **step) == set()
    assert pairs(["-1:", 0], **step) == {(7, 0)}
    assert pairs(["*", -1], **step) == {(7, 4)}
    assert pairs([7, -5], **step) == {(7, 0)}
    assert pairs(["*", "-1:"], **step) == {(7, 4), (7, 5), (7, 6), (7, 7)}


def test_a_prompt_fed_in_pieces_loses_the_same_edges():
    edges = [["-3:", 0], [2, 1], [4, "1:3"]]
    whole = removed_edges([EdgeSpec.parse(edge) for edge in edges], range(T), T, T)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        piece = removed_edges([EdgeSpec.parse(edge) for edge in edges], range(start, stop), stop, T)
        assert torch.equal(piece, whole[start:stop, :stop])
        assert not whole[start:stop, stop:].any()


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        ([5, 0], "the query of the edge [5, 0] is 5; allowed are 0 to 4, and -1 to -5 from the end"),
        ([-6, 0], "the query of the edge [-6, 0] is -6;"),
        ([4, -6], "the key of the edge [4, -6] is -6;"),
        ([4, "2:6"], "the key of the edge [4, 2:6] is 2:6, which is 2 to before 6;"),
        (["3:3", 0], "is 3:3, which is 3 to before 3;"),
        (["-1:2", 0], "is -1:2, which is 4 to before 2;"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(edge: object, words: str):
    with pytest.raises(OutOfRange) as refused:
        pairs(edge)
    assert words in str(refused.value)
    assert refused.value.param == "edges"


@pytest.mark.parametrize("edge", [[1, 3], [0, -1], ["0:2", "2:"], [2, "3:"]])
def test_an_edge_that_lies_in_the_future_altogether_is_refused(edge: object):
    with pytest.raises(InvalidArgument, match=r"lies in the future: query \d reads from the keys 0 to \d, and"):
        pairs(edge)


@pytest.mark.parametrize(
    "edge", [3, "4,0", [1], [1, 2, 3], [1.0, 0], [True, 0], [None, 0], ["x", 0], ["1:2:3", 0], [[1], 0], {"q": 1}]
)
def test_what_is_no_edge_is_refused(edge: object):
    with pytest.raises(ValueError, match="a position, '\\*' or a range as '3:7'"):
        EdgeSpec.parse(edge)


@pytest.mark.parametrize("side", [{"start": 1, "step": 2}, {"start": 1.5}, {"stop": "3"}])
def test_a_range_in_json_has_two_integers(side: object):
    with pytest.raises(ValueError, match=r"no 'step'|is expected|'3'"):
        EdgeSpec.parse([side, 0])


def test_an_edge_is_shown_with_its_numbers_resolved():
    edges = [EdgeSpec.parse(edge) for edge in ([-1, 0], ["*", "2:"], ["-2:", {"stop": -1}])]
    assert [edge.shown(T) for edge in edges] == [
        [4, 0],
        ["*", {"start": 2, "stop": 5}],
        [{"start": 3, "stop": 5}, {"start": 0, "stop": 4}],
    ]
    assert [str(edge) for edge in edges] == ["[-1, 0]", "[*, 2:]", "[-2:, :-1]"]
    assert [EdgeSpec.parse(edge.shown(T)).resolved(T) for edge in edges] == [edge.resolved(T) for edge in edges]


def test_a_query_that_is_left_with_no_key_is_refused_by_its_number():
    for edges, query in (([[3, "*"]], 3), ([["*", 0]], 0), ([[2, 0], [2, 1], [2, 2]], 2)):
        parsed = [EdgeSpec.parse(edge) for edge in edges]
        with pytest.raises(NoKeyLeft, match=f"^query {query} would have no key left"):
            check_edges(parsed, T)
    check_edges([EdgeSpec.parse([3, "0:3"])], T)


def test_a_sliding_layer_runs_out_of_keys_earlier():
    edges = [EdgeSpec.parse([4, "2:"])]
    check_edges(edges, T)
    check_edges(edges, T, windows={1: 4})
    with pytest.raises(NoKeyLeft, match=r"query 4 of layer 2, which sees the last 3 positions, .*its keys, 2 to 4,"):
        check_edges(edges, T, windows={1: None, 2: 3})


def test_queries_to_come_are_checked_before_they_come():
    with pytest.raises(NoKeyLeft, match="query 7 "):
        check_edges([EdgeSpec.parse([7, "*"])], T, limit=9)
    with pytest.raises(OutOfRange, match="0 to 8"):
        check_edges([EdgeSpec.parse([9, 0])], T, limit=9)


def test_a_long_prompt_is_checked_in_pieces():
    with pytest.raises(NoKeyLeft, match="query 1300 "):
        check_edges([EdgeSpec.parse([3, 0]), EdgeSpec.parse([1300, "*"])], 2000)
    check_edges([EdgeSpec.parse(["700:1800", "0:700"])], 2000)


def test_only_the_queries_at_hand_are_looked_at():
    removed = torch.tensor([[True, True, False, False], [True, True, True, True]])
    refuse_empty_rows(removed[:1], range(2, 3))
    with pytest.raises(NoKeyLeft, match="query 3 "):
        refuse_empty_rows(removed, range(2, 4))


def test_an_edge_is_an_argument_with_a_schema():
    adapter = TypeAdapter(list[EdgeArg])
    for given in ([[-1, "3:7"]], [(-1, {"start": 3, "stop": 7})]):
        assert adapter.validate_python(given) == [[-1, "3:7"]]
    assert EdgeSpec.parse([-1, "3:7"]) == EdgeSpec(-1, Span(3, 7))
    assert adapter.json_schema()["items"]["prefixItems"][0]["anyOf"][0] == {"type": "integer"}
    with pytest.raises(ValidationError, match="an edge is"):
        adapter.validate_python([[1]])


@pytest.mark.parametrize(
    ("given", "expected"),
    [(3, 3), ("all", Span()), ("*", Span()), ("1:", Span(1)), ([1, "2:"], [1, Span(2)]), (range(2), [0, 1]), (-1, -1)],
)
def test_layers_are_one_a_list_a_range_or_all(given: object, expected: object):
    assert parse_selection(given) == expected
    assert parse_selection(TypeAdapter(Selection).validate_python(given)) == expected


@pytest.mark.parametrize("given", [1.5, "every", None, [1.5], ["a"]])
def test_what_names_no_layer_is_refused(given: object):
    with pytest.raises(ValidationError):
        TypeAdapter(Selection).validate_python(given)
