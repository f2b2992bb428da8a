"""Activation patching against the plain model with hooks, and against what must come out of it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from attribution import rerun
from attribution.errors import BadSelector, InvalidArgument, OutOfRange, SampleNotFound, ShapeMismatch, SightlineError
from attribution.operation import Operation
from attribution.operations.patching import patch, patch_sweep
from attribution.session import LocalSession
from tests.attribution.patching_oracle import Put, label_scores, logit_gap, logits_with, points_of
from tests.attribution.scoring import PROMPTS, plain_model, stored_session
from tests.models import FAMILIES, N_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

CORRUPTED = PROMPTS[0]
CLEAN = [(token * 7 + 3) % 250 for token in CORRUPTED]
PAIR = {"dataset_id": "puzzles", "clean_id": "clean", "corrupted_id": 0}
SCORED = {"labels": [17, 200, 3], "pos_ids": [9, 3, 6], "against": [5, 60, 90]}
POINTS = ("resid_pre", "attn_out", "mlp_out", "resid_mid", "resid_post")
AT = [2, 3, 7]

PATCHES: dict[str, tuple[list[tuple[int, int]], list[tuple[str, int]], list[int] | None]] = {
    "a head": ([(1, 4)], [], None),
    "heads at positions": ([(0, 2), (2, 5)], [], AT),
    "all heads of a layer": ([], [("z", 1)], AT),
    **{point: ([], [(point, layer)], AT) for layer, point in enumerate(("attn_out", "mlp_out", "resid_mid"))},
    **{f"{point} at some": ([], [(point, 1)], [8, 1]) for point in ("resid_pre", "resid_post")},
    "the stream and what is added to it": ([(1, 0)], [("resid_mid", 1), ("mlp_out", 1), ("resid_post", 1)], [4]),
    "stream and MLP": ([], [("resid_mid", 0), ("mlp_out", 0), ("attn_out", 0)], [6, 2]),
}


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    @cache
    def made(family: str, dtype: str = "float32") -> LocalSession:
        session = stored_session(family, tmp_path_factory.mktemp("store"), dtype)
        session.forward("puzzles", "clean", token_ids=CLEAN)
        session.forward("puzzles", "same", token_ids=CORRUPTED)
        return session

    return made


def ask(session: LocalSession, operation: Operation[..., Any], **given: Any) -> Any:
    return session.run(operation, PAIR | SCORED | given)


def given(heads: list[tuple[int, int]], points: list[tuple[str, int]], positions: list[int] | None) -> dict[str, Any]:
    return {"heads": heads, "points": [f"{name}[{layer}]" for name, layer in points], "positions": positions}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_say_what_hooked_models_say(session_of: Sessions, family: str, dtype: str, limit: float) -> None:
    model, session = plain_model(family, dtype), session_of(family, dtype)
    source = points_of(model, CLEAN)
    for number, (heads, points, positions) in enumerate(PATCHES.values()):
        candidates = [None, [200, 3, 17, 90]][number % 2]
        found = ask(session, patch, **given(heads, points, positions), candidate_ids=candidates)
        puts = [Put("z", layer, source["z"][layer], head, positions) for layer, head in heads]
        puts += [Put(name, layer, source[name][layer], None, positions) for name, layer in points]
        runs = {
            "clean": logits_with(model, CLEAN, []),
            "corrupted": logits_with(model, CORRUPTED, []),
            "patched": logits_with(model, CORRUPTED, puts),
        }
        for metric in ("log_prob", "logit_diff"):
            expected = {name: _metric(metric, logits, candidates) for name, logits in runs.items()}
            for name, value in expected.items():
                assert found[metric][name] == pytest.approx(value, rel=limit, abs=limit), (metric, name)
            assert abs(expected["patched"] - expected["corrupted"]) > 1e-3
            gap = expected["clean"] - expected["corrupted"]
            assert found[metric]["recovery"] == pytest.approx(
                (expected["patched"] - expected["corrupted"]) / gap, rel=20 * limit, abs=20 * limit
            )
            assert found[metric]["note"] is None


def _metric(metric: str, logits: torch.Tensor, candidates: list[int] | None) -> float:
    if metric == "log_prob":
        return label_scores(logits, SCORED["pos_ids"], SCORED["labels"], candidates)
    return logit_gap(logits, SCORED["pos_ids"], SCORED["labels"], SCORED["against"])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_stream_brings_the_clean_answer_back(session_of: Sessions, family: str) -> None:
    session = session_of(family)
    for layer in range(N_LAYERS):
        for point in ("resid_pre", "resid_mid", "resid_post"):
            for metric in ask(session, patch, points=[f"{point}[{layer}]"]).values():
                assert metric["patched"] == pytest.approx(metric["clean"], rel=1e-6, abs=1e-5)
                assert metric["recovery"] == pytest.approx(1, abs=1e-5)


def test_every_part_together_brings_the_clean_answer_back_but_for_the_embedding(session_of: Sessions) -> None:
    session = session_of("gemma2")
    parts = ["resid_pre[0]", "z[*]", "mlp_out[*]"]
    whole = ask(session, patch, points=parts)
    assert whole["log_prob"]["recovery"] == pytest.approx(1, abs=1e-5)
    assert abs(ask(session, patch, points=parts[1:])["log_prob"]["recovery"] - 1) > 1e-3


def test_what_comes_after_the_scored_position_changes_nothing(session_of: Sessions) -> None:
    found = session_of("llama").run(
        patch, PAIR | {"labels": [17], "pos_ids": [4], "points": ["resid_pre[0]"], "positions": range(5, 11)}
    )
    assert found["log_prob"]["recovery"] == 0
    assert found["log_prob"]["patched"] == found["log_prob"]["corrupted"]
    assert found["logit_diff"] is None


def test_swapped_samples_ask_what_breaks_the_answer(session_of: Sessions) -> None:
    session = session_of("qwen2")
    swapped = {"clean_id": 0, "corrupted_id": "clean"}
    repairs, breaks = (ask(session, patch, points=["mlp_out[1]"], **pair)["log_prob"] for pair in ({}, swapped))
    assert breaks["clean"] == pytest.approx(repairs["corrupted"], rel=1e-6)
    assert breaks["corrupted"] == pytest.approx(repairs["clean"], rel=1e-6)
    assert abs(breaks["patched"] - repairs["patched"]) > 1e-3


def test_samples_that_are_the_same_have_nothing_to_recover_and_say_so(session_of: Sessions) -> None:
    session = session_of("qwen3")
    found = ask(session, patch, clean_id="same", heads=[(1, 1)])
    swept = ask(session, patch_sweep, clean_id="same", over="mlp_out")
    for metric in (found["log_prob"], found["logit_diff"], swept["log_prob"], swept["logit_diff"]):
        assert metric["recovery"] is None
        assert "nothing to recover" in metric["note"]
    assert found["log_prob"]["patched"] == pytest.approx(found["log_prob"]["clean"], rel=1e-6)


def test_the_clean_sample_may_be_in_another_dataset_and_have_another_length(session_of: Sessions) -> None:
    session = session_of("llama")
    session.forward("clean_ones", 0, token_ids=CLEAN[:8])
    at = {"pos_ids": [6], "labels": [17], "against": [3], "points": ["resid_mid[1]"], "positions": [2, 5]}
    longer = ask(session, patch, **at)["log_prob"]
    shorter = ask(session, patch, clean_id=0, clean_dataset_id="clean_ones", **at)["log_prob"]
    assert shorter["patched"] == pytest.approx(longer["patched"], rel=1e-6)
    assert shorter["clean"] == pytest.approx(longer["clean"], rel=1e-6)


# --- sweeps


@pytest.mark.parametrize("over", ["heads", *POINTS])
@pytest.mark.parametrize("per_position", [False, True])
def test_a_sweep_gives_what_single_calls_give(
    session_of: Sessions, over: str, per_position: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerun, "BATCH_TOKENS", 45)  # four rows of 11 tokens
    session = session_of("gemma2" if over == "resid_mid" else "qwen3")
    positions, layers = [8, 2], [2, 0]
    swept = ask(session, patch_sweep, over=over, per_position=per_position, layers=layers, positions=positions)
    axes = {"layer": layers}
    if over == "heads":
        axes["head"] = list(range(N_HEADS))
    if per_position:
        axes["position"] = positions
    assert swept["axes"] == axes
    for metric in ("log_prob", "logit_diff"):
        assert swept[metric]["patched"].shape == swept[metric]["recovery"].shape == tuple(map(len, axes.values()))
    for at in {(0,) * len(axes), (1,) * len(axes), (1, *(0,) * (len(axes) - 1))}:
        named = {name: axes[name][index] for name, index in zip(axes, at, strict=True)}
        where = [named["position"]] if per_position else positions
        layer = named["layer"]
        one = {"heads": [(layer, named["head"])]} if over == "heads" else {"points": [f"{over}[{layer}]"]}
        single = ask(session, patch, **one, positions=where)
        for metric in ("log_prob", "logit_diff"):
            for name in ("patched", "recovery"):
                assert float(swept[metric][name][at]) == pytest.approx(single[metric][name], rel=1e-5, abs=1e-6)
            assert swept[metric]["clean"] == pytest.approx(single[metric]["clean"], rel=1e-6)


def test_a_sweep_runs_over_everything_unless_it_is_said_otherwise(session_of: Sessions) -> None:
    swept = ask(session_of("qwen2"), patch_sweep, over="resid_pre", per_position=True)
    assert swept["axes"] == {"layer": [0, 1, 2], "position": list(range(11))}
    assert swept["log_prob"]["recovery"].shape == (3, 11)
    assert swept["log_prob"]["recovery"][:, 10].tolist() == [0, 0, 0]  # nothing scored comes after position 9
    assert swept["log_prob"]["recovery"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"clean_id": "absent"}, SampleNotFound, "sample_id", ["absent"]),
        ({"heads": [(3, 0)]}, OutOfRange, "heads", ["3", "0 to 2"]),
        ({"heads": [(0, 6)]}, OutOfRange, "heads", ["6", "0 to 5"]),
        ({"heads": None, "points": None}, InvalidArgument, "points", ["nothing is patched"]),
        ({"points": ["mlp_out"]}, BadSelector, "points.0", ["mlp_out", "layer index"]),
        ({"points": ["z[0]", "pattern[1]"]}, BadSelector, "points.1", ["pattern[1]", "resid_post[2]"]),
        ({"points": ["logits"]}, BadSelector, "points.0", ["logits", "attn_out"]),
        ({"points": ["model.layers[0].output"]}, BadSelector, "points.0", ["model.layers[0].output"]),
        ({"points": ["z[3]"]}, BadSelector, "points.0", ["0 to 2"]),
        ({"positions": [11]}, OutOfRange, "positions", ["11", "0 to 10"]),
        ({"positions": []}, InvalidArgument, "positions", ["empty"]),
        ({"positions": [1, 1]}, InvalidArgument, "positions", ["twice"]),
        ({"clean_id": 1}, ShapeMismatch, "positions", ["8 tokens", "11", "0 to 7"]),
        ({"clean_id": 1, "positions": [3]}, OutOfRange, "pos_ids", ["9", "0 to 7"]),
        ({"clean_id": 1, "positions": [9], "pos_ids": [1, 2, 3]}, OutOfRange, "positions", ["9", "0 to 7"]),
        ({"clean_id": 1, "positions": [3], "pos_ids": None}, ShapeMismatch, "pos_ids", ["8 tokens"]),
        ({"labels": None}, InvalidArgument, "labels", ["missing"]),
        ({"against": [1, 2]}, ShapeMismatch, "against", ["2 entries", "3"]),
        ({"against": [1, 2, 281]}, OutOfRange, "against", ["281", "0 to 280"]),
        ({"candidate_ids": [17, 200]}, InvalidArgument, "labels", ["3", "[17, 200]"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[SightlineError], param: str, parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        session_of("qwen2").run(patch, PAIR | SCORED | {"heads": [(0, 1)]} | change)
    assert type(caught.value) is error
    assert caught.value.param == param
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"over": "pattern"}, InvalidArgument, "over", ["heads", "pattern"]),
        ({"layers": [3]}, OutOfRange, "layers", ["3", "0 to 2"]),
        ({"layers": [1, 1]}, InvalidArgument, "layers", ["twice"]),
        ({"layers": []}, InvalidArgument, "layers", ["at least one"]),
        ({"positions": [11]}, OutOfRange, "positions", ["11", "0 to 10"]),
        ({"clean_id": 1}, ShapeMismatch, "positions", ["8 tokens"]),
    ],
    ids=str,
)
def test_a_grid_that_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[SightlineError], param: str, parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        session_of("qwen2").run(patch_sweep, PAIR | SCORED | {"over": "heads"} | change)
    assert type(caught.value) is error
    assert caught.value.param == param
    for part in parts:
        assert part in str(caught.value)
