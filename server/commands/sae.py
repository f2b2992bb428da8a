"""`sightline sae`: autoencoders on disk."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attribution.errors import InvalidArgument
from server.commands.output import size
from server.commands.sae_train import train


class HelpAlone(TyperGroup):
    """A group that shows its help when no command of it is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Nothing typed asks for help."""
        return super().parse_args(ctx, args or ["--help"])


sae = typer.Typer(cls=HelpAlone, help="Fetch, convert and train sparse autoencoders.")


@sae.callback()
def _group() -> None:
    """Without this a group of one command would be that command."""


sae.command()(train)


@sae.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="RELEASE|FOLDER", help="A release that sae-lens knows, or a folder.")
    ],
    id_or_dir: Annotated[str, typer.Argument(metavar="[ID]", help="The id within a release.")],
    out: Annotated[Path | None, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)] = None,
    reads: Annotated[
        str | None,
        typer.Option(help="Where the autoencoder of a folder reads, as 'resid_post[2]'.", show_default=False),
    ] = None,
    writes: Annotated[
        str | None, typer.Option(help="Where a transcoder of a folder writes, as 'mlp_out[2]'.", show_default=False)
    ] = None,
) -> None:
    """Keep a published autoencoder, or one of a folder, in the format that the server reads: RELEASE ID DIR, or FOLDER
    DIR. What was made is held against the original first."""
    from attribution.features.converting import convert_folder, convert_release
    from attribution.features.places import parse_place

    if out is None:
        if not Path(source).is_dir():
            raise InvalidArgument(f"{source} is no folder; a published autoencoder is named by RELEASE ID DIR")
        places = {"reads": reads, "writes": writes}
        given = {name: None if text is None else parse_place(text, name) for name, text in places.items()}
        folder = Path(id_or_dir)
        found = convert_folder(source, folder, **given)
    elif reads or writes:
        raise InvalidArgument("--reads and --writes are for a folder; of a release they are known")
    else:
        folder = out
        found = convert_release(source, id_or_dir, folder)
    bytes_there = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(
        f"{folder}: {found.architecture}, {found.n_features} features, width {found.d_in}"
        f"{f' to {found.d_out}' if found.is_transcoder else ''}, {size(bytes_there)}"
    )
    typer.echo(f"model: {found.model_name or 'not said'}")
    typer.echo(f"reads: {found.reads or 'not known'}" + (f", writes: {found.writes}" if found.is_transcoder else ""))
    if found.prepend_bos is not None:
        typer.echo(f"trained on texts that begin with the special token: {'yes' if found.prepend_bos else 'no'}")
