"""`sightline inspect`: what a file of tensors holds, read without loading it whole."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import InvalidRequest, NotFound
from server.commands.output import show, size

if TYPE_CHECKING:
    from torch import Tensor

SHOWN_ROWS = 40
BLOCK = 2**22
SUMMARY = ("name", "shape", "dtype", "size", "norm mean", "norm min", "norm max", "NaN", "Inf")


@dataclass(frozen=True)
class Rows:
    """Which tokens the rows of a recorded tensor belong to; `axis` is the axis of the rows."""

    axis: int
    positions: range
    token_ids: list[int]
    tokens: list[str]


def inspect(
    file: Annotated[Path, typer.Argument(help="A .pt or .safetensors file.", show_default=False)],
    every_row: Annotated[bool, typer.Option("--all", help="Show every row, however many.")] = False,
) -> None:
    """Show shape, dtype, norms, NaN and Inf of a file's tensors, row by row with its token for a run's."""
    tensors, rows = load_tensors(file), rows_of(file)
    show(SUMMARY, [summary_row(name, tensor) for name, tensor in tensors.items()], right=SUMMARY[3:])
    if rows is not None:
        for tensor in tensors.values():
            typer.echo()
            _show_rows(tensor, rows, every_row)


def load_tensors(file: Path) -> dict[str, "Tensor"]:
    """The tensors of a file by name, mapped from disk where the format allows it.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it holds no plain tensors.
    """
    import safetensors
    import safetensors.torch
    import torch

    if not file.is_file():
        raise NotFound(f"there is no file {str(file)!r}", param="file")
    try:
        if file.suffix == ".safetensors":
            return dict(sorted(safetensors.torch.load_file(file).items()))
        loaded = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, safetensors.SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InvalidRequest(f"{str(file)!r} cannot be read as tensors: {reason}", param="file") from error
    tensors = loaded if isinstance(loaded, dict) else {file.stem: loaded}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidRequest(f"{str(file)!r}: {name!r} is no tensor but a {type(tensor).__name__}", param="file")
    return {str(name): tensor for name, tensor in tensors.items()}


def rows_of(file: Path) -> Rows | None:
    """What run.json says of a run's file, `<run_id>/<choice>/<name>.pt`; None for any other file."""
    record_file = file.resolve().parents[1] / "run.json"
    if not record_file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(record_file.read_bytes())
        choice = next(entry for entry in record["choices"] if str(entry["index"]) == file.resolve().parent.name)
        meta = choice["activations"][file.stem]
        return Rows(meta["axis"], range(*meta["positions"]), choice["token_ids"], choice["tokens"])
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise InvalidRequest(f"{str(record_file)!r} does not describe {file.name}: {error!r}") from error


def summary_row(name: str, tensor: "Tensor") -> tuple[object, ...]:
    """The cells of one tensor under the headers `SUMMARY`; the norms are those of its finite rows."""
    norms, nan, inf = row_norms(tensor)
    finite = norms[norms.isfinite()]
    spread = (finite.mean(), finite.min(), finite.max()) if finite.numel() else ()
    cells = [f"{float(value):.4g}" for value in spread] or ["–"] * 3
    kind = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), kind, size(tensor.nbytes), *cells, int(nan.sum()), int(inf.sum())


def row_norms(tensor: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Norm, number of NaN and number of Inf of every row along the last axis, shaped like the other axes.

    Norms are computed in float64, some rows at a time: memory stays small whatever the file's size.
    """
    import torch

    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    shape = tensor.shape[:-1]
    if tensor.numel() == 0:
        zero = torch.zeros(shape)
        return zero, zero.long(), zero.long()
    parts = [
        (torch.linalg.vector_norm(block, dim=-1), block.isnan().sum(-1), block.isinf().sum(-1))
        for block in (block.to(torch.float64) for block in _blocks(tensor))
    ]
    norms, nan, inf = (torch.cat([part.flatten() for part in column]) for column in zip(*parts, strict=True))
    return norms.view(shape), nan.view(shape), inf.view(shape)


def _blocks(tensor: "Tensor") -> Iterator["Tensor"]:
    """The tensor's rows in their order, `BLOCK` numbers at a time."""
    if tensor.dim() == 1:
        yield tensor
    elif tensor.dim() == 2:
        yield from tensor.split(max(1, BLOCK // tensor.shape[-1]))
    else:
        for part in tensor:
            yield from _blocks(part)


def _show_rows(tensor: "Tensor", rows: Rows, every_row: bool) -> None:
    """One line a position: its token, and over the other axes the mean norm and the NaN and Inf."""
    norms, nan, inf = row_norms(tensor)
    if rows.axis >= norms.dim() or norms.shape[rows.axis] != len(rows.positions):
        raise InvalidRequest(
            f"run.json gives {len(rows.positions)} positions along axis {rows.axis}; the tensor is {list(tensor.shape)}"
        )
    norms, nan, inf = (column.movedim(rows.axis, 0).reshape(len(rows.positions), -1) for column in (norms, nan, inf))
    count = len(rows.positions)
    hidden = range(0) if every_row or count <= SHOWN_ROWS else range(SHOWN_ROWS // 2, count - SHOWN_ROWS // 2)
    cells = [
        (
            position,
            rows.token_ids[position],
            repr(rows.tokens[position]),
            f"{float(norms[row].mean()):.4g}",
            int(nan[row].sum()),
            int(inf[row].sum()),
        )
        for row, position in enumerate(rows.positions)
        if row not in hidden
    ]
    show(
        ("position", "id", "token", "norm", "NaN", "Inf"),
        cells,
        right=("position", "id", "norm", "NaN", "Inf"),
    )
    if hidden:
        typer.echo(f"rows {hidden.start} to {hidden.stop - 1} of {count} are left out; --all shows them")
