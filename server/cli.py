"""The command line.

An error raised on purpose is one line on stderr and an exit code: 2 for what was typed or asked for, 1
for everything else. Nothing heavy is imported before a command needs it, so that help is quick.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperGroup
from typer.exceptions import TyperException

from attribution.errors import InvalidArgument, InvalidRequest, NotFound, SightlineError
from server.commands.attribute import attribute
from server.commands.compare import compare
from server.commands.inspect_file import inspect
from server.commands.knockout import knockout
from server.commands.lens import lens
from server.commands.models import models
from server.commands.runs import runs
from server.commands.sae import sae
from server.commands.serve import serve


class OneLineErrors(TyperGroup):
    """A group of commands that never answers with a traceback where the reason is known."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        """Run a command and end the process; nothing typed asks for help."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given or ["--help"], *rest, **options | {"standalone_mode": False})
        except TyperException as error:
            _fail(error.format_message(), error.exit_code)
        except SightlineError as error:
            _fail(error.message, 2 if isinstance(error, InvalidArgument | InvalidRequest | NotFound) else 1)
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False))
            _fail("; ".join(faults), 2)
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="sightline",
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, models, runs, inspect, attribute, knockout, lens, compare):
    app.command()(command)
app.add_typer(sae, name="sae")


def _say_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sightline {version('sightline')}")
        raise typer.Exit
    return wanted


@app.callback()
def start(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is."),
    ] = False,
) -> None:
    """Serve a language model and open it up: every named activation on disk when the answer arrives."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the run leaves.")] = Path("demo_out"),
    features: Annotated[
        bool, typer.Option("--features", help="Show the features of an answer, and clamp one, instead.")
    ] = False,
) -> None:
    """Run the main job end to end on the embedded model, against a real server started for it."""
    if features:
        from server.commands.demo_features import run
    else:
        from server.demo import run
    run(out)


@app.command()
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("demo_model"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Wall-clock time of the training.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the puzzles.")] = 0,
) -> None:
    """Train the embedded model again, from the puzzle generator alone."""
    from puzzles.train import train

    train(out, minutes=minutes, seed=seed)


def main() -> None:
    """The console script."""
    app()


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"sightline: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
