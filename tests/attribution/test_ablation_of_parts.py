"""Ablation of whole layers, at positions, and by resampling, against the plain model with hooks; and over grids."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution import rerun
from attribution.errors import (
    InvalidArgument,
    OutOfRange,
    SampleMismatch,
    SampleNotFound,
    ShapeMismatch,
    SightlineError,
)
from attribution.operations.ablations import ablate, ablate_sweep
from attribution.session import LocalSession
from attribution.stored import StoredSample
from tests.attribution.patching_oracle import Put, label_scores, logits_with, points_of
from tests.attribution.scoring import PROMPTS, ask, plain_model, stored_session
from tests.models import D_HEAD, D_MODEL, FAMILIES, N_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

TOKENS = [PROMPTS[0], *([(token * factor + 3) % 250 for token in PROMPTS[0]] for factor in (7, 11))]  # one length
SCORED = {"labels": [17, 200, 3], "pos_ids": [9, 3, 6]}
PARTS: dict[str, dict[str, Any]] = {
    "a layer": {"layers": [1]},
    "a layer at positions": {"layers": [0], "positions": [6, 2]},
    "heads at positions": {"heads": [(0, 2), (2, 5), (1, 0)], "positions": [3, 5, 9]},
    "an mlp at a position": {"mlps": [1], "positions": [3]},
    "everything": {"heads": [(1, 4)], "mlps": [0], "layers": [2, 1], "positions": [0, 8, 9]},
}


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    @cache
    def made(family: str, dtype: str = "float32") -> LocalSession:
        session = stored_session(family, tmp_path_factory.mktemp("store"), dtype)
        for number, tokens in enumerate(TOKENS):
            session.forward("aligned", number, token_ids=tokens)
        return session

    return made


def replacements(model: Any, mode: str, family: str) -> dict[str, list[Tensor]]:
    """What is put in place, per point and layer, [1, position or 1, …]."""
    runs = [points_of(model, tokens) for tokens in TOKENS]
    if mode == "resample":
        return runs[1]
    d_head = D_MODEL // N_HEADS if family in ("qwen2", "gpt2") else D_HEAD
    shapes = {"z": (1, 1, N_HEADS, d_head), "attn_out": (1, 1, D_MODEL), "mlp_out": (1, 1, D_MODEL)}
    if mode == "zero":
        return {name: [torch.zeros(shape)] * N_LAYERS for name, shape in shapes.items()}
    axes = (0,) if mode == "position_mean" else (0, 1)
    return {
        name: [torch.cat([run[name][layer] for run in runs]).mean(axes, keepdim=True) for layer in range(N_LAYERS)]
        for name in shapes
    }


def puts_of(parts: dict[str, Any], written: dict[str, list[Tensor]]) -> list[Put]:
    at = parts.get("positions")
    found = [Put("z", layer, written["z"][layer], head, at) for layer, head in parts.get("heads", [])]
    layers = parts.get("layers", [])
    found += [Put("attn_out", layer, written["attn_out"][layer], None, at) for layer in layers]
    return found + [
        Put("mlp_out", layer, written["mlp_out"][layer], None, at) for layer in [*parts.get("mlps", []), *layers]
    ]


@pytest.mark.parametrize("mode", ["zero", "mean", "position_mean", "resample"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_models_say_what_hooked_models_say(
    session_of: Sessions, family: str, dtype: str, limit: float, mode: str
) -> None:
    model, session = plain_model(family, dtype), session_of(family, dtype)
    written = replacements(model, mode, family)
    source = {"source_id": 1} if mode == "resample" else {}
    for number, parts in enumerate(PARTS.values()):
        candidates = [None, [200, 3, 17, 90]][number % 2]
        given = {"dataset_id": "aligned", "mode": mode, "candidate_ids": candidates, **source, **SCORED}
        found = ask(session, ablate, **given, **parts)
        before, after = (
            label_scores(logits_with(model, TOKENS[0], puts), SCORED["pos_ids"], SCORED["labels"], candidates)
            for puts in ([], puts_of(parts, written))
        )
        assert found["before"] == pytest.approx(before, rel=limit)
        assert found["after"] == pytest.approx(after, rel=limit)
        assert abs(before - after) > 10 * limit * abs(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_resampling_from_itself_changes_nothing(session_of: Sessions, family: str) -> None:
    parts = {"heads": [(0, 1), (2, 3)], "mlps": [1], "layers": [0, 2]}
    for at in (None, [1, 8]):
        found = ask(session_of(family), ablate, mode="resample", source_id=0, positions=at, **parts, **SCORED)
        assert found["after"] == pytest.approx(found["before"], rel=1e-6)


def test_a_layer_that_adds_nothing_is_a_layer_that_is_left_out(session_of: Sessions) -> None:
    session, model = session_of("llama"), plain_model("llama")
    found = ask(session, ablate, dataset_id="aligned", layers=[1], **SCORED)
    seen = points_of(model, TOKENS[0])
    skipped = logits_with(model, TOKENS[0], [Put("resid_pre", 2, seen["resid_pre"][1])])
    assert found["after"] == pytest.approx(label_scores(skipped, SCORED["pos_ids"], SCORED["labels"], None), rel=1e-5)


def test_several_sources_are_averaged_one_run_each(session_of: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    session, parts = session_of("qwen3"), {"heads": [(1, 2)], "layers": [2], "positions": [2, 9]}
    given = {"dataset_id": "aligned", "mode": "resample", **SCORED}
    singles = [ask(session, ablate, source_id=one, **parts, **given) for one in (1, 2)]
    monkeypatch.setattr(rerun, "BATCH_TOKENS", 23)  # the draws of a set lie in two batches
    both = ask(session, ablate, source_id=[1, 2], **parts, **given)
    assert both["after"] == pytest.approx((singles[0]["after"] + singles[1]["after"]) / 2, rel=1e-6)
    assert abs(singles[0]["after"] - singles[1]["after"]) > 1e-3
    sets = [parts, {"mlps": [0]}]
    swept = ask(session, ablate_sweep, sets=sets, source_id=[1, 2], **given)
    expected = [ask(session, ablate, source_id=[1, 2], **one, **given)["after"] for one in sets]
    assert swept["after"].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_source_of_another_length_or_dataset_serves_at_positions_of_both(session_of: Sessions) -> None:
    session = session_of("gpt2")
    session.forward("short", "s", token_ids=TOKENS[1][:8])
    given = {"dataset_id": "aligned", "mode": "resample", "layers": [1], "positions": [7, 2], **SCORED}
    found = ask(session, ablate, source_id="s", source_dataset_id="short", **given)
    assert found["after"] == pytest.approx(ask(session, ablate, source_id=1, **given)["after"], rel=1e-6)


def test_means_of_attention_are_computed_when_layers_need_them_and_then_kept(
    session_of: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, given = session_of("gemma2"), {"dataset_id": "aligned", "mode": "mean", **SCORED}
    head, layer = ({"heads": [(1, 1)]}, {"layers": [1]})
    first = [ask(session, ablate, **one, **given)["after"] for one in (head, layer)]
    monkeypatch.setattr(StoredSample, "read", lambda *_: pytest.fail("the means were read again"))
    assert [ask(session, ablate, **one, **given)["after"] for one in (head, layer)] == first


# --- grids


@pytest.mark.parametrize("over", ["heads", "mlps", "layers"])
@pytest.mark.parametrize("per_position", [False, True])
def test_a_grid_gives_what_single_calls_give(
    session_of: Sessions, over: str, per_position: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerun, "BATCH_TOKENS", 45)
    session, scored = session_of("qwen2"), {"dataset_id": "aligned", "mode": "resample", "source_id": 2, **SCORED}
    layers, positions = [2, 0], [8, 3]
    grid = {"over": over, "per_position": per_position, "layers": layers, "positions": positions}
    found = ask(session, ablate_sweep, **grid, **scored)
    axes = {"layer": layers} | ({"head": list(range(N_HEADS))} if over == "heads" else {})
    axes |= {"position": positions} if per_position else {}
    assert found["axes"] == axes
    assert found["after"].shape == tuple(map(len, axes.values()))
    assert found["after_per_position"].shape == (*found["after"].shape, 3)
    for at in {(0,) * len(axes), (1,) * len(axes), (1, *(0,) * (len(axes) - 1))}:
        named = {name: axes[name][index] for name, index in zip(axes, at, strict=True)}
        parts: dict[str, Any] = {over: [(named["layer"], named["head"]) if over == "heads" else named["layer"]]}
        single = ask(session, ablate, **parts, positions=[named["position"]] if per_position else positions, **scored)
        assert float(found["after"][at]) == pytest.approx(single["after"], rel=1e-6)
        assert found["before"] == pytest.approx(single["before"], rel=1e-6)


def test_a_grid_runs_over_everything_unless_it_is_said_otherwise(session_of: Sessions) -> None:
    session = session_of("llama")
    assert ask(session, ablate_sweep, over="heads", **SCORED)["after"].shape == (N_LAYERS, N_HEADS)
    found = ask(session, ablate_sweep, over="layers", per_position=True, **SCORED)
    assert found["axes"] == {"layer": [0, 1, 2], "position": list(range(11))}
    assert found["after"][:, 10].tolist() == pytest.approx([found["before"]] * 3, rel=1e-6)


def test_sets_have_positions_of_their_own_or_those_of_the_call(session_of: Sessions) -> None:
    session, given = session_of("llama"), {"mode": "mean", **SCORED}
    sets = [{"heads": [(1, 1)], "positions": [4]}, {"heads": [(1, 1)]}, {"mlps": [2], "positions": range(3)}]
    found = ask(session, ablate_sweep, sets=sets, positions=[3, 6], **given)
    single = [
        ask(session, ablate, heads=[(1, 1)], positions=[4], **given),
        ask(session, ablate, heads=[(1, 1)], positions=[3, 6], **given),
        ask(session, ablate, mlps=[2], positions=[0, 1, 2], **given),
    ]
    assert found["axes"] == {"set": [0, 1, 2]}
    assert found["after"].tolist() == pytest.approx([one["after"] for one in single], rel=1e-6)


# --- refusals


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"layers": [3]}, OutOfRange, "layers", ["3", "0 to 2"]),
        ({"positions": [11]}, OutOfRange, "positions", ["11", "0 to 10"]),
        ({"positions": []}, InvalidArgument, "positions", ["empty"]),
        ({"positions": [1, 1]}, InvalidArgument, "positions", ["twice"]),
        ({"mode": "resample", "source_id": None}, InvalidArgument, "source_id", ["resample", "needs"]),
        ({"mode": "resample", "source_id": []}, InvalidArgument, "source_id", ["resample", "needs"]),
        ({"mode": "resample", "source_id": 9}, SampleNotFound, "sample_id", ["9"]),
        ({"mode": "resample", "source_id": [0, -1]}, InvalidArgument, "source_id", ["at least 0", "[0, -1]"]),
        ({"mode": "resample", "source_id": 1}, ShapeMismatch, "positions", ["8 tokens", "11", "0 to 7"]),
        ({"mode": "resample", "source_id": [0, 1], "positions": [8]}, OutOfRange, "positions", ["8", "0 to 7"]),
        ({"mode": "zero", "source_id": 0}, InvalidArgument, "source_id", ["resample", "zero"]),
        ({"mode": "zero", "source_dataset_id": "x"}, InvalidArgument, "source_dataset_id", ["zero", "takes none"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[SightlineError], param: str, parts: list[str]
) -> None:
    _refused(session_of("qwen2"), ablate, {"heads": [(0, 1)], **SCORED} | change, error, param, parts)


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({}, InvalidArgument, "over", ["sets or over"]),
        ({"sets": [{"layers": [0]}], "over": "heads"}, InvalidArgument, "over", ["one of the two"]),
        ({"sets": [{"layers": [0]}], "per_position": True}, InvalidArgument, "per_position", ["one of the two"]),
        ({"sets": [{"layers": [0]}], "layers": [1]}, InvalidArgument, "layers", ["one of the two"]),
        ({"sets": [{}, {"layers": [3]}]}, OutOfRange, "sets.1.layers", ["3", "0 to 2"]),
        ({"sets": [{}, {"positions": [11]}]}, OutOfRange, "sets.1.positions", ["11", "0 to 10"]),
        ({"sets": [{"experts": [3]}]}, InvalidArgument, "sets.0.experts", ["has no argument 'sets.0.experts'"]),
        ({"over": "neurons"}, InvalidArgument, "over", ["heads", "neurons"]),
        ({"over": "mlps", "layers": [3]}, OutOfRange, "layers", ["3", "0 to 2"]),
        ({"over": "mlps", "positions": [11]}, OutOfRange, "positions", ["11", "0 to 10"]),
    ],
    ids=str,
)
def test_a_sweep_that_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[SightlineError], param: str, parts: list[str]
) -> None:
    _refused(session_of("qwen2"), ablate_sweep, SCORED | change, error, param, parts)


def _refused(
    session: LocalSession,
    operation: Any,
    given: dict[str, Any],
    error: type[SightlineError],
    param: str,
    parts: list[str],
) -> None:
    with pytest.raises(error) as caught:
        ask(session, operation, **given)
    assert type(caught.value) is error
    assert caught.value.param == param
    for part in parts:
        assert part in str(caught.value)


def test_a_sweep_over_too_many_cells_is_refused(session_of: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attribution.sweeps.MOST_CELLS", 32)
    with pytest.raises(InvalidArgument, match="33 cells, each a forward pass; at most 32"):
        ask(session_of("qwen2"), ablate_sweep, over="mlps", per_position=True, **SCORED)


def test_a_source_of_another_model_is_refused(session_of: Sessions) -> None:
    session = session_of("qwen3")
    other = LocalSession(session_of("llama").model, store=session.store)
    other.forward("others", 0, token_ids=TOKENS[0])
    given = {"mode": "resample", "source_id": 0, "source_dataset_id": "others", "layers": [0], **SCORED}
    with pytest.raises(SampleMismatch, match="tiny-llama"):
        ask(session, ablate, **given)
