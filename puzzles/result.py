"""One puzzle made ready for a model: the conversation, and its answer's positions, labels and candidates."""

from collections.abc import Mapping
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
    ``candidate_ids``   token ids of the five colours, in the order of ``COLOURS``
    ``puzzle``          the puzzle, with its token ranges
    ``outputs``         where the model's activations are stored; None until a forward pass has been run
    """

    index: int
    prompt: str
    answers: list[str]
    answer_indices: list[int]
    labels: list[int]
    candidate_ids: list[int]
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


def candidate_ids(tokenizer) -> list[int]:
    """Token ids of the five colours with their leading space.

    Raises: PuzzleError if one of them is not a single token.
    """
    ids = []
    for letter in COLOURS:
        tokens = tokenizer.encode(f" {letter}", add_special_tokens=False)
        if len(tokens) != 1:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise PuzzleError(
                f"the cell ' {letter}' is {len(tokens)} tokens in this tokenizer ({pieces}); it must be one"
            )
        ids.append(tokens[0])
    return ids
