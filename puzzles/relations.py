"""The sixteen rules: one of four verbs in one of four directions, applied to every cell of a grid at once.

Each coloured cell acts on its neighbour in the rule's direction, so a cell's *source* is its neighbour on the
opposite side; outside the grid counts as black. A rule maps (cell, source) to a colour:

    shift   source
    paint   source where the cell is black, else the cell
    cover   the cell where the source is black, else the source
    erase   the cell where the source is black, else black
"""

import numpy as np

from puzzles.errors import PuzzleError

COLOURS = ("K", "B", "G", "R", "Y")
"""Letters of the colours by their number: black (the background), blue, green, red, yellow."""

BLACK = 0

_VERBS = {
    "shift": lambda cell, source: source,
    "paint": lambda cell, source: np.where(cell == BLACK, source, cell),
    "cover": lambda cell, source: np.where(source == BLACK, cell, source),
    "erase": lambda cell, source: np.where(source == BLACK, cell, BLACK),
}
# direction -> (row step, column step, the side the source lies on)
_DIRECTIONS = {
    "right": (0, 1, "left"),
    "left": (0, -1, "right"),
    "down": (1, 0, "upper"),
    "up": (-1, 0, "lower"),
}
_SENTENCES = {
    "shift": "every cell takes the colour of its {side} neighbour.",
    "paint": "a black cell takes the colour of its {side} neighbour, every other cell stays.",
    "cover": "a cell takes the colour of its {side} neighbour, unless that neighbour is black.",
    "erase": "a cell with a coloured {side} neighbour becomes black, every other cell stays.",
}

side_neighbor_relations: tuple[str, ...] = tuple(f"{verb} {way}" for verb in _VERBS for way in _DIRECTIONS)
"""Names of all rules: "shift right" … "erase up"."""

side_neighbor_fn_defs: dict[str, str] = {
    f"{verb} {way}": f"{verb} {way}: " + _SENTENCES[verb].format(side=side)
    for verb in _VERBS
    for way, (_, _, side) in _DIRECTIONS.items()
}
"""One plain sentence per rule, which starts with the rule's name."""


def source_of(grids: np.ndarray, direction: str) -> np.ndarray:
    """The source of every cell: ``[..., n, m]`` colour numbers to the same shape; black beyond the border."""
    row_step, column_step, _ = _DIRECTIONS[direction]
    n, m = grids.shape[-2:]
    padded = np.pad(grids, [(0, 0)] * (grids.ndim - 2) + [(1, 1), (1, 1)], constant_values=BLACK)
    return padded[..., 1 - row_step : 1 - row_step + n, 1 - column_step : 1 - column_step + m]


def apply_relation(relation: str, grids: np.ndarray) -> np.ndarray:
    """The rule's output for every grid: ``[..., n, m]`` colour numbers to the same shape.

    Raises: PuzzleError for a name that is no rule.
    """
    if relation not in side_neighbor_fn_defs:
        raise PuzzleError(f"no relation {relation!r} (allowed: {', '.join(side_neighbor_relations)})")
    verb, direction = relation.split()
    return _VERBS[verb](grids, source_of(grids, direction))


def apply_all(grids: np.ndarray) -> np.ndarray:
    """The outputs under every rule: ``[..., n, m]`` to ``[16, ..., n, m]``, in the order of the names."""
    return np.stack([apply_relation(relation, grids) for relation in side_neighbor_relations])
