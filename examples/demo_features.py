"""The autoencoders that are shipped for the embedded model: `python -m examples.demo_features --out DIR`.

1. Five are trained on the same rows of fresh conversations (`puzzles.texts`), with the recipe of `sightline sae train`:
   one of the stream that leaves layer 2, and a transcoder for the MLP of each layer.
2. Each is measured on held-out conversations (`attribution.features.measuring`), and spliced in: cells still right.
3. Each feature that fires is held against labels of the tokens (`puzzles.labels`); where one, or up to three together,
   say well where it fires, they become its description, with the score that they have on other conversations.
4. Features whose clamping changes an answer are looked for (`examples.demo_clamps`), and everything is written, with a
   card.

`--again` measures and describes what is in the folder already.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.measuring import Piece, measure, spliced_logits
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from attribution.features.streaming import Sample, captured_rows
from attribution.features.training import Recipe, train_together
from attribution.features.writing import write_autoencoder
from attribution.model.load import LoadSpec, load
from attribution.model.traced import TracedModel
from attribution.progress import drive
from examples.demo_card import card
from examples.demo_clamps import Clamp, measure_clamp
from puzzles import COLOURS
from puzzles.corpus import cached_encoder
from puzzles.explain import Explainer, f1, holds
from puzzles.labels import Labelled, held_out_conversations, label_matrix, sentence
from puzzles.texts import draw_texts

PLACES = [(Place("resid_post", 2), Place("resid_post", 2))] + [
    (Place("mlp_in", layer), Place("mlp_out", layer)) for layer in range(4)
]
RECIPE = Recipe(features=512, architecture="jumprelu", k=16, rows=800_000)
LEARNT_FROM, SCORED_ON, MEASURED_ON = 1, 2, 3
"""Seeds of held-out conversations: labels are chosen on the first, scored on the second; figures are of the third."""
PER_RULE = 6
LOWEST = 0.6
"""The F1 from which on a feature gets its description."""

console = Console(width=120, highlight=False)


@dataclass(frozen=True)
class Described:
    """A feature: its description and score, how often it fires, and what it adds to the logits of the colours."""

    index: int
    description: str
    f1: float
    level: float
    density: float
    labels: list[tuple[str, str]]
    promotes: dict[str, float]


def main() -> None:
    """Train, measure, describe, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--rows", type=int, default=RECIPE.rows, help="rows to train on")
    parser.add_argument("--again", action="store_true", help="do not train: measure and describe what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(LoadSpec("demo", device_map="cpu", dtype="float32"))
    if not options.again:
        train(model, options.out, options.rows)
    describe(model, options.out)


def name_of(reads: Place, writes: Place) -> str:
    """The name of a source, as "2-resid_post" or "0-transcoder"."""
    return f"{reads.layer}-{reads.point if reads == writes else 'transcoder'}"


def train(model: TracedModel, out: Path, rows: int) -> None:
    """Train all of them and write them, with how long it took."""
    started = time.perf_counter()
    recipe = Recipe(**{**asdict(RECIPE), "rows": rows})
    samples = (Sample(ids, keep) for ids, keep in draw_texts(cached_encoder(model.tokenizer)))
    wanted = [(reads, writes, recipe) for reads, writes in PLACES]
    trained = drive(train_together(model, wanted, samples), "training", show=True)
    minutes = (time.perf_counter() - started) / 60
    for (reads, writes), one in zip(PLACES, trained, strict=True):
        facts = {
            "training_rows": rows,
            "minutes": minutes,
            "k": recipe.k,
            "command": "python -m examples.demo_features",
        }
        folder = out / name_of(reads, writes)
        write_autoencoder(
            folder, one, reads=reads, writes=writes, model_name="demo", prepend_bos=False, metadata=facts, replace=True
        )


def describe(model: TracedModel, out: Path) -> None:
    """Measure and describe what is in a folder; write descriptions, figures and the registry beside the weights."""
    encode = cached_encoder(model.tokenizer)
    chosen, scored, fresh = (
        list(held_out_conversations(encode, seed, PER_RULE)) for seed in (LEARNT_FROM, SCORED_ON, MEASURED_ON)
    )
    pieces = read_pieces(out)
    explainer = Labels.of(chosen, scored)
    figures, clamps = {}, []
    for name, piece in pieces.items():
        found = drive(measure(model, piece, samples_of(fresh)), name, show=True)
        described = explain(model, piece, explainer, chosen, scored)
        write_descriptions(out / name, described)
        figures[name] = {
            **asdict(found),
            "recovered": found.recovered,
            "recovered_of_mean": found.recovered_of_mean,
            "cells_right": cells_right(model, fresh, [piece]),
            "described": len(described),
        }
        if piece.reads == piece.writes:
            clamps = find_clamps(model, piece, described, activations(model, piece, scored))
        console.print(name, {key: round(value, 5) for key, value in figures[name].items()})
    facts = json.loads((out / name_of(*PLACES[0]) / "cfg.json").read_text())["metadata"]
    transcoders = [piece for piece in pieces.values() if piece.reads != piece.writes]
    whole = {
        "rows": facts["training_rows"],
        "minutes": round(facts["minutes"], 1),
        "k": facts["k"],
        "conversations": len(fresh),
        "clamped": name_of(*PLACES[0]),
        "cells_right": cells_right(model, fresh, []),
        "all_transcoders": {"cells_right": cells_right(model, fresh, transcoders)},
        "sources": figures,
        "clamps": [asdict(one) for one in clamps],
    }
    (out / "figures.json").write_text(json.dumps(whole, indent=1) + "\n")
    (out / "README.md").write_text(card(whole, read_descriptions(out, pieces)))
    write_registry(out, pieces)


def read_pieces(out: Path) -> dict[str, Piece]:
    """What the folder has, by name."""
    names = {name_of(*places): places for places in PLACES}
    return {
        name: Piece(read_autoencoder(out / name).autoencoder.to(dtype=torch.float32), *places)
        for name, places in names.items()
    }


def samples_of(conversations: list[Labelled]) -> list[Sample]:
    """Conversations to measure with; what the model has to say itself is scored."""
    return [Sample(one.token_ids, None, one.said) for one in conversations]


def cells_right(model: TracedModel, conversations: list[Labelled], pieces: list[Piece]) -> float:
    """The share of answer cells that are predicted right after the right ones, with autoencoders spliced in."""
    asked = [one for one in conversations if one.answer]
    right = total = 0
    for first in range(0, len(asked), 8):
        group = asked[first : first + 8]
        for one, logits in zip(group, spliced_logits(model, samples_of(group), pieces), strict=True):
            cells = torch.tensor(one.answer)
            right += int((logits[cells - 1].argmax(-1) == torch.tensor(one.token_ids)[cells]).sum())
            total += len(cells)
    return right / total


# --- descriptions


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of the conversations that descriptions are chosen from, and of those that they are scored on."""

    known: list[tuple[str, str]]
    explainer: Explainer
    scored: np.ndarray

    @classmethod
    def of(cls, chosen: list[Labelled], scored: list[Labelled]) -> "Labels":
        known, matrix = label_matrix(chosen)
        return cls(known, Explainer(matrix), label_matrix(scored, known)[1])


def activations(model: TracedModel, piece: Piece, conversations: list[Labelled]) -> np.ndarray:
    """[token, feature], of all conversations in order."""
    rows: dict[int, Tensor] = {}
    for index, found in captured_rows(model, [piece.reads], [Sample(one.token_ids) for one in conversations]):
        rows[index] = piece.autoencoder.encode(found[piece.reads])
    return torch.cat([rows[index] for index in range(len(conversations))]).numpy()


def explain(
    model: TracedModel, piece: Piece, labels: Labels, chosen: list[Labelled], scored: list[Labelled]
) -> list[Described]:
    """The features that labels describe well, the best first."""
    active, checked = activations(model, piece, chosen), activations(model, piece, scored)
    effects = colour_effects(model, piece.autoencoder)
    found = []
    for index in range(piece.autoencoder.n_features):
        explanation = labels.explainer.explain(active[:, index])
        if explanation is None:
            continue
        score = f1(checked[:, index] > explanation.level, holds(labels.scored, explanation.labels))
        if score < LOWEST:
            continue
        names = [labels.known[label] for label in explanation.labels]
        found.append(
            Described(
                index=index,
                description=f"{sentence(names, model.tokenizer.decode)} (F1 {score:.2f}{above(explanation.level)})",
                f1=round(score, 3),
                level=round(explanation.level, 3),
                density=round(float((checked[:, index] > 0).mean()), 5),
                labels=names,
                promotes={
                    colour: round(float(effect), 4) for colour, effect in zip(COLOURS, effects[index], strict=True)
                },
            )
        )
    return sorted(found, key=lambda one: -one.f1)


def above(level: float) -> str:
    """How a description says that it is of activations above a level."""
    return f" above {level:.0f}" if level else ""


def find_clamps(model: TracedModel, piece: Piece, described: list[Described], active: np.ndarray) -> list[Clamp]:
    """What clamping does, of the feature of each colour that is described best; the strongest first."""
    best = {one.labels[0][1]: one for one in reversed(described) if [group for group, _ in one.labels] == ["colour"]}
    encode, found = cached_encoder(model.tokenizer), []
    for colour, one in best.items():
        firing = active[:, one.index]
        typical = float(firing[firing > one.level].mean())
        found.append(measure_clamp(model, encode, piece, one.index, colour, typical))
    return sorted(found, key=lambda one: -one.effect.changed)


def colour_effects(model: TracedModel, autoencoder: Autoencoder) -> Tensor:
    """What one unit of each feature's direction adds to the logit of each colour, less the mean of the five, through
    the final norm's weight and the unembedding, per unit of the norm's scale: [feature, colour].
    """
    ids = [model.tokenizer.encode(f" {colour}", add_special_tokens=False)[0] for colour in COLOURS]
    weight = model.module.get_output_embeddings().weight[ids] * model.module.get_submodule("model.norm").weight
    effects = autoencoder.W_dec @ weight.detach().T
    return effects - effects.mean(-1, keepdim=True)


def write_descriptions(folder: Path, described: list[Described]) -> None:
    """A JSON object a line, as `read_descriptions` reads them, with scores beside."""
    lines = (json.dumps(asdict(one)) for one in described)
    (folder / "descriptions.jsonl").write_text("".join(f"{line}\n" for line in lines))


def read_descriptions(out: Path, pieces: dict[str, Piece]) -> dict[str, list[dict[str, Any]]]:
    """What was written, by source."""
    return {
        name: [json.loads(line) for line in (out / name / "descriptions.jsonl").read_text().splitlines()]
        for name in pieces
    }


def write_registry(out: Path, pieces: dict[str, Piece]) -> None:
    """features.toml: what the server reads."""
    entries = [
        f'[[source]]\nname = "{name}"\nmodel = "demo"\nfolder = "{name}"\npoint = "{piece.reads}"\n'
        f'writes = "{piece.writes}"\ndescriptions = "{name}/descriptions.jsonl"\n'
        for name, piece in pieces.items()
    ]
    (out / "features.toml").write_text("\n".join(entries))


if __name__ == "__main__":
    main()
