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
        raise out_of_range(name, value, f"{what} are 0 to {count - 1}")
    return value


def out_of_range(name: str, value: object, allowed: str) -> OutOfRange:
    """The error for a value that is not among those allowed."""
    return OutOfRange(f"{name} is {value}; {allowed}", param=name)


def mismatch(name: str, found: str, expected: str) -> ShapeMismatch:
    """The error for something of the wrong shape or length."""
    return ShapeMismatch(f"{name} has {found}; expected {expected}", param=name)


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
        raise mismatch(name, f"the shape {list(tensor.shape)}", f"{list(expected)} ({meaning})")
    return tensor


def answer(vocabulary: int, labels: Sequence[int] | None, candidate_ids: Sequence[int] | None, count: int) -> list[int]:
    """The label of each position as an index into the candidates; candidates of None are the whole vocabulary.

    Raises:
        InvalidArgument, OutOfRange, ShapeMismatch: naming the argument.
    """
    if labels is None:
        raise InvalidArgument("labels is missing: one token id per entry of pos_ids", param="labels")
    if len(labels) != count:
        raise mismatch("labels", f"{len(labels)} entries", f"{count}, one per entry of pos_ids")
    for label in labels:
        in_range("labels", label, vocabulary, "the token ids of this model")
    if candidate_ids is None:
        return list(labels)
    for token in candidate_ids:
        in_range("candidate_ids", token, vocabulary, "the token ids of this model")
    if not candidate_ids or len(set(candidate_ids)) != len(candidate_ids):
        raise InvalidArgument("candidate_ids names at least one token, and none of them twice", param="candidate_ids")
    for label in labels:
        if label not in candidate_ids:
            raise InvalidArgument(f"the label {label} is not among candidate_ids {list(candidate_ids)}", param="labels")
    return [list(candidate_ids).index(label) for label in labels]
