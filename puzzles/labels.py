"""What every token of a conversation is, in words that a feature of the model may stand for.

1. A conversation is written piece by piece: the puzzle in its canonical layout, the right answer, perhaps the question
   for the rule; or a line of small talk.
2. Each token gets labels, as pairs of a group and a value: the part it belongs to; of a cell its colour, row and
   column, and the colours at the same place of the input and beside it.
3. It also gets the labels of the token that comes next, which is what the model predicts there, and those of the rule.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from puzzles.corpus import Encode
from puzzles.layout import CANONICAL
from puzzles.puzzle import Grid, Puzzle, gen_puzzle
from puzzles.relations import COLOURS, side_neighbor_fn_defs, side_neighbor_relations
from puzzles.smalltalk import CHATS

Label = tuple[str, str]
"""A group, as "colour" or "next colour", and a value, as "B"."""

NEIGHBOURS = {"left": (0, -1), "right": (0, 1), "upper": (-1, 0), "lower": (1, 0)}
OUTSIDE = "outside"
SAID = ("answer", "name", "reply")
"""The parts that the model says itself."""
_NAMES = dict(zip(COLOURS, ("black", "blue", "green", "red", "yellow"), strict=True))
_OF_WHICH = {
    "example input": "the input of an example",
    "example output": "the output of an example",
    "test input": "the test grid",
    "answer": "the answer",
    "marker": "'Input:' or 'Output:' and the lines around it",
    "rule": "the line that names the rule",
    "template": "the special tokens and roles around turns",
    "question": "the question which rule it is",
    "name": "the rule's name in an answer",
    "talk": "small talk of the user",
    "reply": "small talk of the model",
}


@dataclass
class Labelled:
    """A conversation: its tokens and the labels of each.

    ``answer`` has the position of every cell of the answer, row by row; the token before it predicts it.
    """

    token_ids: list[int] = field(default_factory=list)
    labels: list[dict[str, str]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    @property
    def said(self) -> list[bool]:
        """Of each token whether the model is to say it itself."""
        return [labels["part"] in SAID for labels in self.labels]

    def text(self, encode: Encode, text: str, part: str) -> None:
        """Append a text, each of whose tokens has the label of its part and of itself."""
        ids = encode(text)
        self.token_ids += ids
        self.labels += [{"part": part, "token": str(token)} for token in ids]

    def grid(self, encode: Encode, grid: Grid, given: Grid, part: str, number: str | None = None) -> None:
        """Append a grid that belongs to the input ``given`` (for an input: itself)."""
        for row, cells in enumerate(grid):
            if row:
                self.text(encode, "\n", part)
            for column, colour in enumerate(cells):
                (token,) = encode(f" {colour}")
                if part == "answer":
                    self.answer.append(len(self.token_ids))
                self.token_ids.append(token)
                self.labels.append(_cell(grid, given, row, column, part) | ({"example": number} if number else {}))

    def finish(self, whole: dict[str, str]) -> "Labelled":
        """Give every token the labels of the next one, and those of the whole conversation."""
        following = [*self.labels[1:], {}]
        self.labels = [
            here | {f"next {group}": value for group, value in there.items()} | whole
            for here, there in zip(self.labels, following, strict=True)
        ]
        return self


def _cell(grid: Grid, given: Grid, row: int, column: int, part: str) -> dict[str, str]:
    found = {"part": part, "colour": grid[row][column], "row": str(row + 1), "column": str(column + 1)}
    found["place"] = "last in its row" if column + 1 == len(grid[0]) else "not last in its row"
    if part in ("example output", "answer"):
        found["input"] = given[row][column]
        found["changed"] = "changed" if given[row][column] != grid[row][column] else "unchanged"
    for side, (down, right) in NEIGHBOURS.items():
        there, across = row + down, column + right
        inside = 0 <= there < len(given) and 0 <= across < len(given[0])
        found[side] = given[there][across] if inside else OUTSIDE
    return found


def label_puzzle(puzzle: Puzzle, encode: Encode, named: bool = False, asks: bool = False) -> Labelled:
    """The conversation of a puzzle: its prompt (``named``: with the rule's definition), its right answer and, with
    ``asks``, the question for the rule and its name.
    """
    found = Labelled()
    found.text(encode, "<|im_start|>user\n", "template")
    if named:
        found.text(encode, f"Rule: {side_neighbor_fn_defs[puzzle.relation]}{CANONICAL.after_header}", "rule")
    for number, (given, answer) in enumerate(puzzle.examples, 1):
        found.text(encode, f"Input:{CANONICAL.after_marker}", "marker")
        found.grid(encode, given, given, "example input", str(number))
        found.text(encode, f"{CANONICAL.before_output}Output:{CANONICAL.after_marker}", "marker")
        found.grid(encode, answer, given, "example output", str(number))
        found.text(encode, CANONICAL.before_input, "marker")
    found.text(encode, f"Input:{CANONICAL.after_marker}", "marker")
    found.grid(encode, puzzle.test_input, puzzle.test_input, "test input")
    found.text(encode, "<|im_end|>\n<|im_start|>assistant\n", "template")
    found.grid(encode, puzzle.test_output, puzzle.test_input, "answer")
    found.text(encode, "<|im_end|>", "template")
    if asks:
        found.text(encode, "\n<|im_start|>user\n", "template")
        found.text(encode, "Which rule?", "question")
        found.text(encode, "<|im_end|>\n<|im_start|>assistant\n", "template")
        found.text(encode, puzzle.relation, "name")
        found.text(encode, "<|im_end|>", "template")
    verb, way = puzzle.relation.split()
    return found.finish({"verb": verb, "direction": way})


def label_talk(question: str, answer: str, encode: Encode) -> Labelled:
    """The conversation of a line of small talk."""
    found = Labelled()
    found.text(encode, "<|im_start|>user\n", "template")
    found.text(encode, question, "talk")
    found.text(encode, "<|im_end|>\n<|im_start|>assistant\n", "template")
    found.text(encode, answer, "reply")
    found.text(encode, "<|im_end|>", "template")
    return found.finish({})


def held_out_conversations(encode: Encode, seed: int, per_rule: int) -> Iterator[Labelled]:
    """For every rule ``per_rule`` puzzles that no training draws, of all sizes and 1 to 5 examples, a quarter of them
    with their rule named and a quarter asked for it; and as many lines of small talk as there are rules.
    """
    draw = np.random.default_rng([3, seed])
    for relation in side_neighbor_relations:
        for number in range(per_rule):
            n, m = (int(side) for side in draw.integers(3, 6, 2))
            puzzle = gen_puzzle(relation, n, m, int(draw.integers(1, 6)), 1_000_000 * seed + number)
            yield label_puzzle(puzzle, encode, named=bool(draw.random() < 0.25), asks=bool(draw.random() < 0.25))
        answer, questions = CHATS[int(draw.integers(len(CHATS)))]
        yield label_talk(questions[int(draw.integers(len(questions)))], answer, encode)


def label_matrix(conversations: Iterable[Labelled], known: list[Label] | None = None, at_least: int = 30) -> tuple:
    """``(labels, matrix [token, label])`` of all tokens in order; labels of fewer tokens than ``at_least`` are left
    out.

    With ``known`` the labels are these.
    """
    tokens = [set(one.items()) for conversation in conversations for one in conversation.labels]
    if known is None:
        counts = Counter(label for labels in tokens for label in labels)
        known = sorted(label for label, count in counts.items() if at_least <= count < len(tokens))
    column = {label: index for index, label in enumerate(known)}
    matrix = np.zeros((len(tokens), len(known)), dtype=bool)
    for row, labels in enumerate(tokens):
        matrix[row, [column[label] for label in labels if label in column]] = True
    return known, matrix


def phrase(label: Label, decode) -> str:
    """A label in words: "before a blue cell (B)"; ``decode`` gives the text of a token id."""
    group, value = label
    after = group.removeprefix("next ")
    if group in ("verb", "direction"):
        return f"where the rule's {group} is '{value}'"
    if after == "part":
        return f"{'just before' if group != after else 'in'} {_OF_WHICH[value]}"
    if after == "token":
        return f"{'before' if group != after else 'on'} the token {decode([int(value)])!r}"
    if after == "example":
        return f"{'just before' if group != after else 'in'} example {value}"
    return f"{'before' if group != after else 'on'} {_cell_phrase(after, value)}"


def _cell_phrase(group: str, value: str) -> str:
    colour = f"{_NAMES[value]} ({value})" if value in _NAMES else value
    if group == "colour":
        return f"a {colour} cell"
    if group == "input":
        return f"a cell that is {colour} in the input"
    if group in NEIGHBOURS:
        beside = "there is no" if value == OUTSIDE else "the"
        whether = "" if value == OUTSIDE else f" is {colour}"
        return f"a cell where {beside} {group} neighbour in the input{whether}"
    if group in ("row", "column"):
        return f"a cell of {group} {value}"
    if group == "changed":
        return "a cell that the rule changes" if value == "changed" else "a cell that the rule leaves"
    return f"a cell that is {value}"


def sentence(labels: Iterable[Label], decode) -> str:
    """Several labels that hold together, in words; of a part that goes on, "before" says nothing more than "in"."""
    given = list(labels)
    said = [one for one in given if one[0] != "next part" or ("part", one[1]) not in given]
    order = ("colour", "input", *NEIGHBOURS, "changed", "row", "column", "place", "token", "example", "part")
    ranked = sorted(
        said, key=lambda one: order.index(key) if (key := one[0].removeprefix("next ")) in order else len(order)
    )
    return ", ".join(phrase(label, decode) for label in ranked)
