"""`sightline lens`: what each layer of a model would say next, as a table, a JSON file or a picture."""

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import InvalidRequest, StorageFailed
from server.commands.options import Device, Dtype, Model
from server.commands.output import show, write_json

if TYPE_CHECKING:
    from attribution.model.traced import TracedModel

PROMPT = "The capital of France is"
IN_A_PIPE = 8  # positions
_COLUMN, _OTHERS = 15, 20  # characters of a position, and of the layer and the divergence
_TOKEN = 8


def lens(
    model: Model = "demo",
    prompt: Annotated[
        str | None, typer.Argument(help=f"A text; by default {PROMPT!r}, for 'demo' a puzzle.", show_default=False)
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers: numbers and ranges as 0,2,4:7, or all; the last is the final stream.")
    ] = "all",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Tokens whose next token is shown, in the same way; negative numbers count from the end. "
            "By default the last ones, as many as fit.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens of each cell in the JSON file.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.", show_default=False)] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this PNG or SVG.", show_default=False)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show what a model would say next if the stream entering each layer were the final one (the logit lens)."""
    _check_file("--output", output, None)
    _check_file("--picture", picture, (".png", ".svg", ".pdf"))
    at = None if positions is None else _selection("positions", positions)
    found = _run(model, prompt, {"layers": _selection("layers", layers), "top_k": top_k}, at, (device, dtype))
    _tell(found)
    if output is not None:
        write_json(output, found)
    if picture is not None:
        _draw(picture, found)


def _run(
    model: str, prompt: str | None, given: dict[str, Any], positions: Any, placed: tuple[str, str]
) -> dict[str, Any]:
    """Load a model and look; positions of None are the last ones, as many as fit."""
    import tempfile

    from attribution.model.load import LoadSpec, load
    from attribution.session import LocalSession

    loaded = load(LoadSpec(model, device_map=placed[0], dtype=placed[1]))
    tokens = _tokens(loaded, prompt)
    if positions is None:
        positions = f"{-min(_fitting(), len(tokens))}:"
    with tempfile.TemporaryDirectory() as store:
        return LocalSession(loaded, store=store).lens(token_ids=tokens, positions=positions, **given)


def _check_file(option: str, path: Path | None, kinds: tuple[str, ...] | None) -> None:
    """Before a model is loaded: what a file cannot be."""
    if path is None:
        return
    if path.is_dir():
        raise InvalidRequest(f"{option} is a file; {str(path)!r} is a folder", param=option)
    if kinds is not None and path.suffix.lower() not in kinds:
        raise InvalidRequest(f"{option} ends in {' or '.join(kinds)}; found {str(path)!r}", param=option)


def _selection(name: str, given: str) -> Any:
    """Numbers and ranges with commas between them, as the operation takes them."""
    from attribution.interventions.edges import parse_selection

    value: Any = given if given.strip() == "all" else re.split(r"\s*,\s*", given.strip())
    try:
        parse_selection(value)
    except ValueError as error:
        raise InvalidRequest(
            f"--{name} are numbers and ranges as 0,2,4:7, or all; found {given!r}", param=name
        ) from error
    return value


def _tokens(model: "TracedModel", prompt: str | None) -> list[int]:
    """The tokens of a text; for the embedded model, of a puzzle with its right answer."""
    from attribution.model.hub import DEMO
    from attribution.prompts import given_tokens

    if prompt is None and model.id == DEMO:
        from puzzles import Result, gen_puzzle

        puzzle = gen_puzzle("paint right", n=3, m=3, n_train=3, seed=63)
        result = Result.from_puzzle(puzzle, model.tokenizer)
        tokens = given_tokens(model, result.prompt, None, None, special=False)
        return tokens[: result.answer_indices[-1]]  # the last cell is still to be said
    return given_tokens(model, PROMPT if prompt is None else prompt, None, None)


def _fitting() -> int:
    """How many positions fit side by side."""
    if not sys.stdout.isatty():
        return IN_A_PIPE
    return max(1, (shutil.get_terminal_size().columns - _OTHERS) // _COLUMN)


def _tell(found: dict[str, Any]) -> None:
    """A row for each layer, the final one below: the most likely token of each position with its probability."""
    last = found["positions"][-1]
    headers = ["layer", *(f"{_shown(found['tokens'][at])} {at}" for at in found["positions"]), f"KL at {last}"]
    rows = [
        [
            "final" if layer == found["n_layers"] else layer,
            *(f"{_shown(cell['top'][0]['token'])} {cell['top'][0]['probability']:.2f}" for cell in cells),
            f"{cells[-1]['kl']:.3g}",
        ]
        for layer, cells in zip(found["layers"], found["cells"], strict=True)
    ]
    typer.echo(
        f"{found['model_id']}: the most likely next token and its probability, if the stream entering a layer were\n"
        f"the final one; {len(found['positions'])} of {len(found['token_ids'])} positions. Above each column the "
        "token that is read there.\nKL: divergence of the final distribution from the layer's, in nats.\n"
    )
    show(headers, rows, right=(headers[-1],))


def _shown(token: str) -> str:
    """A token as it stands in a table: quoted, so that blanks are seen."""
    text = repr(token)[1:-1]
    return f"'{text if len(text) <= _TOKEN else text[: _TOKEN - 1] + '…'}'"


def _draw(path: Path, found: dict[str, Any]) -> None:
    from attribution.plots import lens_map

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lens_map(found).savefig(path, dpi=150)
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error}") from error
    typer.echo(f"\npicture: {path}")
