"""`sightline knockout`: what the next token would be if some edges of attention were not there."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attribution.errors import InvalidRequest, NotFound, SightlineError
from server.commands.knockout_output import tell, write
from server.commands.options import Device, Dtype

if TYPE_CHECKING:
    from attribution.model.hub import LocalModel
    from attribution.model.traced import TracedModel

PROMPT = "The capital of France is"
EDGE = "-1,0"
ID = "id:"
FETCH = "hf download Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class Experiment:
    """What is to be removed, and of what prompt; None is the default of the model at hand."""

    prompt: str | None
    arguments: dict[str, Any]


@dataclass
class Meter:
    """Seconds, and bytes of memory: of this process, and of tensors on GPUs (None without one)."""

    seconds: float = 0.0
    before: tuple[int, int | None] = (0, None)
    after: tuple[int, int | None] = (0, None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what happens inside."""
        self.before, started = _memory(), time.perf_counter()
        yield
        self.seconds, self.after = time.perf_counter() - started, _memory()


Model = Annotated[
    str | None,
    typer.Argument(
        help="'demo', a hub id, an alias or a folder; left out, every supported model of the Hugging Face cache.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None, typer.Argument(help=f"A text; by default {PROMPT!r}, for 'demo' a puzzle.", show_default=False)
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        help="A layer, a range as 3:7, or all; may be repeated.", metavar="N", show_default="the middle layer"
    ),
]
Edges = Annotated[
    list[str] | None,
    typer.Option(
        help="Query and key, each a position (negative: from the end), a range as 3:7, or *; may be repeated.",
        metavar="Q,K",
        show_default=EDGE,
    ),
]
Heads = Annotated[list[int] | None, typer.Option(help="A head; may be repeated.", metavar="N", show_default="all")]
Tokens = Annotated[
    list[str] | None,
    typer.Option(
        help=f"A token whose logits are compared, as text or as {ID}N; may be repeated.",
        metavar="TEXT",
        show_default="the most likely",
    ),
]


def knockout(
    model: Model = None,
    prompt: Prompt = None,
    layer: Layers = None,
    edge: Edges = None,
    head: Heads = None,
    tokens: Tokens = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many changed tokens are shown.")] = 10,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Remove edges of attention and show how the next-token distribution changes."""
    if output is not None and output.is_dir():
        raise InvalidRequest(f"--output is a file; {str(output)!r} is a folder", param="output")
    arguments = {
        "layers": _layers(layer or []),
        "heads": head or None,
        "edges": [_edge(one) for one in edge or [EDGE]],
        "tokens": [_token(one) for one in tokens or []] or None,
        "top_k": top_k,
    }
    experiment = Experiment(prompt, arguments)
    if model is not None:
        found = _run(model, None, experiment, device, dtype)
        if output is not None:
            write(output, found)
        return
    if output is not None:
        typer.echo(f"--output {output} is ignored: it holds the result of one model, and no MODEL is named", err=True)
    _run_cached(experiment, device, dtype)


# --- what was typed


def _layers(given: list[str]) -> Any:
    from attribution.interventions.edges import parse_selection

    if not given:
        return None
    if given == ["all"]:
        return "all"
    try:
        parse_selection(given)
    except ValueError as error:
        raise InvalidRequest(f"--layer: {error}", param="layer") from error
    return given


def _edge(given: str) -> list[str]:
    from attribution.interventions.edges import EdgeSpec

    try:
        EdgeSpec.parse(sides := given.split(","))
    except ValueError as error:
        raise InvalidRequest(
            f"--edge is Q,K as -1,0 or '*,2' or 5:,0:3; found {given!r}: {error}", param="edge"
        ) from error
    return sides


def _token(given: str) -> int | str:
    if not given.startswith(ID):
        return given
    number = given.removeprefix(ID)
    if not number.isdecimal():
        raise InvalidRequest(f"--tokens: {ID} is followed by a token id; found {given!r}", param="tokens")
    return int(number)


# --- models


def _run_cached(experiment: Experiment, device: str, dtype: str) -> None:
    """Every supported model of the cache in turn; one that fails does not keep the others from running.

    Raises:
        NotFound: none is there.
        SightlineError: one failed.
    """
    from attribution.model.hub import list_local_models

    cached = [one for one in list_local_models() if one.source == "cache"]
    if not cached:
        raise NotFound(f"no model is in the Hugging Face cache; '{FETCH}' fetches one, 'demo' is the embedded one")
    usable = [one for one in cached if _why_not(one) is None]
    for one in cached:
        if one not in usable:
            typer.echo(f"{one.id} is skipped: {_why_not(one)}\n")
    if not usable:
        raise NotFound(f"no supported model is in the Hugging Face cache; '{FETCH}' fetches one")
    failed = []
    for one in usable:
        try:
            _run(str(one.path), one.id, experiment, device, dtype)
        except SightlineError as error:
            typer.echo(f"{one.id} failed: {error.message}", err=True)
            failed.append(one.id)
        typer.echo()
        _free()
    if failed:
        raise SightlineError(f"{len(failed)} of {len(usable)} models failed: {', '.join(failed)}")


def _why_not(model: "LocalModel") -> str | None:
    """Why a model of the cache cannot be run; None when it can."""
    if model.model_type is not None and not model.supported:
        return f"its family {model.model_type!r} is not supported"
    return model.reason


def _run(name: str, shown_name: str | None, experiment: Experiment, device: str, dtype: str) -> dict[str, Any]:
    """Load a model, run the experiment on it and print what comes out; the model is freed with this frame."""
    import tempfile

    from attribution.model.load import LoadSpec, load
    from attribution.session import LocalSession

    loading, running = Meter(), Meter()
    with loading.running():
        model = load(LoadSpec(name, device_map=device, dtype=dtype))
    model = model if shown_name is None else replace(model, id=shown_name)  # a snapshot of the cache has a long path
    text, given = _prompt(model, experiment.prompt)
    with tempfile.TemporaryDirectory() as store, running.running():
        found = LocalSession(model, store=store).knockout(**given, **experiment.arguments)
    facts = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": round(loading.seconds, 3),
        "forward_seconds": round(running.seconds, 3),
        "rss_before_bytes": loading.before[0],
        "rss_after_bytes": loading.after[0],
        "gpu_before_bytes": loading.before[1],
        "gpu_after_bytes": loading.after[1],
    }
    found |= facts | {"prompt": text}
    tell(found)
    return found


def _prompt(model: "TracedModel", prompt: str | None) -> tuple[str, dict[str, Any]]:
    """The text, and how it is given to the operation."""
    from attribution.model.hub import DEMO

    if prompt is not None or model.id != DEMO:
        text = PROMPT if prompt is None else prompt
        return text, {"prompt": text}
    from puzzles import gen_prompt, gen_puzzle

    text, _, _ = gen_prompt(gen_puzzle("paint right", n=3, m=3, n_train=3, seed=63))
    return text, {"messages": [{"role": "user", "content": text}]}


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory() -> tuple[int, int | None]:
    """Resident bytes of this process, and bytes of tensors on all GPUs."""
    import psutil
    import torch

    resident = psutil.Process().memory_info().rss
    if not torch.cuda.is_available():
        return resident, None
    return resident, sum(torch.cuda.memory_allocated(one) for one in range(torch.cuda.device_count()))
