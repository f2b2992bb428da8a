"""One puzzle made ready for a model: the conversation, and its answer's positions, labels and candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puzzles.errors import PuzzleError
from puzzles.layout import format_grid
from puzzles.prompts import build_conversation, find_ranges, gen_prompt
from puzzles.puzzle import Puzzle
from puzzles.relations import COLOURS


@dataclass
class Result:
    """A templated conversation that ends in the right answer, and what is asked about it.

    ``prompt``          the conversation's text; all positions index its tokens
    ``answers``         the answer's colour letters, row by row
    ``answer_indices``  token positions of those cells
    ``labels``          their token ids
    ``candidate_ids``   token ids of the five colours, in the order of ``COLOURS``; None for the whole vocabulary
    ``puzzle``          the puzzle, with its token ranges
    ``outputs``         where the model's activations are stored; None until a forward pass has been run
    """

    index: int
    prompt: str
    answers: list[str]
    answer_indices: list[int]
    labels: list[int]
    candidate_ids: list[int] | None
    puzzle: Puzzle | None = None
    outputs: Any = None

    def __post_init__(self) -> None:
        """Raises: PuzzleError without one position and one label per answer, or with a position below 1."""
        counts = {len(self.answers), len(self.answer_indices), len(self.labels)}
        if len(counts) != 1:
            raise PuzzleError(
                f"answers, answer_indices and labels need one entry per cell, not {len(self.answers)}, "
                f"{len(self.answer_indices)} and {len(self.labels)}"
            )
        if any(position < 1 for position in self.answer_indices):
            raise PuzzleError(
                f"answer_indices must be 1 or more (position 0 is predicted nowhere): {self.answer_indices}"
            )

    @property
    def query_positions(self) -> list[int]:
        """Token positions at which the answers are predicted: one before each."""
        return [position - 1 for position in self.answer_indices]

    @classmethod
    def from_puzzle(
        cls, puzzle: Puzzle, tokenizer, index: int = 0, fn_defs: Mapping[str, str] | None = None
    ) -> "Result":
        """Write the puzzle as a conversation with its right answer; ``fn_defs`` as in ``gen_prompt``.

        Raises: PuzzleError if a cell with its leading space is not a single token, and as ``gen_prompt``
        does.
        """
        prompt, answers, _ = gen_prompt(puzzle, fn_defs)
        candidates = candidate_ids(tokenizer)
        conversation = build_conversation(prompt, format_grid(puzzle.test_output), tokenizer)
        ranges = find_ranges(puzzle, prompt, conversation)
        cells = [cell for row in ranges.answer for cell in row]
        labels = [conversation.ids[start] for start, _ in cells]
        for (start, stop), label, letter in zip(cells, labels, answers, strict=True):
            if stop - start != 1 or label != candidates[COLOURS.index(letter)]:
                tokens = tokenizer.convert_ids_to_tokens(conversation.ids[start:stop])
                raise PuzzleError(f"in the conversation the cell ' {letter}' is {tokens}, not one token of its own")
        positions = [start for start, _ in cells]
        return cls(index, conversation.text, answers, positions, labels, candidates, replace(puzzle, ranges=ranges))

    @classmethod
    def from_text(
        cls, index: int, prompt: str, answer: str, tokenizer, candidates: Sequence[str] | None = None
    ) -> "Result":
        """A prompt of any kind with the answer that continues it, as " Paris" does "The capital of France is".

        ``prompt`` gets the special tokens that the tokenizer begins a text with. ``candidates``: the answers that
        share the probability, one token each; None is the whole vocabulary.

        Raises: PuzzleError if the answer is empty or joins the prompt's last token, or a candidate is not one token.
        """
        before, tokens = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
        labels = tokens[len(before) :]
        if not before or not labels or tokens[: len(before)] != before:
            raise PuzzleError(
                f"{answer!r} does not continue {prompt[-40:]!r} by tokens of its own; most answers begin with a space"
            )
        plain = tokenizer.encode(prompt + answer, add_special_tokens=False)
        text = tokenizer.decode(tokens[: len(tokens) - len(plain)]) + prompt + answer
        if tokenizer.encode(text, add_special_tokens=False) != tokens:
            raise PuzzleError("this tokenizer puts special tokens elsewhere than before a text; give token ids instead")
        positions = list(range(len(before), len(tokens)))
        ids = None if candidates is None else [_one_token(tokenizer, one) for one in candidates]
        answers = [tokenizer.decode([label]) for label in labels]
        return cls(index, text, answers, positions, labels, ids)


def candidate_ids(tokenizer) -> list[int]:
    """Token ids of the five colours with their leading space.

    Raises: PuzzleError if one of them is not a single token.
    """
    return [_one_token(tokenizer, f" {letter}") for letter in COLOURS]


def _one_token(tokenizer, text: str) -> int:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        raise PuzzleError(f"{text!r} is {len(tokens)} tokens in this tokenizer ({pieces}); it must be one")
    return tokens[0]
