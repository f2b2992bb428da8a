"""Residual attribution against the plain model's own modules, and the sum that it closes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch
from attribution.operations.scores import attribute_residual, attribute_residual_terms
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import reference_residual
from tests.attribution.plain import distance
from tests.attribution.scoring import LIMITS, PROMPTS, ask, plain_model, random_grad, stored_session
from tests.models import FAMILIES, N_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

POSITIONS = [9, 0, 4]
DEPTHS = [3.0, 2.5, 2.0, 1.5, 0.5, 0.0]
GRADS = random_grad(len(DEPTHS), len(POSITIONS))


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return cache(lambda family, dtype="float32": stored_session(family, tmp_path_factory.mktemp("store"), dtype))


def question(**change: Any) -> dict[str, Any]:
    """The downstream nodes, as a caller has them: one gradient [1, position, hidden] each."""
    given = {"pos_ids": POSITIONS, "downstream_grads": [grad[None] for grad in GRADS], "downstream_layers": DEPTHS}
    return given | change


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_attributed_what_they_write(session_of: Sessions, family: str, dtype: str) -> None:
    session, model = session_of(family, dtype), plain_model(family, dtype)
    windows: list[dict[str, Any]] = [{}, {"from_layer": 1}, {"to_layer": 1}, {"from_layer": 1, "to_layer": 1}]
    for window in windows:
        oracle = reference_residual(model, PROMPTS[0], POSITIONS, GRADS, DEPTHS, **window)
        found = ask(session, attribute_residual, **question(**window))
        assert found.dtype == getattr(torch, dtype)
        assert distance(found, oracle["attr"]) < LIMITS[dtype], window
        terms = ask(session, attribute_residual_terms, **question(**window))
        assert set(terms) == {"embedding", "attn_bias", "total"}
        for name, term in terms.items():
            if family == "gpt2" or name != "attn_bias":
                assert distance(term, oracle[name]) < LIMITS[dtype], (window, name)
            else:  # the other families have no such bias
                assert bool((term == 0).all())
                assert bool((oracle[name] == 0).all())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_kept_when_asked_for(session_of: Sessions, family: str, dtype: str) -> None:
    oracle = reference_residual(plain_model(family, dtype), PROMPTS[0], POSITIONS, GRADS, DEPTHS, per_position=True)
    found = ask(session_of(family, dtype), attribute_residual, **question(per_position=True))
    assert found.shape == (N_LAYERS, N_HEADS + 1, len(DEPTHS), len(POSITIONS))
    assert distance(found, oracle["attr"]) < LIMITS[dtype]
    assert distance(found.sum(-1), ask(session_of(family, dtype), attribute_residual, **question())) < LIMITS[dtype]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_closes_at_every_depth(session_of: Sessions, family: str, dtype: str, limit: float) -> None:
    session = session_of(family, dtype)
    for first in range(N_LAYERS):
        reached = [number for number, depth in enumerate(DEPTHS) if depth >= first]
        given = question(
            from_layer=first,
            downstream_grads=GRADS[reached],
            downstream_layers=[DEPTHS[number] for number in reached],
        )
        found, terms = (ask(session, one, **given) for one in (attribute_residual, attribute_residual_terms))
        closed = terms["embedding"] + found.sum((0, 1)) + terms["attn_bias"].sum(0)
        # without norms of what is written the float64 sum is exact
        assert distance(closed, terms["total"]) < (limit if family == "gemma2" or dtype == "float32" else 1e-9)


def test_only_what_is_strictly_upstream_counts(session_of: Sessions) -> None:
    found = ask(session_of("llama"), attribute_residual, **question())
    for number, depth in enumerate(DEPTHS):
        for layer in range(N_LAYERS):
            assert bool((found[layer, :N_HEADS, number] != 0).all()) == (layer < depth), (layer, depth)
            assert bool(found[layer, N_HEADS, number] != 0) == (layer + 0.5 < depth), (layer, depth)
    ranged = ask(session_of("llama"), attribute_residual, **question(from_layer=1, to_layer=1))
    assert distance(ranged[1], found[1]) < 1e-6
    assert bool((ranged[[0, 2]] == 0).all())


def test_gradients_may_be_stacked(session_of: Sessions) -> None:
    listed = ask(session_of("qwen3"), attribute_residual, **question())
    stacked = ask(session_of("qwen3"), attribute_residual, **question(downstream_grads=GRADS))
    assert torch.equal(listed, stacked)


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"pos_ids": [9, 0, 11]}, OutOfRange, "pos_ids", ["11", "0 to 10"]),
        ({"pos_ids": [9, 0]}, ShapeMismatch, "downstream_grads", ["[3, 48]", "[2, 48]"]),
        ({"pos_ids": [9, 0, 0]}, InvalidArgument, "pos_ids", ["twice"]),
        ({"downstream_grads": []}, ShapeMismatch, "downstream_layers", ["6 entries", "0"]),
        ({"downstream_grads": [], "downstream_layers": []}, InvalidArgument, "downstream_grads", ["at least one"]),
        ({"downstream_grads": [GRADS[:2]] * 6}, ShapeMismatch, "downstream_grads", ["[2, 3, 48]", "[3, 48]"]),
        ({"downstream_layers": [1.0]}, ShapeMismatch, "downstream_layers", ["1 entries", "6"]),
        ({"downstream_layers": [3.5, *DEPTHS[1:]]}, OutOfRange, "downstream_layers", ["3.5", "0 to 3"]),
        ({"downstream_layers": [-0.5, *DEPTHS[1:]]}, OutOfRange, "downstream_layers", ["-0.5", "0 to 3"]),
        ({"downstream_layers": [1.25, *DEPTHS[1:]]}, OutOfRange, "downstream_layers", ["1.25", "0 to 3"]),
        ({"downstream_layers": [float("nan"), *DEPTHS[1:]]}, OutOfRange, "downstream_layers", ["nan", "0 to 3"]),
        ({"from_layer": 3}, OutOfRange, "from_layer", ["3", "0 to 2"]),
        ({"from_layer": -1}, OutOfRange, "from_layer", ["-1", "0 to 2"]),
        ({"to_layer": 3}, OutOfRange, "to_layer", ["3", "0 to 2"]),
        ({"from_layer": 2, "to_layer": 1}, OutOfRange, "to_layer", ["1", "from_layer (2)"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[InvalidArgument], param: str, parts: list[str]
) -> None:
    for operation in (attribute_residual, attribute_residual_terms):
        with pytest.raises(error) as caught:
            ask(session_of("qwen2"), operation, **question(**change))
        assert type(caught.value) is error
        assert caught.value.param == param
        for part in parts:
            assert part in str(caught.value)
