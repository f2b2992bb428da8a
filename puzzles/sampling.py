"""Drawing puzzles: many at a time and vectorised, so that training can take fresh ones at every step.

1. Draw a density of coloured cells per puzzle, then the input grids.
2. Apply all sixteen rules to all grids.
3. Reject a puzzle whose rule leaves some grid as it was, or whose examples also agree with another rule that
   answers the test grid differently; draw the rejected ones again.
"""

import numpy as np

from puzzles.relations import COLOURS, apply_all

DENSITY = (0.35, 0.75)


def draw_grids(rng: np.random.Generator, count: int, n_grids: int, n: int, m: int) -> np.ndarray:
    """Colour numbers ``[count, n_grids, n, m]``; one density per puzzle, uniform in ``DENSITY``."""
    density = rng.uniform(*DENSITY, size=(count, 1, 1, 1))
    coloured = rng.random((count, n_grids, n, m)) < density
    return np.where(coloured, rng.integers(1, len(COLOURS), coloured.shape), 0)


def explaining(outputs: np.ndarray, relation_ids: np.ndarray) -> np.ndarray:
    """``[16, count]``: whether a rule gives the true outputs of all examples (all grids but the last).

    ``outputs [16, count, n_grids, n, m]`` are those of every rule, ``relation_ids [count]`` the true rules.
    """
    truth = outputs[relation_ids, np.arange(len(relation_ids))]
    return (outputs[:, :, :-1] == truth[:, :-1]).all(axis=(2, 3, 4))


def acceptable(inputs: np.ndarray, relation_ids: np.ndarray) -> np.ndarray:
    """``[count]``: every grid changes, and every rule that explains the examples gives the same answer."""
    outputs = apply_all(inputs)
    truth = outputs[relation_ids, np.arange(len(relation_ids))]
    changes = (truth != inputs).any(axis=(2, 3)).all(axis=1)
    same_answer = (outputs[:, :, -1] == truth[:, -1]).all(axis=(2, 3))
    return changes & (~explaining(outputs, relation_ids) | same_answer).all(axis=0)


def draw_inputs(rng: np.random.Generator, relation_ids: np.ndarray, n_train: int, n: int, m: int) -> np.ndarray:
    """Input grids ``[count, n_train + 1, n, m]`` of acceptable puzzles, one per entry of ``relation_ids``.

    The last grid of a puzzle is its test input.
    """
    inputs = np.zeros((len(relation_ids), n_train + 1, n, m), dtype=np.int64)
    missing = np.arange(len(relation_ids))
    while len(missing):
        drawn = draw_grids(rng, len(missing), n_train + 1, n, m)
        good = acceptable(drawn, relation_ids[missing])
        inputs[missing[good]] = drawn[good]
        missing = missing[~good]
    return inputs
