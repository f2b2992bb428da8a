"""What cannot be asked about a node is refused: the class, the argument at fault, and what is allowed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from attribution.errors import (
    DatasetNotFound,
    InvalidArgument,
    OutOfRange,
    SampleNotFound,
    ShapeMismatch,
)
from attribution.operations.gradients import compute_node_gradient, compute_node_gradient_batch, node_gradient_report
from attribution.session import LocalSession
from tests.attribution.scoring import ask, random_grad, stored_session
from tests.models import N_LAYERS

Sessions = Callable[..., LocalSession]
Refusal = tuple[dict[str, Any], type[Exception], str, list[str]]

GRAD = random_grad(1, 2)
ATTENTION = {"node_type": "attn_k", "layer": 1, "head": 2, "pos_ids": [3, 7], "output_grad": GRAD}
LM_HEAD = {"node_type": "lm_head", "layer": N_LAYERS, "pos_ids": [3, 7], "labels": [5, 6], "candidate_ids": [6, 5, 9]}

NODE: list[Refusal] = [
    ({"node_type": "attn_x"}, InvalidArgument, "node_type", ["'attn_x'", "attn_q", "mlp_g", "lm_head"]),
    ({"layer": 3}, OutOfRange, "layer", ["3", "0 to 2"]),
    ({"layer": -1}, OutOfRange, "layer", ["-1", "0 to 2"]),
    ({"layer": 1.0}, InvalidArgument, "layer", ["integer", "1.0"]),
    ({"layer": True}, InvalidArgument, "layer", ["integer", "True"]),
    ({"head": 6}, OutOfRange, "head", ["6", "0 to 5"]),
    ({"head": -1}, OutOfRange, "head", ["-1", "0 to 5"]),
    ({"pos_ids": [3, 11]}, OutOfRange, "pos_ids", ["11", "0 to 10"]),
    ({"pos_ids": [-1, 3]}, OutOfRange, "pos_ids", ["-1", "0 to 10"]),
    ({"pos_ids": [3, 3]}, InvalidArgument, "pos_ids", ["twice"]),
    ({"pos_ids": []}, InvalidArgument, "pos_ids", ["empty"]),
    ({"pos_ids": [3, 1.5]}, InvalidArgument, "pos_ids.1", ["integer", "1.5"]),
    ({"src_pos_ids": [99]}, OutOfRange, "src_pos_ids", ["99", "0 to 10"]),
    ({"src_pos_ids": []}, InvalidArgument, "src_pos_ids", ["empty"]),
    ({"output_grad": None}, InvalidArgument, "output_grad", ["attn_k", "[1, 2, 48]"]),
    ({"output_grad": GRAD[0]}, ShapeMismatch, "output_grad", ["[2, 48]", "[1, 2, 48]"]),
    ({"output_grad": GRAD[:, :1]}, ShapeMismatch, "output_grad", ["[1, 1, 48]", "[1, 2, 48]"]),
    ({"output_grad": GRAD[..., :47]}, ShapeMismatch, "output_grad", ["[1, 2, 47]", "[1, 2, 48]"]),
    ({"output_grad": [[1.0]]}, InvalidArgument, "output_grad", ["tensor"]),
    ({"pos_ids": None}, ShapeMismatch, "output_grad", ["[1, 2, 48]", "[1, 11, 48]"]),
    ({"steps": -1}, OutOfRange, "steps", ["-1", "0 to 1024", "auto"]),
    ({"steps": 10**6}, OutOfRange, "steps", ["1000000", "0 to 1024"]),
    ({"steps": "many"}, InvalidArgument, "steps", ["many"]),
    ({"rule": "simpson"}, InvalidArgument, "rule", ["gauss_legendre", "uniform", "simpson"]),
    ({"positions": [3]}, InvalidArgument, "positions", ["no argument"]),
    ({"dataset_id": "nowhere"}, DatasetNotFound, "dataset_id", ["nowhere", "puzzles"]),
    ({"dataset_id": "../etc"}, InvalidArgument, "dataset_id", ["letters", "../etc"]),
    ({"sample_id": 3}, SampleNotFound, "sample_id", ["3", "0–2"]),
    ({"device": "nonsense"}, InvalidArgument, "device", ["nonsense"]),
]
LANGUAGE_HEAD: list[Refusal] = [
    ({"labels": None}, InvalidArgument, "labels", ["missing", "pos_ids"]),
    ({"labels": [5]}, ShapeMismatch, "labels", ["1 entries", "2, one per entry of pos_ids"]),
    ({"labels": [5, 7]}, InvalidArgument, "labels", ["7", "[6, 5, 9]"]),
    ({"labels": [5, 281]}, OutOfRange, "labels", ["281", "0 to 280"]),
    ({"labels": [5, -1]}, OutOfRange, "labels", ["-1", "0 to 280"]),
    ({"candidate_ids": [5, 6, 281]}, OutOfRange, "candidate_ids", ["281", "0 to 280"]),
    ({"candidate_ids": [5, 6, 5]}, InvalidArgument, "candidate_ids", ["twice"]),
    ({"candidate_ids": []}, InvalidArgument, "candidate_ids", ["at least one"]),
    ({"layer": 0}, OutOfRange, "layer", ["0", "2 or 3"]),
    ({"layer": 4}, OutOfRange, "layer", ["4", "2 or 3"]),
    ({"pos_ids": [3, 11]}, OutOfRange, "pos_ids", ["11", "0 to 10"]),
    ({"head": 1}, OutOfRange, "head", ["1", "lm_head", "0"]),
]


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return cache(lambda family: stored_session(family, tmp_path_factory.mktemp("store")))


def is_refused(session: LocalSession, operation: Any, given: dict[str, Any], expected: Refusal) -> None:
    change, error, param, parts = expected
    with pytest.raises(error) as caught:
        ask(session, operation, **given | change)
    assert type(caught.value) is error
    assert caught.value.param == param  # type: ignore[attr-defined]
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("refusal", NODE, ids=lambda one: f"{one[2]}-{next(iter(one[0].values()))!s:.20}")
def test_a_node_that_is_not_there_is_refused(session_of: Sessions, refusal: Refusal) -> None:
    for operation in (compute_node_gradient, node_gradient_report):
        is_refused(session_of("llama"), operation, ATTENTION, refusal)


@pytest.mark.parametrize("refusal", LANGUAGE_HEAD, ids=lambda one: f"{one[2]}-{next(iter(one[0].values()))!s:.20}")
def test_an_answer_that_is_not_there_is_refused(session_of: Sessions, refusal: Refusal) -> None:
    for operation in (compute_node_gradient, node_gradient_report):
        is_refused(session_of("llama"), operation, LM_HEAD, refusal)


def test_an_mlp_has_the_last_column_and_gpt2_no_gate(session_of: Sessions) -> None:
    given = {"node_type": "mlp_g", "layer": 1, "pos_ids": [3, 7], "output_grad": GRAD}
    session = session_of("llama")
    is_refused(session, compute_node_gradient, given, ({"head": 5}, OutOfRange, "head", ["5", "mlp_g", "6"]))
    named = ask(session, compute_node_gradient, **given, head=6)
    assert torch.equal(named, ask(session, compute_node_gradient, **given))
    refusal = ({}, InvalidArgument, "node_type", ["tiny-gpt2", "no gate", "mlp_i"])
    is_refused(session_of("gpt2"), compute_node_gradient, given, refusal)


def test_a_batch_names_what_does_not_fit_its_samples(session_of: Sessions) -> None:
    batch = {name: value for name, value in ATTENTION.items() if name != "output_grad"} | {"sample_ids": [0, 1]}
    grads = [GRAD, GRAD]
    refusals: list[Refusal] = [
        ({"output_grads": [GRAD]}, ShapeMismatch, "output_grads", ["1 entries", "2, one per sample"]),
        ({"output_grads": None}, InvalidArgument, "output_grads", ["[1, 2, 48]"]),
        ({"output_grads": [GRAD, GRAD[:, :1]]}, ShapeMismatch, "output_grads", ["[1, 1, 48]", "[1, 2, 48]"]),
        ({"sample_ids": [], "output_grads": []}, InvalidArgument, "sample_ids", ["empty"]),
        ({"output_grads": grads, "sample_ids": [0, 7]}, SampleNotFound, "sample_id", ["7", "0–2"]),
        ({"output_grads": grads, "pos_ids": [3, 9]}, OutOfRange, "pos_ids", ["9", "0 to 7"]),
        ({"output_grads": grads, "labels": [[1, 2]]}, ShapeMismatch, "labels", ["1 entries", "2, one per sample"]),
    ]
    for refusal in refusals:
        is_refused(session_of("llama"), compute_node_gradient_batch, batch, refusal)
    each = {"node_type": "mlp_i", "layer": 0, "sample_ids": [0, 1]}
    each["output_grads"] = [random_grad(1, 11), random_grad(1, 8)]
    refusal = ({}, ShapeMismatch, "pos_ids", ["different lengths"])
    is_refused(session_of("llama"), compute_node_gradient_batch, each, refusal)


def test_the_mean_over_samples_asks_for_positions_that_all_have(session_of: Sessions) -> None:
    given = ATTENTION | {"sample_id": None}
    refusal = ({"pos_ids": [3, 9]}, OutOfRange, "pos_ids", ["9", "0 to 7"])
    is_refused(session_of("llama"), compute_node_gradient, given, refusal)
    grad = {"node_type": "mlp_i", "pos_ids": None, "output_grad": random_grad(1, 11), "head": None}
    refusal = (grad, ShapeMismatch, "output_grad", ["[1, 11, 48]", "[1, 8, 48]"])
    is_refused(session_of("llama"), compute_node_gradient, given, refusal)
