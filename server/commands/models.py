"""`sightline models`."""

from pathlib import Path
from typing import Annotated

import typer

from server.commands.output import amount, show, size
from server.settings import load_settings


def models(
    models_dir: Annotated[Path | None, typer.Option(help="Folder of models to list too.", show_default=False)] = None,
) -> None:
    """List the models on this machine: embedded, in the Hugging Face cache, and in --models-dir."""
    given = {} if models_dir is None else {"models_dir": models_dir}
    settings = load_settings(**given)
    from attribution.model.hub import list_local_models

    headers = ("id", "type", "points", "parameters", "disk", "memory", "from", "note")
    rows = (
        (
            model.id,
            model.model_type or "?",
            "yes" if model.supported else "no",
            amount(model.parameters),
            size(model.disk_bytes),
            size(model.memory_bytes),
            model.source,
            model.reason or "",
        )
        for model in list_local_models(settings.models_dir)
    )
    show(headers, rows, right=("parameters", "disk", "memory"))
