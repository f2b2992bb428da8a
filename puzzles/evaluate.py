"""How good the embedded model is on puzzles it was not trained on: ``python -m puzzles.evaluate DIR``.

Puzzles come from ``gen_puzzle``, whose seeds are a stream apart from training's. Each is asked in four ways:
rule to be inferred from 3 to 5 examples, rule named, spacing varied, and one example only. *cells* and
*grids* are shares of right cells and wholly right grids when every cell is predicted with the right cells
before it; *generated* is the share of whole grids right when the model writes the whole answer greedily by
itself.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzles import demo_model_path
from puzzles.corpus import draw_layout
from puzzles.errors import PuzzleError
from puzzles.layout import CANONICAL, format_grid
from puzzles.prompts import gen_prompt, parse_grid
from puzzles.puzzle import Puzzle, gen_puzzle
from puzzles.relations import COLOURS, side_neighbor_fn_defs, side_neighbor_relations
from puzzles.smalltalk import CHATS, FALLBACK, dress, random_text

SIZES = tuple((n, m) for n in (3, 4, 5) for m in (3, 4, 5))
WAYS = ("inferred", "named", "spacing", "one example")
BATCH_TOKENS = 4000
HELD_OUT_TALK = 7


@dataclass(frozen=True)
class Score:
    """One puzzle asked one way: which cells came out right, and whether the whole generated answer did."""

    way: str
    relation: str
    size: str
    right: tuple[bool, ...]
    generated: bool | None = None


def held_out(per_relation: int, way: str, sizes: Sequence[tuple[int, int]] = SIZES) -> Iterator[Puzzle]:
    """``per_relation`` puzzles for every relation and size; with 3, 4, 5 examples in turn, or one."""
    for n, m in sizes:
        for relation in side_neighbor_relations:
            for seed in range(per_relation):
                yield gen_puzzle(relation, n, m, 1 if way == "one example" else 3 + seed % 3, seed)


def write_prompt(puzzle: Puzzle, way: str) -> str:
    """The user's message; ``spacing`` draws one of the varied layouts, never the canonical one."""
    if way != "spacing":
        return gen_prompt(puzzle, side_neighbor_fn_defs if way == "named" else None)[0]
    rng = np.random.default_rng([puzzle.seed, *puzzle.shape, side_neighbor_relations.index(puzzle.relation)])
    while (layout := draw_layout(rng)) == CANONICAL:
        pass
    return layout.prompt(puzzle.examples, puzzle.test_input)


def asked_text(tokenizer, prompt: str) -> str:
    """The templated conversation up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def score_cells(model, tokenizer, puzzles: Sequence[Puzzle], way: str) -> list[Score]:
    """Predict every answer cell from the right ones before it, in batches of similar length."""
    rows = []
    for puzzle in puzzles:
        asked = tokenizer.encode(asked_text(tokenizer, write_prompt(puzzle, way)), add_special_tokens=False)
        answer = tokenizer.encode(format_grid(puzzle.test_output), add_special_tokens=False)
        rows.append((asked, answer, puzzle))
    rows.sort(key=lambda row: len(row[0]))
    colours = tokenizer.encode("".join(f" {letter}" for letter in COLOURS), add_special_tokens=False)
    scores = []
    while rows:
        count = max(1, BATCH_TOKENS // len(rows[0][0]))
        batch, rows = rows[:count], rows[count:]
        scores += [
            Score(way, puzzle.relation, "{}x{}".format(*puzzle.shape), right)
            for (_, _, puzzle), right in zip(batch, _right_cells(model, batch, colours), strict=True)
        ]
    return scores


@torch.inference_mode()
def _right_cells(model, batch: Sequence[tuple], colours: list[int]) -> list[tuple[bool, ...]]:
    width = max(len(asked) + len(answer) for asked, answer, _ in batch)
    ids = torch.full((len(batch), width), model.config.pad_token_id)
    for place, (asked, answer, _) in enumerate(batch):
        ids[place, : len(asked) + len(answer)] = torch.tensor(asked + answer)
    predicted = model(input_ids=ids).logits.argmax(-1)
    right = []
    for place, (asked, answer, _) in enumerate(batch):
        guesses = predicted[place, len(asked) - 1 : len(asked) + len(answer) - 1].tolist()
        pairs = zip(answer, guesses, strict=True)
        right.append(tuple(token == guess for token, guess in pairs if token in colours))
    return right


@torch.inference_mode()
def answer_greedily(model, tokenizer, prompts: Sequence[str], max_new_tokens: int = 200) -> list[str]:
    """What the model answers to each user's message by itself, in one left-padded batch."""
    tokenizer.padding_side = "left"
    texts = [asked_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    written = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in written]


def score_generated(model, tokenizer, puzzles: Sequence[Puzzle], way: str) -> list[Score]:
    """Let the model write whole answers."""
    scores = []
    for start in range(0, len(puzzles), 16):
        batch = puzzles[start : start + 16]
        texts = answer_greedily(model, tokenizer, [write_prompt(puzzle, way) for puzzle in batch], 40)
        for puzzle, text in zip(batch, texts, strict=True):
            whole = _is_answer(text, puzzle)
            scores.append(Score(way, puzzle.relation, "{}x{}".format(*puzzle.shape), (), whole))
    return scores


def _is_answer(text: str, puzzle: Puzzle) -> bool:
    try:
        return parse_grid(text) == [list(row) for row in puzzle.test_output]
    except PuzzleError:
        return False


def score_talk(model, tokenizer, count: int = 100) -> tuple[float, float]:
    """Shares answered as taught: of known questions, and of random sentences (by the fallback line)."""
    rng = np.random.default_rng(HELD_OUT_TALK)
    known = [CHATS[rng.integers(len(CHATS))] for _ in range(count)]
    asked = [(dress(rng, str(rng.choice(questions))), answer) for answer, questions in known]
    unknown = [(dress(rng, random_text(rng)), FALLBACK) for _ in range(count)]
    shares = []
    for pairs in (asked, unknown):
        answers = []
        for start in range(0, count, 20):
            answers += answer_greedily(model, tokenizer, [question for question, _ in pairs[start : start + 20]])
        shares.append(float(np.mean([answer == wanted for answer, (_, wanted) in zip(answers, pairs, strict=True)])))
    return shares[0], shares[1]


def evaluate(
    model_dir: str | Path, per_relation: int = 12, generated_per_relation: int = 2, sizes: Sequence = SIZES
) -> tuple[list[Score], list[Score]]:
    """(scores by cells for every way, scores of generated answers for inferred and varied spacing)."""
    model, tokenizer = load(model_dir)
    cells, generated = [], []
    for way in WAYS:
        cells += score_cells(model, tokenizer, list(held_out(per_relation, way, sizes)), way)
    for way in ("inferred", "spacing"):
        generated += score_generated(model, tokenizer, list(held_out(generated_per_relation, way, sizes)), way)
    return cells, generated


def load(model_dir: str | Path):
    """(model, tokenizer) of a folder, in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def format_table(cells: Sequence[Score], generated: Sequence[Score]) -> str:
    """Two Markdown tables, per size and per relation, all numbers in percent."""
    lines = []
    for title, names in (
        ("size", ["{}x{}".format(*size) for size in SIZES]),
        ("relation", list(side_neighbor_relations)),
    ):
        head = [
            title,
            *(f"cells, {way}" for way in WAYS),
            "grids, inferred",
            "generated, inferred",
            "generated, spacing",
        ]
        lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for name in (*names, "all"):
            mine = [score for score in cells if name in (score.size, score.relation, "all")]
            whole = [score for score in generated if name in (score.size, score.relation, "all")]
            shares = [_share(cell for score in mine if score.way == way for cell in score.right) for way in WAYS]
            shares += [_share(all(score.right) for score in mine if score.way == "inferred")]
            shares += [
                _share(score.generated for score in whole if score.way == way) for way in ("inferred", "spacing")
            ]
            lines.append(f"| {name} | " + " | ".join(shares) + " |")
        lines.append("")
    return "\n".join(lines)


def _share(values) -> str:
    found = list(values)
    return f"{100 * np.mean(found):.2f}" if found else "–"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m puzzles.evaluate", description="Accuracy on held-out puzzles.")
    parser.add_argument("model_dir", nargs="?", default=demo_model_path())
    parser.add_argument("--per-relation", type=int, default=12, help="puzzles per relation, size and way of asking")
    parser.add_argument("--generated", type=int, default=2, help="of these, answered by free generation")
    options = parser.parse_args(arguments)
    cells, generated = evaluate(options.model_dir, options.per_relation, options.generated)
    sys.stdout.write(format_table(cells, generated) + "\n")
    known, unknown = score_talk(*load(options.model_dir))
    sys.stdout.write(
        f"Small talk answered as taught: {known:.0%} of known questions, {unknown:.0%} of random sentences.\n"
    )


if __name__ == "__main__":
    main()
