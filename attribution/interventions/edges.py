"""Edges of attention, as a caller writes them: `[query, key]`, the query reading from the key.

Each side is a position, "*" for all of them, or a range "start:stop" (in JSON also {"start", "stop"}) whose ends may be
left out. A negative number counts from the end of the prompt, also while tokens are added to it: `["-1:", 0]` is the
prompt's last token and everything generated after it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Bool
from pydantic import BeforeValidator, TypeAdapter
from torch import Tensor

from attribution.arguments import Index
from attribution.attention import hidden_edges
from attribution.errors import InvalidArgument, NoKeyLeft, OutOfRange

_RANGE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*")
_NUMBER = re.compile(r"\s*-?\d+\s*")
_SIDE = "a position, '*' or a range as '3:7'"
_BLOCK = 512  # queries that are checked at once
_INDEX: TypeAdapter[int] = TypeAdapter(Index)


@dataclass(frozen=True)
class Span:
    """Numbers from `start` to before `stop`; None is open, negative ones count from the end."""

    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return "*"
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"


Side = int | Span


@dataclass(frozen=True)
class EdgeSpec:
    """Edges from each query of one side to each key of the other, as far as causal attention has them."""

    query: Side
    key: Side

    def __str__(self) -> str:
        return f"[{self.query}, {self.key}]"

    @classmethod
    def parse(cls, value: object) -> "EdgeSpec":
        """An edge from `[query, key]`; see the head of this module.

        Raises:
            ValueError: it is something else; the message says what is expected.
        """
        if isinstance(value, EdgeSpec):
            return value
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"an edge is [query, key], each {_SIDE}")
        return cls(parse_side(value[0]), parse_side(value[1]))

    def resolved(self, length: int, limit: int | None = None) -> tuple[range, range]:
        """The queries and the keys, for a prompt of `length` tokens and at most `limit` with what follows it.

        Raises:
            OutOfRange: a side is not among the positions.
            InvalidArgument: every key lies after every query.
        """
        limit = length if limit is None else limit
        queries, keys = (
            resolve_side(side, length, limit, f"the {name} of the edge {self}", param="edges")
            for name, side in (("query", self.query), ("key", self.key))
        )
        if keys.start >= queries.stop:
            raise InvalidArgument(
                f"the edge {self} lies in the future: query {queries.stop - 1} reads from the keys 0 to "
                f"{queries.stop - 1}, and the edge starts at key {keys.start}",
                param="edges",
            )
        return queries, keys

    def removed(self, queries: range, keys: int, length: int, limit: int | None = None) -> Bool[Tensor, "query key"]:
        """Which edges from some queries to the keys 0 … keys − 1 this removes.

        Args:
            queries: the positions fed now: all of them, or while decoding those of one step.
            length: the length of the prompt, from whose end negative numbers count.
            limit: how many positions there will ever be; None: those that there are.

        Raises:
            OutOfRange, InvalidArgument: as `resolved`.
        """
        limit = max(length, keys) if limit is None else limit
        chosen, cut = self.resolved(length, limit)
        query = torch.arange(queries.start, queries.stop)[:, None]
        key = torch.arange(keys)[None]
        inside = (query >= chosen.start) & (query < chosen.stop) & (key >= cut.start) & (key < cut.stop)
        return inside & (key <= query)

    def shown(self, length: int) -> list[Any]:
        """`[query, key]` as JSON, negative and open ends resolved."""
        queries, keys = self.resolved(length)
        return [_shown(self.query, queries), _shown(self.key, keys)]


def _shown(side: Side, found: range) -> Any:
    if isinstance(side, int):
        return found.start
    return "*" if side == Span() else {"start": found.start, "stop": found.stop}


def parse_side(value: object) -> Side:
    """A number, "*", or a range as "3:7" or {"start": 3, "stop": 7}.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Span):
        return value
    if isinstance(value, str):
        if value.strip() == "*":
            return Span()
        if found := _RANGE.fullmatch(value):
            return Span(*(None if end is None else int(end) for end in found.groups()))
        if _NUMBER.fullmatch(value):
            return int(value)
        raise ValueError(f"{_SIDE} is expected, not {value!r}")
    if isinstance(value, Mapping):
        if unknown := set(value) - {"start", "stop"}:
            raise ValueError(f"a range has 'start' and 'stop', and no {sorted(map(str, unknown))[0]!r}")
        ends = (value.get("start"), value.get("stop"))
        return Span(*(None if end is None else _integer(end) for end in ends))
    return _integer(value)


def _integer(value: object) -> int:
    try:
        return _INDEX.validate_python(value)
    except ValueError:
        raise ValueError(f"{_SIDE} is expected, not {value!r}") from None


def resolve_side(side: Side, length: int, limit: int, what: str, *, param: str) -> range:
    """The numbers of a side among 0 … limit − 1; negative ones count back from `length`.

    Raises:
        OutOfRange: an end is not among them, or there is nothing between the ends.
    """
    first, last = (side, side) if isinstance(side, int) else (side.start, side.stop)
    start = 0 if first is None else first + length * (first < 0)
    stop = limit if last is None else last + length * (last < 0) + isinstance(side, int)
    if not 0 <= start < stop <= limit:
        allowed = f"0 to {limit - 1}, and -1 to -{length} from the end"
        found = f"is {side}" if isinstance(side, int) else f"is {side}, which is {start} to before {stop}"
        raise OutOfRange(f"{what} {found}; allowed are {allowed}", param=param)
    return range(start, stop)


def removed_edges(
    edges: Sequence[EdgeSpec], queries: range, keys: int, length: int, limit: int | None = None
) -> Bool[Tensor, "query key"]:
    """The edges that any of `edges` removes; arguments and errors as `EdgeSpec.removed`."""
    found = torch.zeros(len(queries), keys, dtype=torch.bool)
    for edge in edges:
        found |= edge.removed(queries, keys, length, limit)
    return found


def refuse_empty_rows(
    removed: Bool[Tensor, "query key"], queries: range, *, layer: int | None = None, window: int | None = None
) -> None:
    """See that every query keeps a key; `window`: how many positions back `layer` sees, itself included; None is all.

    Raises:
        NoKeyLeft: one has none; the message says which.
    """
    positions = torch.arange(queries.start, queries.stop)
    empty = (removed | hidden_edges(positions, torch.arange(removed.shape[1]), window)).all(-1).nonzero().flatten()
    if not len(empty):
        return
    query = queries[int(empty[0])]
    first = 0 if window is None else max(0, query - window + 1)
    keys = "its only key, 0," if query == 0 else f"all of its keys, {first} to {query},"
    sight = "" if window is None else f" of layer {layer}, which sees the last {window} positions,"
    raise NoKeyLeft(
        f"query {query}{sight} would have no key left: the edges to {keys} are removed, and its attention would be "
        "0/0; leave it at least one",
        param="edges",
    )


def check_edges(
    edges: Sequence[EdgeSpec], length: int, limit: int | None = None, windows: Mapping[int, int | None] | None = None
) -> None:
    """See before anything runs that edges are in range, causal, and leave every query a key.

    Args:
        length: of the prompt.
        limit: how many positions there will be at most, tokens to come included; None is `length`.
        windows: for each layer that is cut, how many positions back it sees; None is all positions.

    Raises:
        OutOfRange, InvalidArgument: as `EdgeSpec.resolved`.
        NoKeyLeft: as `refuse_empty_rows`.
    """
    limit = length if limit is None else limit
    touched = [edge.resolved(length, limit)[0] for edge in edges]
    sights = {window: layer for layer, window in (windows or {0: None}).items()}
    for start in range(min((one.start for one in touched), default=limit), limit, _BLOCK):
        queries = range(start, min(limit, start + _BLOCK))
        if not any(one.start < queries.stop and one.stop > queries.start for one in touched):
            continue
        removed = removed_edges(edges, queries, queries.stop, length, limit)
        for window, layer in sights.items():
            refuse_empty_rows(removed, queries, layer=layer, window=window)


def parse_selection(value: object) -> Side | list[Side]:
    """One number, a range, a list of either, or "all".

    Raises:
        ValueError: it is something else.
    """
    if value == "all":
        return Span()
    try:
        if isinstance(value, list | tuple | range):
            return [parse_side(one) for one in value]
        return parse_side(value)
    except ValueError:
        raise ValueError("a number, a range as '3:7', a list of either, or 'all' is expected") from None


def selected(given: object, count: int, what: str, *, param: str) -> list[int]:
    """The numbers that a selection names among 0 … count − 1, in its order; negative ones count from the end.

    Raises:
        ValueError: as `parse_selection`.
        OutOfRange: as `resolve_side`, of which `what` and `param` are.
    """
    chosen = parse_selection(given)
    sides = chosen if isinstance(chosen, list) else [chosen]
    return [number for side in sides for number in resolve_side(side, count, count, what, param=param)]


def _plain(side: Side | list[Side]) -> Any:
    if isinstance(side, list):
        return [_plain(one) for one in side]
    return str(side) if isinstance(side, Span) else side


def _edge(value: object) -> list[Any]:
    edge = EdgeSpec.parse(value)
    return [_plain(edge.query), _plain(edge.key)]


_SIDE_SCHEMA = int | str | dict[str, int]

EdgeArg = Annotated[list[Any], BeforeValidator(_edge, json_schema_input_type=tuple[_SIDE_SCHEMA, _SIDE_SCHEMA])]
"""An edge in an argument, checked and left as plain data: `EdgeSpec.parse` reads it."""
Selection = Annotated[
    int | str | list[int | str],
    BeforeValidator(
        lambda value: _plain(parse_selection(value)), json_schema_input_type=_SIDE_SCHEMA | list[_SIDE_SCHEMA]
    ),
]
"""Layers in an argument, checked and left as plain data: `parse_selection` reads it."""
