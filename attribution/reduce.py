"""From many samples to one array, from an array to its greatest entries, and products of arrays by named axes."""

import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch, SightlineError
from attribution.progress import progress_bar


def mr(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Map `fn` over results and reduce by the mean: `mr(attribute_step)(results, model, nodes=nodes)`.

    The function that it gives takes the results in place of one, hands every other argument on, and shows a bar unless
    `show_progress=False`. `fn(r, model, …)` returns a tensor or a number, or tuples, lists and dicts of these, with the
    same shapes for every sample. The mean is summed up in float64 as it goes, so that no sample's result is kept, and
    is float32, or float64 where the results are.

    Raises (the function that it gives):
        InvalidArgument: there are no results.
        ShapeMismatch: a sample's result has another shape than the first one's.
        whatever `fn` raises, with the sample's index.
    """

    def mapped(results: Sequence[Any], model: Any, *args: Any, show_progress: bool = True, **kwargs: Any) -> Any:
        if len(results) == 0:
            raise InvalidArgument("results is empty; the mean is taken over at least one", param="results")
        total = found = None
        name = getattr(fn, "__name__", "mr")
        values = _values(fn, results, model, args, kwargs)
        with progress_bar(len(results), name, show=show_progress) as bar:
            for r in results:
                try:
                    found = next(values)
                    total = _wide(found) if total is None else _sum(total, found)
                except SightlineError as error:
                    error.message = f"sample {getattr(r, 'index', '?')}: {error.message}"
                    error.args = (error.message,)
                    raise
                except Exception as error:
                    error.add_note(f"in {name} of sample {getattr(r, 'index', '?')}")
                    raise
                bar.update()
        return _mean(total, found, len(results))

    return mapped


def _values(
    fn: Callable[..., Any], results: Sequence[Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Any]:
    """`fn` of each result; a function that knows how to do many at once (`of_many`) does so for as long as it can.

    After an error the results that are left are done one by one, so that it is told of the sample that it is of.
    """
    done = 0
    of_many = getattr(fn, "of_many", None)
    if of_many is not None and hasattr(model, "run_calls"):
        with suppress(SightlineError):
            for found in of_many(results, model, *args, **kwargs):
                yield found
                done += 1
    for r in results[done:]:
        yield fn(r, model, *args, **kwargs)


def _wide(found: Any) -> Any:
    if isinstance(found, tuple | list):
        return [_wide(one) for one in found]
    if isinstance(found, dict):
        return {name: _wide(one) for name, one in found.items()}
    return torch.as_tensor(found).to(torch.float64)


def _sum(total: Any, found: Any) -> Any:
    if isinstance(found, tuple | list) and isinstance(total, list) and len(found) == len(total):
        return [_sum(one, other) for one, other in zip(total, found, strict=True)]
    if isinstance(found, dict) and isinstance(total, dict) and found.keys() == total.keys():
        return {name: _sum(one, found[name]) for name, one in total.items()}
    wide = _wide(found)
    if not isinstance(wide, Tensor) or not isinstance(total, Tensor) or wide.shape != total.shape:
        raise ShapeMismatch(f"the result is {_shape(wide)}, that of the first sample {_shape(total)}", param="results")
    return total + wide


def _mean(total: Any, like: Any, count: int) -> Any:
    """`total / count`, in the containers and the precision of `like`."""
    if isinstance(like, tuple | list):
        means = [_mean(one, other, count) for one, other in zip(total, like, strict=True)]
        return type(like)(means) if type(like) in (tuple, list) else means
    if isinstance(like, dict):
        return {name: _mean(one, like[name], count) for name, one in total.items()}
    if not isinstance(like, Tensor):
        return float(total / count) if total.dim() == 0 else (total / count).numpy()
    return (total / count).to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _shape(value: Any) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__} of {len(value)}"


def topk_md(attr: Tensor, k: int = 30, transpose: bool = False) -> Any:
    """The `k` greatest entries of an array of any number of axes, the greatest first; all of them when there are fewer.

    A last axis of size 1 is dropped, as `attribute_step` gives it for one node.

    Args:
        transpose: give one row for each entry, not one tensor for each axis.

    Returns:
        `(indices, values)`, where `indices` has a tensor of `k` indices for each axis, so that `attr[indices]` are the
        values; transposed a list of rows `(layer, head, score)`.

    Raises:
        InvalidArgument: the array has no entry, or NaN among them.
        OutOfRange: `k` is below 1.
    """
    attr = torch.as_tensor(attr)
    if attr.dim() > 1 and attr.shape[-1] == 1:
        attr = attr[..., 0]
    if k < 1:
        raise OutOfRange(f"k is {k}; it is at least 1", param="k")
    if attr.numel() == 0 or attr.isnan().any():
        raise InvalidArgument("attr has no entries, or NaN among them, which has no place in an order", param="attr")
    values, flat = attr.flatten().topk(min(k, attr.numel()))
    indices = torch.unravel_index(flat, attr.shape)
    if not transpose:
        return indices, values
    return [(*map(int, row), float(value)) for *row, value in zip(*indices, values, strict=True)]


def einsum(equation: str, *arrays: Tensor) -> Tensor:
    """`torch.einsum` with axes that have names: `einsum("sample head pos, pos hidden -> sample head hidden", a, b)`.

    Axes that are not named on the right are summed. "..." stands for further axes, as in torch.

    Raises:
        InvalidArgument: the equation does not parse, or is not of that many arrays.
        ShapeMismatch: an array has another number of axes, or an axis two sizes.
    """
    left, arrow, right = equation.partition("->")
    terms = [term.split() for term in left.split(",")]
    names = list(dict.fromkeys(name for term in terms for name in term if name != "..."))
    unknown = [name for name in right.split() if name not in (*names, "...")]
    wrong = next((name for name in names if not name.isidentifier()), None)
    twice = len(set(right.split())) < len(right.split())
    if not arrow or unknown or wrong or twice or len(terms) != len(arrays) or len(names) > len(string.ascii_letters):
        raise InvalidArgument(
            f"{equation!r} does not say what to do with {len(arrays)} arrays; expected the names of the axes of each, "
            'as in "query head, key head -> head query key", and after the arrow some of them, each once',
            param="equation",
        )
    sizes: dict[str, int] = {}
    for term, array in zip(terms, arrays, strict=True):
        if "..." not in term and len(term) != array.dim():
            raise ShapeMismatch(f"{' '.join(term)!r} has the shape {list(array.shape)}", param="arrays")
        for name, size in () if "..." in term else zip(term, array.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ShapeMismatch(f"the axis {name!r} has the sizes {sizes[name]} and {size}", param="arrays")
    letters = dict(zip(names, string.ascii_letters, strict=False)) | {"...": "..."}
    written = [",".join("".join(letters[name] for name in term) for term in terms), *right.split()]
    return torch.einsum(f"{written[0]}->{''.join(letters[name] for name in written[1:])}", *arrays)
