"""`sightline compare`: several models side by side, as tables and as a JSON file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from attribution.errors import InvalidRequest, SightlineError, StorageFailed
from server.commands.options import Device, Dtype
from server.commands.output import show, write_json

_TEXT = 48  # characters of a sentence that are shown
_BEST = "*"
_TERM = ("n_tokens", "logprob", "mean_rank")

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Each 'demo', a hub id, an alias or a folder.", show_default=False),
]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="A sentence; may be repeated.", metavar="TEXT", show_default=False)
]
File = Annotated[
    Path | None,
    typer.Option("--file", help="A file with a sentence on each line.", metavar="FILE", show_default=False),
]
Terms = Annotated[
    list[str] | None,
    typer.Option(
        "--term",
        help="A term to look for in the sentences; may be repeated.",
        metavar="TERM",
        show_default=False,
    ),
]


def compare(
    models: Models,
    text: Texts = None,
    file: File = None,
    term: Terms = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Find terms in any case.")] = False,
    whole_words: Annotated[bool, typer.Option("--whole-words", help="Find terms only where they stand alone.")] = False,
    features: Annotated[int, typer.Option(min=0, help="Features of each term, where there are autoencoders.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the whole result to this JSON file.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compare models, whose tokenizers may differ: bits per byte of sentences, and what each makes of terms."""
    if output is not None and output.is_dir():
        raise InvalidRequest(f"--json is a file; {str(output)!r} is a folder", param="json")
    sentences = [*(text or []), *([] if file is None else _lines(file))]
    if not sentences:
        raise InvalidRequest("there is no sentence; give --text TEXT or --file FILE", param="text")
    found = _run(
        models=models,
        sentences=sentences,
        domain_terms=term or [],
        case_sensitive=not ignore_case,
        whole_words=whole_words,
        top_features=features,
        dtype=dtype,
        device_map=device,
    )
    _tell(found)
    if output is not None:
        write_json(output, found)
    failed = [one["model_id"] for one in found["models"] if one["error"] is not None]
    if failed:
        raise SightlineError(f"{len(failed)} of {len(models)} models failed: {', '.join(failed)}")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StorageFailed(f"{path} is no text in UTF-8: {error}") from error
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise InvalidRequest(f"{path} has no sentence: each stands on a line of its own", param="file")
    return found


def _run(**arguments: Any) -> dict[str, Any]:
    import tempfile

    from attribution.session import LocalSession

    with tempfile.TemporaryDirectory() as store:
        return LocalSession(store=store).compare(**arguments)


# --- tables


def _tell(found: dict[str, Any]) -> None:
    labels = _labels([one["model_id"] for one in found["models"]])
    _tell_models(found["models"], labels)
    labels = {one["model_id"]: labels[one["model_id"]] for one in found["models"] if one["error"] is None}
    _tell_sentences(found, labels)
    if found["terms"]:
        _tell_terms(found["terms"], labels)
        _tell_features(found["terms"], labels)


def _labels(names: list[str]) -> dict[str, str]:
    """What heads the columns: the last part of a name, where no other one has it."""
    short = [Path(name).name or name for name in names]
    return {name: one if short.count(one) == 1 else name for name, one in zip(names, short, strict=True)}


def _tell_models(models: list[dict[str, Any]], labels: dict[str, str]) -> None:
    for one in models:
        if one["error"] is not None:
            typer.echo(f"{one['model_id']} failed: {one['error']['message']}", err=True)
            continue
        start = "".join(one["starts_with"])
        begins = f"begins with {start!r}" if start else "begins with nothing: its first token is not scored"
        named = "" if labels[one["model_id"]] == one["model_id"] else f" ({one['model_id']})"
        typer.echo(f"{labels[one['model_id']]}{named}: {one['vocabulary']:,} tokens, {one['dtype']}, {begins}")


def _tell_sentences(found: dict[str, Any], labels: dict[str, str]) -> None:
    columns = list(labels.values())
    rows = [
        [_short(row["text"]), row["compared_bytes"], *(_bits(row, name) for name in labels), _note(row)]
        for row in found["sentences"]
    ]
    total = {one["model_id"]: one for one in found["models"]}
    number = max(total[name]["n_sentences"] for name in labels)
    if len(found["sentences"]) > 1:
        rows.append([f"all {number}", "", *(_number(total[name]["bits_per_byte"]) for name in labels), ""])
    typer.echo(f"\nbits per byte ({_BEST}: the fewest)\n")
    show(["sentence", "bytes", *columns, "note"], rows, right=("bytes", *columns))
    for name in labels:
        for number, row in enumerate(found["sentences"]):
            if row["models"][name]["own"]["note"] is not None:
                typer.echo(f"{labels[name]}, sentence {number}: {row['models'][name]['own']['note']}")


def _note(row: dict[str, Any]) -> str:
    if row["note"] is None:
        return ""
    return f"from character {row['compared_from']} on" if row["compared_bytes"] else row["note"]


def _bits(row: dict[str, Any], name: str) -> str:
    return _number(row["models"][name]["bits_per_byte"]) + (_BEST if name in row["best"] else " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _tell_terms(terms: list[dict[str, Any]], labels: dict[str, str]) -> None:
    columns = [f"{label} {what}" for label in labels.values() for what in ("tokens", "log p", "rank")]
    rows = []
    for term in terms:
        cells = [term["models"][name] for name in labels]
        values = ["–" if one[key] is None else f"{one[key]:.4g}" for one in cells for key in _TERM]
        times = f"{term['n_compared']} of {term['n_occurrences']}" if term["n_occurrences"] else "not found"
        rows.append([repr(term["term"]), times, *values])
    typer.echo("\nterms: means over the occurrences that every model measured; log p in nats, rank 1 is the best\n")
    show(["term", "occurrences", *columns], rows, right=columns)


def _tell_features(terms: list[dict[str, Any]], labels: dict[str, str]) -> None:
    rows = [
        [
            repr(term["term"]),
            label,
            one["source"],
            one["index"],
            f"{one['activation']:.3g}",
            one["n_occurrences"],
            one["description"] or "",
        ]
        for term in terms
        for name, label in labels.items()
        for one in term["models"][name]["features"]
    ]
    if rows:
        typer.echo("\nfeatures that fire on them: the mean over occurrences of the largest activation at one\n")
        headers = ["term", "model", "autoencoder", "feature", "activation", "fires at", "description"]
        show(headers, rows, right=("feature", "activation", "fires at"))


def _short(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= _TEXT else f"{shown[: _TEXT - 1]}…"
