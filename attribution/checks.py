"""Checks of arguments against a model and a sample: what is wrong, what was found, what is allowed."""

from collections.abc import Sequence

from torch import Tensor

from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch


def in_range(name: str, value: int, count: int, what: str) -> int:
    """`value`, when it is one of 0 … count − 1.

    Raises:
        OutOfRange: it is not.
    """
    if not 0 <= value < count:
        raise OutOfRange(f"{name} is {value}; {what} are 0 to {count - 1}", param=name)
    return value


def positions(name: str, given: Sequence[int] | None, length: int) -> list[int]:
    """Positions of a sample of `length` tokens; None is all of them.

    Raises:
        OutOfRange: one of them is not in the sample.
        InvalidArgument: there is none, or one comes twice.
    """
    if given is None:
        return list(range(length))
    if not given:
        raise InvalidArgument(f"{name} is empty; it names at least one position", param=name)
    for position in given:
        in_range(name, position, length, "the positions of this sample")
    if len(set(given)) != len(given):
        raise InvalidArgument(f"{name} names a position twice", param=name)
    return list(given)


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> Tensor:
    """`tensor`, when it has the expected shape.

    Raises:
        ShapeMismatch: it has another.
    """
    if tuple(tensor.shape) != expected:
        raise ShapeMismatch(
            f"{name} has the shape {list(tensor.shape)}; expected {list(expected)} ({meaning})", param=name
        )
    return tensor
