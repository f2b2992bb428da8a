"""`sightline runs`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import InvalidRequest, RunNotFound
from server.commands.inspect_file import SUMMARY, load_tensors, summary_row
from server.commands.output import moment, show, size
from server.settings import load_settings

if TYPE_CHECKING:
    from server.runs import RunStore


def runs(
    run_id: Annotated[
        str | None, typer.Argument(help="A run, or as much of its id as tells it apart.", show_default=False)
    ] = None,
    activations_dir: Annotated[Path | None, typer.Option(help="Folder of the runs.", show_default=False)] = None,
) -> None:
    """List the recorded runs, or what one of them holds."""
    given = {} if activations_dir is None else {"activations_dir": activations_dir}
    folder = load_settings(**given).activations_dir
    if not folder.is_dir():
        typer.echo(f"No runs: there is no folder {folder} yet.")
        return
    from server.runs import RunStore

    store = RunStore(folder, None, None)
    if run_id is None:
        _list(store)
    else:
        _describe(store, _whole_id(store, run_id))


def _list(store: "RunStore") -> None:
    rows = [
        (
            run["run_id"],
            moment(run["created"]),
            run["model"],
            run["choices"],
            size(run["bytes"]),
            ", ".join(run["savepoints"]),
        )
        for run in store.summaries()
    ]
    if not rows:
        typer.echo(f"No runs below {store.root}.")
        return
    show(("run", "time", "model", "choices", "size", "savepoints"), rows, right=("choices", "size"))


def _describe(store: "RunStore", run_id: str) -> None:
    record = store.read(run_id)
    shown = ("run_id", "model", "revision", "dtype", "attn_implementation", "seed")
    try:
        facts = [f"{name}: {record[name]}" for name in shown if record.get(name) is not None]
        typer.echo("\n".join([*facts, f"created: {moment(record['created'])}", f"folder: {store.root / run_id}"]))
        for choice in record["choices"]:
            typer.echo(f"\nchoice {choice['index']}: {_outline(choice)}")
            _show_tensors(store, run_id, choice)
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"run.json of {run_id} is not a run's: {error!r}") from error


def _outline(choice: dict[str, Any]) -> str:
    prompt, total = choice["prompt_tokens"], len(choice["token_ids"])
    return f"{prompt} + {total - prompt} tokens, {choice['finish_reason']}: {choice['text']!r}"


def _show_tensors(store: "RunStore", run_id: str, choice: dict[str, Any]) -> None:
    rows = []
    for name, meta in choice["activations"].items():
        (tensor,) = load_tensors(store.file(run_id, choice["index"], name)).values()
        rows.append((*summary_row(name, tensor), meta["selector"]))
    show((*SUMMARY, "selector"), rows, right=SUMMARY[3:])


def _whole_id(store: "RunStore", start: str) -> str:
    """The one run whose id starts so, as `session_id` in an answer does."""
    found = [run["run_id"] for run in store.summaries() if run["run_id"].startswith(start)]
    if len(found) != 1:
        raise RunNotFound(
            f"{len(found) or 'no'} runs below {store.root} start with {start!r}"
            + (f": {', '.join(found)}" if found else "; `sightline runs` lists them"),
            param="run_id",
        )
    return found[0]
