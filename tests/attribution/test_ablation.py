"""Ablation against the plain model with hooks that put zero or a mean in place of what heads and MLPs write."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch
from attribution.operations.scores import ablate
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import reference_ablation
from tests.attribution.scoring import PROMPTS, ask, plain_model, stored_session
from tests.models import FAMILIES, N_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

SCORED = {"labels": [17, 200, 3], "pos_ids": [9, 3, 6]}
CUTS: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "a head": ([(1, 4)], []),
    "heads of all layers": ([(0, 2), (2, 5), (1, 0), (1, 3)], []),
    "an mlp": ([], [1]),
    "both": ([(2, 1), (0, 0)], [2, 0]),
    "everything": ([(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)], list(range(N_LAYERS))),
}


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return cache(lambda family, dtype="float32": stored_session(family, tmp_path_factory.mktemp("store"), dtype))


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_models_say_what_hooked_models_say(
    session_of: Sessions, family: str, dtype: str, limit: float, mode: str
) -> None:
    model = plain_model(family, dtype)
    for number, (heads, mlps) in enumerate(CUTS.values()):
        candidates = [None, [200, 3, 17, 90]][number % 2]
        given = {"heads": heads, "mlps": mlps, "mode": mode, "candidate_ids": candidates, **SCORED}
        found = ask(session_of(family, dtype), ablate, **given)
        before, after = reference_ablation(
            model, PROMPTS[0], heads, mlps, mode, SCORED["labels"], candidates, SCORED["pos_ids"], PROMPTS
        )
        assert found["before"] == pytest.approx(before, rel=limit)
        assert found["after"] == pytest.approx(after, rel=limit)
        assert abs(before - after) > 100 * limit * abs(before)
        for name in ("before", "after"):
            assert found[f"{name}_per_position"].shape == (3,)
            assert float(found[f"{name}_per_position"].sum()) == pytest.approx(found[name], rel=1e-9)


def test_nothing_ablated_changes_nothing(session_of: Sessions) -> None:
    for mode in ("zero", "mean"):
        found = ask(session_of("qwen3"), ablate, mode=mode, **SCORED)
        assert found["before"] == found["after"]


def test_a_component_that_is_named_twice_is_ablated_once(session_of: Sessions) -> None:
    for mode in ("zero", "mean"):
        once = ask(session_of("llama"), ablate, heads=[(1, 2)], mlps=[0], mode=mode, **SCORED)
        twice = ask(session_of("llama"), ablate, heads=[(1, 2), (1, 2)], mlps=[0, 0], mode=mode, **SCORED)
        assert once["after"] == twice["after"]


def test_the_samples_stay_as_they_were(session_of: Sessions) -> None:
    session = session_of("gemma2")
    first = ask(session, ablate, heads=[(0, 1)], mlps=[1], **SCORED)
    assert ask(session, ablate, heads=[(0, 1)], mlps=[1], **SCORED)["before"] == first["before"]


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"heads": [(3, 0)]}, OutOfRange, "heads", ["3", "0 to 2"]),
        ({"heads": [(0, 6)]}, OutOfRange, "heads", ["6", "0 to 5"]),
        ({"heads": [(-1, 0)]}, OutOfRange, "heads", ["-1", "0 to 2"]),
        ({"heads": [(0, 1, 2)]}, InvalidArgument, "heads.0", ["2 items"]),
        ({"heads": [4]}, InvalidArgument, "heads.0", ["4"]),
        ({"mlps": [3]}, OutOfRange, "mlps", ["3", "0 to 2"]),
        ({"mode": "noise"}, InvalidArgument, "mode", ["zero", "mean", "noise"]),
        ({"labels": None}, InvalidArgument, "labels", ["missing", "pos_ids"]),
        ({"labels": [17, 200]}, ShapeMismatch, "labels", ["2 entries", "3, one per entry of pos_ids"]),
        ({"labels": [17, 200, 281]}, OutOfRange, "labels", ["281", "0 to 280"]),
        ({"candidate_ids": [17, 200]}, InvalidArgument, "labels", ["3", "[17, 200]"]),
        ({"candidate_ids": [17, 200, 3, 281]}, OutOfRange, "candidate_ids", ["281", "0 to 280"]),
        ({"pos_ids": [9, 3, 11]}, OutOfRange, "pos_ids", ["11", "0 to 10"]),
        ({"pos_ids": [9, 3, 3]}, InvalidArgument, "pos_ids", ["twice"]),
        ({"pos_ids": None}, ShapeMismatch, "labels", ["3 entries", "11"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[InvalidArgument], param: str, parts: list[str]
) -> None:
    given = {"heads": [(0, 1)], "mlps": [1], **SCORED}
    with pytest.raises(error) as caught:
        ask(session_of("qwen2"), ablate, **given | change)
    assert type(caught.value) is error
    assert caught.value.param == param
    for part in parts:
        assert part in str(caught.value)
