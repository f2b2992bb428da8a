"""What the embedded model is trained on: fresh puzzles and small talk, with a loss weight per token.

1. Draw one shape and number of examples per batch, one rule per row.
2. Write every row as a conversation: perhaps a system line, perhaps an earlier turn, the prompt in canonical
   or varied spacing, the answer in canonical spacing, perhaps a second turn.
3. Weigh what is to be predicted: the answer and the rule's name most, example outputs less (the first hardly:
   the rule is not known yet), the inputs not at all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np

from puzzles.layout import CANONICAL, Layout, format_grid
from puzzles.puzzle import to_letters
from puzzles.relations import COLOURS, apply_relation, side_neighbor_fn_defs, side_neighbor_relations
from puzzles.sampling import draw_inputs
from puzzles.smalltalk import EXAMPLE, FALLBACK, PREAMBLES, SYSTEM_LINES, draw_known, draw_unknown

BATCH_TOKENS = 1800
KNOWN_ROWS, UNKNOWN_ROWS = 36, 7  # short answers, long ones
WHICH_RULE = ("Which rule?", "Which rule?", "Which rule?", "which rule?", "What is the rule?", "Which rule")
Encode = Callable[[str], list[int]]
"""A text's token ids."""

ENDINGS = ("", "\n", "\n\n", "\n\nOutput:", "\n\nOutput:\n", "\nOutput:", "\nOutput:\n")


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: how many rules, which side lengths, how often the rule is named."""

    relations: int
    sides: tuple[int, ...]
    named: float


STAGES = (
    Stage(8, (3,), 0.5),
    Stage(16, (3,), 0.35),
    Stage(16, (3, 4), 0.25),
    Stage(16, (3, 4, 5), 0.15),
)


@dataclass
class Row:
    """One conversation: token ids, the weight of predicting each, and which are cells of the final answer."""

    encode: Encode
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)

    def text(self, text: str, weight: float = 0.0) -> None:
        """Append plain text."""
        self._add(self.encode(text), weight)

    def grid(self, text: str, weight: float = 0.0, answer: bool = False) -> None:
        """Append a grid's text; in an example (``answer`` false) only spaced cells bear weight."""
        table = _cell_ids(self.encode)
        for piece in re.findall(r" ?[A-Z]|\n", text):
            is_cell = len(piece) == 2
            self._add([table[piece]], weight if answer or is_cell else 0.0, answer and is_cell)

    def _add(self, ids: list[int], weight: float, answer: bool = False) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.answer += [answer] * len(ids)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, all arrays ``[rows, pos]``.

    ``weights`` are those of predicting the token at that position; ``answer`` marks the cells of the last
    answer; ``kind`` is the grid's shape, as in "3x4", or "chat".
    """

    kind: str
    ids: np.ndarray
    weights: np.ndarray
    answer: np.ndarray


@cache
def _cell_ids(encode: Encode) -> dict[str, int]:
    pieces = ["\n", *COLOURS, *(f" {letter}" for letter in COLOURS)]
    return {piece: encode(piece)[0] for piece in pieces}


def cached_encoder(tokenizer) -> Encode:
    """``text -> token ids``, remembered: the corpus encodes the same few texts all the time."""
    return lru_cache(maxsize=4096)(lambda text: tokenizer.encode(text, add_special_tokens=False))


def draw_layout(rng: np.random.Generator) -> Layout:
    """Canonical in half of the cases; else each spacing varies by itself."""
    if rng.random() < 0.5:
        return CANONICAL
    return Layout(
        before_output="\n" if rng.random() < 0.4 else "\n\n",
        before_input="\n" if rng.random() < 0.4 else "\n\n",
        after_marker="\n\n" if rng.random() < 0.05 else "\n",
        after_header="\n" if rng.random() < 0.4 else "\n\n",
        ending=ENDINGS[rng.integers(len(ENDINGS))] if rng.random() < 0.6 else "",
        first_cell_spaced=bool(rng.random() < 0.7),
    )


def draw_puzzles(rng: np.random.Generator, stage: Stage, n_examples: int, n: int, m: int, count: int) -> list[tuple]:
    """``count`` puzzles as (relation, examples, test input, test output), the grids in letters."""
    relation_ids = rng.integers(0, stage.relations, count)
    inputs = draw_inputs(rng, relation_ids, n_examples, n, m)
    drawn = []
    for relation_id, given in zip(relation_ids, inputs, strict=True):
        relation = side_neighbor_relations[relation_id]
        pairs = [(to_letters(a), to_letters(b)) for a, b in zip(given, apply_relation(relation, given), strict=True)]
        drawn.append((relation, pairs[:-1], *pairs[-1]))
    return drawn


def draw_header(rng: np.random.Generator, relation: str, named: float) -> str:
    """The line that names the rule, by its definition or by its name alone, with probability ``named``."""
    if rng.random() >= named:
        return ""
    return "Rule: " + (relation if rng.random() < 0.25 else side_neighbor_fn_defs[relation])


def write_turn(row: Row, layout: Layout, puzzle: tuple, header: str, preamble: str = "", final: bool = True) -> None:
    """Append the user's puzzle and the assistant's answer."""
    _, examples, test, answer = puzzle
    row.text("<|im_start|>user\n" + preamble)
    outputs_seen = 0
    for text, role in layout.parts(examples, test, header):
        if role == "text":
            row.text(text)
        elif role == "input":
            row.grid(text)
        else:
            row.grid(text, 1.0 if header or outputs_seen else 0.3)
            outputs_seen += 1
    row.text("<|im_end|>\n<|im_start|>assistant\n")
    row.grid(format_grid(answer), 2.0, answer=final)
    row.text("<|im_end|>", 1.0)


def write_second_turn(row: Row, rng: np.random.Generator, relation: str) -> None:
    """Perhaps ask for the rule's name, perhaps chat."""
    choice = rng.random()
    if choice < 0.2:
        row.text("\n<|im_start|>user\n" + str(rng.choice(WHICH_RULE)) + "<|im_end|>\n<|im_start|>assistant\n")
        row.text(relation, 2.0)
        row.text("<|im_end|>", 1.0)
    elif choice < 0.24:
        _write_chat(row, *draw_known(rng), before="\n")


def _write_chat(row: Row, question: str, answer: str, before: str = "") -> None:
    row.text(before + "<|im_start|>user\n")
    row.text(question)
    row.text("<|im_end|>\n<|im_start|>assistant\n")
    if answer == FALLBACK:
        row.text(answer.removesuffix(EXAMPLE), 1.0)
        row.text(EXAMPLE, 0.3)
    else:
        row.text(answer, 1.0)
    row.text("<|im_end|>", 1.0)


def _write_system(row: Row, rng: np.random.Generator, share: float) -> None:
    if rng.random() < share:
        row.text("<|im_start|>system\n" + str(rng.choice(SYSTEM_LINES)) + "<|im_end|>\n")


def draw_sides(rng: np.random.Generator, stage: Stage) -> tuple[int, int]:
    """Rows and columns, independent of each other, larger ones more often."""
    odds = np.array([{3: 2, 4: 3, 5: 4}[side] for side in stage.sides], dtype=float)
    n, m = rng.choice(stage.sides, size=2, p=odds / odds.sum())
    return int(n), int(m)


def puzzle_batch(rng: np.random.Generator, encode: Encode, stage: Stage) -> Batch:
    """One batch of puzzles of one shape, about ``BATCH_TOKENS`` tokens."""
    n, m = draw_sides(rng, stage)
    n_examples = int(rng.choice((1, 2, 3, 4, 5), p=(0.08, 0.17, 0.35, 0.15, 0.25)))
    earlier = rng.random()
    n_puzzles = 2 if earlier < 0.03 else 1
    length = (2 * n_examples + 2) * (n * (m + 1) + 4) * n_puzzles + 20
    count = max(2, BATCH_TOKENS // length)
    puzzles = draw_puzzles(rng, stage, n_examples, n, m, count * n_puzzles)
    rows = []
    for place in range(count):
        row = Row(encode)
        _write_system(row, rng, 0.08)
        if n_puzzles == 2:
            write_turn(row, draw_layout(rng), puzzles[count + place], "", final=False)
            row.text("\n")
        elif earlier < 0.06:
            _write_chat(row, *draw_known(rng))
            row.text("\n")
        header = draw_header(rng, puzzles[place][0], stage.named)
        preamble = str(rng.choice(PREAMBLES)) + "\n\n" if rng.random() < 0.03 else ""
        write_turn(row, draw_layout(rng), puzzles[place], header, preamble)
        write_second_turn(row, rng, puzzles[place][0])
        rows.append(row)
    return _pad(f"{n}x{m}", rows)


def chat_batch(rng: np.random.Generator, encode: Encode) -> Batch:
    """One batch of small talk: of known questions in two of three cases, of unknown ones else."""
    known = rng.random() < 2 / 3
    rows = []
    for _ in range(KNOWN_ROWS if known else UNKNOWN_ROWS):
        row = Row(encode)
        _write_system(row, rng, 0.15)
        _write_chat(row, *(draw_known(rng) if known else draw_unknown(rng)))
        rows.append(row)
    return _pad("chat", rows)


def _pad(kind: str, rows: list[Row]) -> Batch:
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, weights, answer = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        weights[place, : len(row.ids)] = row.weights
        answer[place, : len(row.ids)] = row.answer
    return Batch(kind, ids, weights, answer)
