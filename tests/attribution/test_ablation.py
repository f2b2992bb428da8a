"""Ablation against the plain model with hooks that put zero or a mean in place of what heads and MLPs write."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from attribution import rerun
from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch
from attribution.operations.ablations import ablate, ablate_sweep
from attribution.session import LocalSession
from attribution.stored import StoredSample
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


ALIGNED = [[(5 * at + 31 * number) % 270 for at in range(11)] for number in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_means_at_each_position_are_taken_over_samples_of_one_length(session_of: Sessions, family: str) -> None:
    session, model = session_of(family), plain_model(family)
    for number, tokens in enumerate(ALIGNED):
        session.forward("aligned", number, token_ids=tokens)
    heads, mlps = CUTS["both"]
    given = {"heads": heads, "mlps": mlps, "mode": "position_mean", "dataset_id": "aligned", **SCORED}
    found = ask(session, ablate, **given)
    before, after = reference_ablation(
        model, ALIGNED[0], heads, mlps, "position_mean", SCORED["labels"], None, SCORED["pos_ids"], ALIGNED
    )
    assert (found["before"], found["after"]) == (pytest.approx(before, rel=1e-5), pytest.approx(after, rel=1e-5))
    assert abs(after - ask(session, ablate, **given | {"mode": "mean"})["after"]) > 1e-3
    with pytest.raises(ShapeMismatch, match="8 to 13 tokens"):
        ask(session, ablate, **given | {"dataset_id": "puzzles"})
    elsewhere = ask(session, ablate, **given | {"dataset_id": "puzzles", "source_dataset_id": "aligned"})
    _, after = reference_ablation(
        model, PROMPTS[0], heads, mlps, "position_mean", SCORED["labels"], None, SCORED["pos_ids"], ALIGNED
    )
    assert elsewhere["after"] == pytest.approx(after, rel=1e-5)
    with pytest.raises(ShapeMismatch, match="11 tokens a sample; expected 8"):
        ask(
            session,
            ablate,
            **given | {"dataset_id": "puzzles", "sample_id": 1, "source_dataset_id": "aligned", "pos_ids": [1, 2, 3]},
        )


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_sweep_gives_what_single_calls_give(session_of: Sessions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "BATCH_TOKENS", 23)  # two rows of 11 tokens
    session, scored = session_of("qwen3"), {"mode": mode, "candidate_ids": [200, 3, 17, 90], **SCORED}
    sets = [{"heads": heads, "mlps": mlps} for heads, mlps in CUTS.values()]
    found = ask(session, ablate_sweep, sets=[*sets, {}], **scored)
    singles = [ask(session, ablate, **one, **scored) for one in sets]
    assert found["after"].tolist() == pytest.approx([*(one["after"] for one in singles), found["before"]], rel=1e-6)
    assert found["before"] == pytest.approx(singles[0]["before"], rel=1e-6)
    assert found["after_per_position"].shape == (len(sets) + 1, 3)
    assert found["after_per_position"].sum(-1).tolist() == pytest.approx(found["after"].tolist())


def test_the_means_of_a_dataset_are_read_once_until_it_changes(
    session_of: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of("qwen2")
    for number, tokens in enumerate(ALIGNED):
        session.forward("changing", number, token_ids=tokens)
    given = {"heads": [(0, 1)], "mode": "mean", "dataset_id": "changing", **SCORED}
    first = ask(session, ablate, **given)["after"]
    reads = []
    monkeypatch.setattr(StoredSample, "read", lambda *_: reads.append(1))
    assert ask(session, ablate, **given)["after"] == first
    assert not reads
    monkeypatch.undo()
    session.forward("changing", "more", token_ids=ALIGNED[0][:4])
    assert ask(session, ablate, **given)["after"] != first
    session.clear_cache("changing")
    for number, tokens in enumerate(ALIGNED):
        session.forward("changing", number, token_ids=tokens)
    assert ask(session, ablate, **given)["after"] == first


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
