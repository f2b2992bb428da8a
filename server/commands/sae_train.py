"""`sightline sae train`: an autoencoder or a transcoder of any model, from the activations of texts."""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attribution.errors import InvalidRequest
from server.commands.options import Device, Dtype, Model
from server.commands.output import show

if TYPE_CHECKING:
    from attribution.features.autoencoder import Autoencoder
    from attribution.features.measuring import Figures
    from attribution.features.places import Place
    from attribution.features.streaming import Sample
    from attribution.features.training import Recipe
    from attribution.model.traced import TracedModel

PUZZLES = "puzzles"
HELD_OUT = 64
"""Pieces of a text file that are measured with."""
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")


class Activation(StrEnum):
    """What makes features of pre-activations."""

    topk = "topk"
    jumprelu = "jumprelu"


class With(StrEnum):
    """What trains."""

    sae_lens = "sae-lens"
    own = "own"


Out = Annotated[Path, typer.Option(help="The folder to make.", show_default=False)]
Point = Annotated[
    str | None,
    typer.Option(help="Where it reads, as 'resid_post[2]' or 'blocks.2.hook_resid_post'.", show_default=False),
]
Writes = Annotated[
    str | None, typer.Option(help="Of a transcoder: where it writes, as 'mlp_out[2]'.", show_default=False)
]
OfMlp = Annotated[bool, typer.Option("--transcoder", help="Train a transcoder of the MLP of --layer.")]
Layer = Annotated[int | None, typer.Option(min=0, help="The layer of --transcoder.", show_default=False)]
Count = Annotated[int, typer.Option(min=1, help="How many features it has.")]
Kind = Annotated[
    Activation, typer.Option(help="topk: k active in each row; jumprelu: k in the mean of a batch, then a threshold.")
]
K = Annotated[int, typer.Option(min=1, help="How many features are active.")]
Tokens = Annotated[str, typer.Option(help="How many tokens it is trained on, as 500k or 1M.")]
Texts = Annotated[
    str | None, typer.Option(help="A text file; of 'demo' also 'puzzles', its own conversations.", show_default=False)
]
Context = Annotated[int, typer.Option(min=2, help="Tokens of each piece of a text file.")]
Trainer = Annotated[
    With | None,
    typer.Option(
        help="sae-lens (comes with the extra 'sae'), or own, which needs no library and does transcoders too.",
        show_default="sae-lens; of a transcoder own",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows of one step.")]
Rate = Annotated[
    float | None, typer.Option(min=0, help="The highest learning rate.", show_default="by the number of features")
]
Skip = Annotated[bool, typer.Option("--skip", help="Give a transcoder a linear path beside its features.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first weights and of the order of rows.")]


@dataclass(frozen=True)
class Source:
    """Texts: what is trained on, without end, what is measured with, and whether they begin with a special token."""

    name: str
    training: "Iterator[Sample]"
    held_out: "list[Sample]"
    prepend_bos: bool


def train(
    out: Out,
    model: Model = "demo",
    point: Point = None,
    writes: Writes = None,
    transcoder: OfMlp = False,
    layer: Layer = None,
    features: Count = 1024,
    architecture: Kind = Activation.jumprelu,
    k: K = 16,
    tokens: Tokens = "1M",
    texts: Texts = None,
    context: Context = 128,
    trainer: Trainer = None,
    batch: Batch = 1024,
    learning_rate: Rate = None,
    skip: Skip = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Train a sparse autoencoder or a transcoder on a model's activations, measure it, and keep it with a card."""
    count = _count(tokens)
    reads_at, writes_at = _places(point, writes, transcoder, layer)
    trainer = trainer or (With.sae_lens if reads_at == writes_at else With.own)
    _refuse_early(out, reads_at, writes_at, architecture, trainer, skip)
    from attribution.features.training import Recipe

    recipe = Recipe(features, architecture.value, k, count, batch, learning_rate or None, skip, seed)
    traced = _load(model, device, dtype, reads_at, writes_at)
    source = _source(traced, texts, context, seed)
    started = time.perf_counter()
    trained = _train(traced, reads_at, writes_at, recipe, source, trainer)
    made = _made(recipe, source, trainer, (time.perf_counter() - started) / 60)
    _keep(out, trained, reads_at, writes_at, traced, source, made)


def _made(recipe: "Recipe", source: Source, trainer: With, minutes: float) -> dict[str, str]:
    """How it was made, for the card."""
    return {
        "command": f"`sightline {shlex.join(sys.argv[1:])}`",
        "texts": source.name,
        "rows": f"{recipe.rows:,}, in steps of {recipe.batch_rows}",
        "trained with": trainer.value,
        "k, highest learning rate, seed": f"{recipe.k}, {recipe.top_rate:.2g}, {recipe.seed}",
        "minutes": f"{minutes:.1f}",
    }


# --- what was typed


def _count(given: str) -> int:
    found = _COUNT.fullmatch(given)
    count = round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2].lower()]) if found else 0
    if count < 1:
        raise InvalidRequest(f"--tokens is a number as 20000, 500k or 1M; found {given!r}", param="tokens")
    return count


def _places(point: str | None, writes: str | None, transcoder: bool, layer: int | None) -> "tuple[Place, Place]":
    """Where it reads and writes."""
    from attribution.features.places import Place, parse_place

    if transcoder:
        if layer is None or point is not None or writes is not None:
            raise InvalidRequest(
                "--transcoder goes with --layer, and reads and writes at the MLP of that layer; other places are named "
                "by --point and --writes, without it",
                param="transcoder",
            )
        return Place("mlp_in", layer), Place("mlp_out", layer)
    if layer is not None:
        raise InvalidRequest("--layer is for --transcoder; a place has its layer in it: resid_post[2]", param="layer")
    if point is None:
        raise InvalidRequest("say where it reads: --point resid_post[2], or --transcoder --layer 2", param="point")
    reads = parse_place(point)
    return reads, reads if writes is None else parse_place(writes, "writes")


def _refuse_early(
    out: Path, reads: "Place", writes: "Place", architecture: Activation, trainer: With, skip: bool
) -> None:
    """Refuse before the model is loaded what could not be done or kept in the end."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out} is there already; name another folder, or remove it", param="out")
    if reads == writes:
        if skip:
            raise InvalidRequest("--skip is for a transcoder: an autoencoder would copy its input", param="skip")
        if trainer is With.sae_lens:
            from attribution.features.sae_lens_training import sae_lens_trainer

            sae_lens_trainer()
        return
    if trainer is With.sae_lens:
        raise InvalidRequest("sae-lens trains no transcoders; --trainer own does", param="trainer")
    if architecture is Activation.topk:
        raise InvalidRequest(
            "the directory format of SAELens has no top-k transcoder; --architecture jumprelu", param="architecture"
        )


# --- work


def _load(name: str, device: str, dtype: str, *places: "Place") -> "TracedModel":
    """The model, which has these places."""
    from attribution.features.declared import width_of
    from attribution.model.load import LoadSpec, load

    model = load(LoadSpec(name, device_map=device, dtype=dtype))
    for place in places:
        if place.layer >= model.dimensions.n_layers:
            raise InvalidRequest(
                f"{model.id!r} has the layers 0 to {model.dimensions.n_layers - 1}; found {place}", param="point"
            )
        width_of(model, place)
    return model


def _source(model: "TracedModel", texts: str | None, context: int, seed: int) -> Source:
    from attribution.features.streaming import Sample
    from attribution.features.texts import TextFile
    from attribution.model.hub import DEMO

    if texts is None and model.id != DEMO:
        raise InvalidRequest(f"--texts is the text file that {model.id!r} is to read", param="texts")
    if texts in (None, PUZZLES):
        if model.id != DEMO:
            raise InvalidRequest(f"'puzzles' are for 'demo'; --texts is a text file for {model.id!r}", param="texts")
        from puzzles.corpus import cached_encoder
        from puzzles.labels import held_out_conversations
        from puzzles.texts import draw_texts

        encode = cached_encoder(model.tokenizer)
        training = (Sample(ids, keep) for ids, keep in draw_texts(encode, seed))
        held_out = [Sample(one.token_ids, None, one.said) for one in held_out_conversations(encode, 3, 2)]
        return Source("conversations of puzzles and small talk, drawn anew", training, held_out, prepend_bos=False)
    file = TextFile(model, Path(texts), context)
    name = f"{Path(texts).name}, in pieces of {context} tokens; one in 20 kept apart to measure with"
    return Source(name, file.training(), file.held_out(HELD_OUT), file.bos is not None)


def _train(
    model: "TracedModel", reads: "Place", writes: "Place", recipe: "Recipe", source: Source, trainer: With
) -> "Autoencoder":
    from attribution.features.sae_lens_training import train_with_sae_lens
    from attribution.features.training import train
    from attribution.progress import drive

    if trainer is With.sae_lens:
        steps = train_with_sae_lens(model, reads, recipe, source.training)
    else:
        steps = train(model, reads, writes, recipe, source.training)
    return drive(steps, "training", show=True)


def _keep(
    out: Path,
    trained: "Autoencoder",
    reads: "Place",
    writes: "Place",
    model: "TracedModel",
    source: Source,
    made: dict[str, str],
) -> None:
    """Write it, measure what was written, and write and print the figures."""
    from attribution.features.card import card, figure_rows
    from attribution.features.measuring import Piece, measure
    from attribution.features.reading import read_autoencoder
    from attribution.features.writing import write_autoencoder
    from attribution.progress import drive

    write_autoencoder(
        out, trained, reads=reads, writes=writes, model_name=model.id, prepend_bos=source.prepend_bos, metadata=made
    )
    kept = read_autoencoder(out).autoencoder.to(model.device)
    figures: Figures = drive(measure(model, Piece(kept, reads, writes), source.held_out), "measuring", show=True)
    (out / "README.md").write_text(card(kept, reads, writes, model.id, figures, made))
    show(("figure", "value"), figure_rows(figures), right=("value",))
    typer.echo(f"{out} has it, with its card; POST /features/load or load_features({str(out)!r}) makes it a source")
