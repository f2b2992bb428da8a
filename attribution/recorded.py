"""A recorded answer of a server: its tokens, and the activations that its savepoints kept.

<runs>/<run_id>/run.json            what ran, and for each choice its tokens and what was kept
<runs>/<run_id>/<choice>/<name>.pt  one savepoint
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution import checks
from attribution.errors import BadSelector, RunNotFound, SampleMismatch, StorageFailed
from attribution.model.capture import Stream
from attribution.model.resolve import resolve
from attribution.model.traced import Site, TracedModel

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Kept:
    """A savepoint of a recorded answer: its file, selector and dtype, and the positions of the rows of its `axis`."""

    path: Path
    selector: str
    dtype: torch.dtype
    positions: range
    axis: int


@dataclass(frozen=True)
class RecordedAnswer:
    """One choice of a run.

    Attributes:
        token_ids: prompt and completion; the last of the completion was never fed.
        prompt: how many of them are the prompt.
        dtype: of the model when it ran.
        intervened: whether something was changed inside the model while it ran.
        kept: its savepoints.
    """

    run_id: str
    token_ids: list[int] = field(repr=False)
    prompt: int
    dtype: torch.dtype
    intervened: bool
    kept: tuple[Kept, ...]

    @property
    def fed(self) -> int:
        """How many tokens the model was given."""
        return max(len(self.token_ids) - 1, self.prompt)


def read_answer(model: TracedModel, runs_dir: Path, run_id: str, choice: int) -> RecordedAnswer:
    """A choice of a recorded run.

    Raises:
        RunNotFound: no run of this id is recorded below `runs_dir`.
        OutOfRange: the run has no such choice.
        SampleMismatch: it is a run of another model.
        StorageFailed: its record cannot be read.
    """
    path = runs_dir / run_id / "run.json"
    try:
        if not _RUN_ID.fullmatch(run_id):
            raise FileNotFoundError(run_id)
        record = json.loads(path.read_bytes())
        of = (record["model"], record["revision"])
        answers = {answer["index"]: _answer(path.parent, record, answer) for answer in record["choices"]}
    except FileNotFoundError as error:
        raise RunNotFound(f"no run {run_id[:80]!r} is recorded below {runs_dir}", param="run_id") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageFailed(f"{path} cannot be read: {error!r}") from error
    if of != (model.id, model.revision):
        raise SampleMismatch(
            f"the run {run_id!r} is of the model {of[0]!r} (revision {of[1]}), and this is {model.id!r} (revision "
            f"{model.revision}); load that model, or give its tokens as token_ids",
            param="run_id",
        )
    return answers[checks.in_range("choice", choice, len(answers), "the choices of this run")]


def _answer(folder: Path, record: dict[str, Any], answer: dict[str, Any]) -> RecordedAnswer:
    token_ids = [int(token) for token in answer["token_ids"]]
    kept = tuple(
        Kept(
            folder / str(answer["index"]) / f"{name}.pt",
            meta["selector"],
            getattr(torch, meta["dtype"]),
            range(*meta["positions"]),
            meta["axis"],
        )
        for name, meta in answer.get("activations", {}).items()
    )
    dtype = getattr(torch, record.get("dtype", "float32"))
    prompt = answer.get("prompt_tokens", len(token_ids))
    return RecordedAnswer(folder.name, token_ids, prompt, dtype, bool(answer.get("interventions")), kept)


def recorded_rows(model: TracedModel, answer: RecordedAnswer, wanted: Stream, positions: list[int]) -> Tensor | None:
    """What a run kept of a stream of one site at some positions, [pos, *width] as `wanted` cuts it.

    Rows that were kept in a narrower dtype than the model's are not taken. Where nothing was changed inside the model,
    the stream that leaves a layer is the one that enters the next.

    Returns:
        None when a position was not kept.

    Raises:
        StorageFailed: a file of the run cannot be read.
    """
    found: dict[int, Tensor] = {}
    for kept in answer.kept:
        missing = [position for position in positions if position not in found and position in kept.positions]
        if missing and torch.promote_types(kept.dtype, answer.dtype) == kept.dtype:
            rows = _rows(model, answer, kept, wanted, missing)
            found |= {} if rows is None else dict(zip(missing, rows, strict=True))
    return torch.stack([found[position] for position in positions]) if len(found) == len(positions) else None


def _rows(
    model: TracedModel, answer: RecordedAnswer, kept: Kept, wanted: Stream, positions: list[int]
) -> Tensor | None:
    try:
        selector = resolve(model, kept.selector)
    except BadSelector:
        return None
    stream = selector.streams[0]
    same = _same_sites(model, wanted.sites[0]) if not answer.intervened else {wanted.sites[0]}
    at = next((index for index, site in enumerate(stream.sites) if site in same), None)
    whole = stream.heads is None and stream.third is None
    if selector.is_pattern or at is None or not (whole or (stream.heads, stream.third) == (wanted.heads, wanted.third)):
        return None
    try:
        tensor = torch.load(kept.path, weights_only=True, mmap=True)
        tensor = tensor[at] if selector.stacked else tensor
        rows = tensor[torch.tensor([kept.positions.index(position) for position in positions])]
    except (OSError, RuntimeError, IndexError, EOFError) as error:
        raise StorageFailed(f"{kept.path} cannot be read: {error}") from error
    return wanted.cut(rows) if whole else rows


def _same_sites(model: TracedModel, site: Site) -> set[Site]:
    """A site, and the one at which the stream is the same."""
    layers = "" if model.family is None else model.family.layers
    head, _, last = site.path.rpartition(".")
    if head != layers or not last.isdigit():
        return {site}
    layer = int(last) + (1 if site.side == "output" else -1)
    return {site, Site(f"{head}.{layer}", "input" if site.side == "output" else "output")}
