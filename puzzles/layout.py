"""The text of a puzzle: its canonical form and the spacings in which people send it all the same."""

from collections.abc import Sequence
from dataclasses import dataclass

Letters = Sequence[Sequence[str]]
"""A grid as rows of colour letters."""

Part = tuple[str, str]
"""A piece of a prompt and what it is: "text", "input" (a grid) or "output" (an example's grid)."""


def format_grid(grid: Letters) -> str:
    """Rows of cells, each cell with its leading space: `` K B\\n G R``. No newline at the end."""
    return "\n".join("".join(f" {cell}" for cell in row) for row in grid)


@dataclass(frozen=True)
class Layout:
    """Spacing of a prompt; the defaults are the canonical text that ``gen_prompt`` writes."""

    before_output: str = "\n\n"
    before_input: str = "\n\n"
    after_marker: str = "\n"
    after_header: str = "\n\n"
    ending: str = ""
    first_cell_spaced: bool = True

    def grid(self, grid: Letters) -> str:
        """The grid's rows in this spacing."""
        text = format_grid(grid)
        return text if self.first_cell_spaced else text.removeprefix(" ").replace("\n ", "\n")

    def parts(self, examples: Sequence[tuple[Letters, Letters]], test: Letters, header: str = "") -> list[Part]:
        """The user's message in pieces: header, examples, test grid, ending."""
        parts: list[Part] = [(header + self.after_header, "text")] if header else []
        for given, answer in examples:
            parts += [("Input:" + self.after_marker, "text"), (self.grid(given), "input")]
            parts += [
                (self.before_output + "Output:" + self.after_marker, "text"),
                (self.grid(answer), "output"),
            ]
            parts += [(self.before_input, "text")]
        parts += [("Input:" + self.after_marker, "text"), (self.grid(test), "input")]
        return [*parts, (self.ending, "text")]

    def prompt(self, examples: Sequence[tuple[Letters, Letters]], test: Letters, header: str = "") -> str:
        """The user's message."""
        return "".join(text for text, _ in self.parts(examples, test, header))


CANONICAL = Layout()
