"""Results of three stored samples, and dense gradients: what graphs are held against."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.nodes import Node
from attribution.results import SampleRef
from puzzles import Result
from tests.attribution.scoring import DATASET, PROMPTS, stored_session
from tests.models import D_MODEL

QUERIES = ([4, 9, 7], [3, 6, 5], [8, 4, 11])  # in no order, each the sample's own
CANDIDATES = [200, 3, 17, 90]


def results() -> list[Result]:
    """A result for each stored sample."""
    answers, labels = ["K", "B", "G"], [17, 200, 3]
    return [
        Result(index, "", answers, [q + 1 for q in queries], labels, CANDIDATES, outputs=SampleRef(DATASET, index))
        for index, queries in enumerate(QUERIES)
    ]


@cache
def session_of(family: str, store: Path) -> Any:
    """A session with the three samples."""
    return stored_session(family, store)


def dense(node: Node, r: Result) -> Tensor:
    """The gradient of a node at every position of the sample, [1, pos, hidden]."""
    held = node.gradient(r.index)
    wide = torch.zeros(1, len(PROMPTS[r.index]), D_MODEL)
    for row, position in enumerate(held.positions):
        wide[0, position] = held.grad[0, row]
    return wide


def everywhere(session: Any, node: Node, r: Result) -> Tensor:
    """What `dense` must be: its downstream nodes' dense gradients added, and the operation at all positions."""
    if node.type == "lm_head":
        labels = dict(zip(r.query_positions, r.labels, strict=True))
        positions = sorted(labels)
        given = {"labels": [labels[one] for one in positions], "candidate_ids": CANDIDATES, "pos_ids": positions}
        found = session.compute_node_gradient(DATASET, r.index, "lm_head", node.layer, 0, **given)
        wide = torch.zeros(1, len(PROMPTS[r.index]), D_MODEL)
        wide[0, positions] = found[0]
        return wide
    grad = sum((dense(one, r) for one in node.downstream), torch.zeros(1, len(PROMPTS[r.index]), D_MODEL))
    return session.compute_node_gradient(DATASET, r.index, node.type, node.layer, node.head, output_grad=grad)
