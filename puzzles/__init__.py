"""Colour-grid puzzles, their prompts with exact token positions, and the small model trained on them.

Needs neither torch nor transformers; training and evaluation (``puzzles.train``, ``puzzles.evaluate``) do.
"""

from pathlib import Path

from puzzles.errors import PuzzleError
from puzzles.layout import format_grid
from puzzles.prompts import gen_prompt, parse_grid
from puzzles.puzzle import Grid, Puzzle, TokenRanges, gen_puzzle
from puzzles.relations import COLOURS, apply_relation, side_neighbor_fn_defs, side_neighbor_relations
from puzzles.result import Result

__all__ = [
    "COLOURS",
    "Grid",
    "Puzzle",
    "PuzzleError",
    "Result",
    "TokenRanges",
    "apply_relation",
    "demo_model_path",
    "format_grid",
    "gen_prompt",
    "gen_puzzle",
    "parse_grid",
    "side_neighbor_fn_defs",
    "side_neighbor_relations",
]


def demo_model_path() -> Path:
    """The folder of the embedded model, as ``from_pretrained`` takes it."""
    return Path(__file__).parent / "demo_model"
