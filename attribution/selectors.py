"""Selectors: data that names an activation, parsed by a small grammar and never evaluated.

    selector := point | module
    point    := NAME "[" index "]" | "logits"            resid_post[3]   z[*]   pattern[0:8:2]   logits
    module   := part ("." part)* "." ("output" | "input") model.layers[*].mlp.down_proj.input
    part     := NAME ("[" index "]")*                      at most one index of a selector names several layers
    index    := INT | "*" | [INT] ":" [INT] [":" [INT]]

What the names mean in a given model is decided where the model is known (`attribution.model.resolve`).
"""

import re
from dataclasses import dataclass

from attribution.errors import BadSelector

POINTS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "logits",
)
SIDES = ("output", "input")

Index = int | slice

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_INT = re.compile(r"-?[0-9]+")
_MAX_LENGTH = 300


@dataclass(frozen=True)
class Point:
    """A point: the same name in every family. `index` is None for `logits` only."""

    text: str
    name: str
    index: Index | None


@dataclass(frozen=True)
class ModulePath:
    """A module path: names and indices from the root of the model, and the side of the module that is read."""

    text: str
    parts: tuple[str | Index, ...]
    side: str


Selector = Point | ModulePath


def parse_selector(text: str) -> Selector:
    """Parse one selector.

    Raises:
        BadSelector: naming the part that does not parse and what is allowed there.
    """
    if not text or len(text) > _MAX_LENGTH:
        raise BadSelector(f"a selector has 1 to {_MAX_LENGTH} characters, this one has {len(text)}", param="selector")
    name = _NAME.match(text)
    if name and name.group() in POINTS and not text[name.end() :].startswith("."):
        return _parse_point(text, name.group())
    return _parse_module(text)


def _parse_point(text: str, name: str) -> Point:
    rest = text[len(name) :]
    if name == "logits":
        if rest:
            raise BadSelector(f"{text!r}: 'logits' takes no index, found {rest!r}", param="selector")
        return Point(text, name, None)
    bracket = _BRACKET.fullmatch(rest)
    if bracket is None:
        raise BadSelector(
            f"{text!r}: the point {name!r} takes one layer index, as in '{name}[3]', '{name}[*]' or '{name}[0:8:2]'; "
            f"found {rest!r}",
            param="selector",
        )
    return Point(text, name, _parse_index(text, bracket.group(1)))


def _parse_module(text: str) -> ModulePath:
    parts: list[str | Index] = []
    position = 0
    while True:
        name = _NAME.match(text, position)
        if name is None:
            raise BadSelector(
                f"{text!r}: expected a module name at character {position}, found {text[position : position + 12]!r}",
                param="selector",
            )
        parts.append(int(name.group()) if name.group().isdigit() else name.group())
        position = name.end()
        while bracket := _BRACKET.match(text, position):
            parts.append(_parse_index(text, bracket.group(1)))
            position = bracket.end()
        if position == len(text):
            break
        if text[position] != ".":
            raise BadSelector(
                f"{text!r}: expected '.' or '[index]' at character {position}, found {text[position:][:12]!r}",
                param="selector",
            )
        position += 1
    return _module_of(text, parts)


def _module_of(text: str, parts: list[str | Index]) -> ModulePath:
    if len(parts) < 2 or parts[-1] not in SIDES:
        raise BadSelector(
            f"{text!r}: a module path ends in '.output' or '.input' (as 'lm_head.output'); a point is one of "
            f"{', '.join(POINTS)}",
            param="selector",
        )
    if sum(isinstance(part, slice) for part in parts) > 1:
        raise BadSelector(f"{text!r}: at most one index may name several modules", param="selector")
    return ModulePath(text, tuple(parts[:-1]), str(parts[-1]))


def _parse_index(text: str, inside: str) -> Index:
    inside = inside.strip()
    if inside == "*":
        return slice(None)
    fields = [field.strip() for field in inside.split(":")]
    if len(fields) > 3 or not all(_INT.fullmatch(f) or (not f and len(fields) > 1) for f in fields):
        raise BadSelector(
            f"{text!r}: an index is an integer, '*' or a slice such as 0:8:2; found '[{inside}]'",
            param="selector",
        )
    if len(fields) == 1:
        return int(fields[0])
    bounds = [int(field) if field else None for field in fields]
    if len(bounds) == 3 and bounds[2] == 0:
        raise BadSelector(f"{text!r}: the step of a slice cannot be 0", param="selector")
    return slice(*bounds)


def pick(index: Index, length: int, text: str, what: str) -> list[int]:
    """The members of a list of `length` that `index` names.

    Raises:
        BadSelector: when it names none.
    """
    if isinstance(index, slice):
        members = list(range(length))[index]
        if members:
            return members
    elif -length <= index < length:
        return [index % length]
    raise BadSelector(
        f"{text!r}: {what} has {length} members, 0 to {length - 1}; the index names none", param="selector"
    )
