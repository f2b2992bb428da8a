"""Puzzles as text for a model, and where their cells lie among its tokens.

``gen_prompt`` writes the user's message. All token positions index the *templated conversation*: the
tokenizer's chat template over that message and the assistant's right answer, tokenized without further
special tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace

from puzzles.errors import PuzzleError
from puzzles.layout import CANONICAL, Letters, format_grid
from puzzles.puzzle import GridRanges, Puzzle, TokenRanges
from puzzles.relations import COLOURS


@dataclass(frozen=True)
class Conversation:
    """The templated conversation and its tokens.

    ``offsets`` are the tokens' character ranges in ``text``; ``prompt_at`` and ``answer_at`` are where the
    user's message and the answer begin, in characters.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    prompt_at: int
    answer_at: int


def gen_prompt(
    puzzle: Puzzle, fn_defs: Mapping[str, str] | None = None, tokenizer=None
) -> tuple[str, list[str], Puzzle]:
    """(prompt, answers, puzzle): the user's untemplated message, the answer's letters row by row, the puzzle.

    ``fn_defs`` (relation to sentence) puts the definition of the puzzle's rule first; None leaves the rule to
    be inferred. With a fast ``tokenizer`` that has a chat template, the returned puzzle carries ``ranges``.

    Raises: PuzzleError if ``fn_defs`` lacks the relation, or the tokenizer has no offsets or no usable
    template.
    """
    prompt = CANONICAL.prompt(puzzle.examples, puzzle.test_input, _header(puzzle, fn_defs))
    if tokenizer is not None:
        conversation = build_conversation(prompt, format_grid(puzzle.test_output), tokenizer)
        puzzle = replace(puzzle, ranges=find_ranges(puzzle, prompt, conversation))
    return prompt, puzzle.answers, puzzle


def build_conversation(prompt: str, answer: str, tokenizer) -> Conversation:
    """Template and tokenize the user's ``prompt`` and the assistant's ``answer``.

    The text is the template over both turns. If the template rewrites the answer (trims its first space, puts
    a thought before it), it is what generation would give: the templated prompt with the answer behind it.

    Raises: PuzzleError without offsets, without a template, or if the template rewrites the prompt.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PuzzleError(f"token ranges need a fast tokenizer, with offsets, not {type(tokenizer).__name__}")
    if not tokenizer.chat_template:
        raise PuzzleError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set tokenizer.chat_template")
    user = {"role": "user", "content": prompt}
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    if prompt not in asked:
        raise PuzzleError("the tokenizer's chat template changes the user's message, so its cells cannot be located")
    text = tokenizer.apply_chat_template([user, {"role": "assistant", "content": answer}], tokenize=False)
    if not text.startswith(asked + answer):
        text = asked + answer
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [tuple(pair) for pair in tokens["offset_mapping"]]
    return Conversation(text, list(tokens["input_ids"]), offsets, asked.rindex(prompt), len(asked))


def parse_grid(text: str) -> list[list[str]]:
    """The grid in an assistant's answer: lines of colour letters; blank lines are skipped.

    Raises: PuzzleError for an empty text, anything that is no colour letter, or rows of different lengths.
    """
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if not rows:
        raise PuzzleError("the answer is empty; a grid is lines of the letters " + " ".join(COLOURS))
    for number, row in enumerate(rows, 1):
        wrong = [cell for cell in row if cell not in COLOURS]
        if wrong:
            raise PuzzleError(f"line {number} of the answer has {wrong[0]!r} (allowed: {' '.join(COLOURS)})")
        if len(row) != len(rows[0]):
            raise PuzzleError(f"line {number} of the answer has {len(row)} cells, line 1 has {len(rows[0])}")
    return rows


def _header(puzzle: Puzzle, fn_defs: Mapping[str, str] | None) -> str:
    if fn_defs is None:
        return ""
    if puzzle.relation not in fn_defs:
        raise PuzzleError(f"fn_defs has no definition of {puzzle.relation!r} (it has {', '.join(fn_defs) or 'none'})")
    return f"Rule: {fn_defs[puzzle.relation]}"


def find_ranges(puzzle: Puzzle, prompt: str, conversation: Conversation) -> TokenRanges:
    """Token ranges of every cell of a puzzle that ``gen_prompt`` wrote as ``prompt``."""
    grids = [grid for pair in puzzle.examples for grid in pair] + [puzzle.test_input]
    found, at = [], prompt.index("Input:\n")
    for grid in grids:
        at = prompt.index(":\n", at) + 2
        found.append(_grid_ranges(grid, conversation.prompt_at + at, conversation))
    pairs = tuple(zip(found[0:-1:2], found[1:-1:2], strict=True))
    return TokenRanges(pairs, found[-1], _grid_ranges(puzzle.test_output, conversation.answer_at, conversation))


def _grid_ranges(grid: Letters, at: int, conversation: Conversation) -> GridRanges:
    """Token ranges of a grid whose text begins at character ``at``."""
    starts = [start for start, _ in conversation.offsets]
    stops = [stop for _, stop in conversation.offsets]
    line = 2 * len(grid[0]) + 1  # two characters a cell, and the newline
    return tuple(
        tuple(
            (
                bisect_right(stops, at + row * line + 2 * column),
                bisect_left(starts, at + row * line + 2 * column + 2),
            )
            for column in range(len(grid[0]))
        )
        for row in range(len(grid))
    )
