"""Differences of means, held against arithmetic by hand and against PyTorch hooks on plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution import contrast as contrast_module
from attribution.contrast import contrast, scaled, statistics_of
from attribution.errors import BadPositions, BadSelector, CannotFit, InvalidArgument, NotFinite, VectorMismatch
from attribution.model.load import trace_model
from attribution.operation import Progress
from attribution.operations.steering import create_steering_vector
from attribution.session import LocalSession
from tests.attribution.plain import distance, module_value, prompts_of, watch
from tests.models import D_HEAD, D_MODEL, FAMILIES, N_HEADS, tiny_model, tiny_tokenizer, traced

POSITIVE, NEGATIVE = prompts_of([9, 5, 12]), prompts_of([7, 14])
MESSAGES = [{"role": "user", "content": "the rest"}, {"role": "assistant", "content": "is in"}]


def session_of(family: str, folder: Path) -> LocalSession:
    return LocalSession(traced(family), store=folder / "store")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    return session_of("qwen3", tmp_path_factory.mktemp("session"))


# --- the arithmetic


def test_statistics_by_hand():
    positive, negative = (
        torch.tensor([[2.0, 0.0], [4.0, 0.0]]).double(),
        torch.tensor([[0.0, 1.0], [0.0, 3.0]]).double(),
    )
    # means (3, 0) and (0, 2): difference (3, −2), norm √13; projections 6, 12 against −2, −6
    found = statistics_of(positive, negative)
    assert found["positive_norm"] == 3.0
    assert found["negative_norm"] == 2.0
    assert found["difference_norm"] == pytest.approx(13**0.5, rel=1e-12)
    assert (found["cosine"], found["auc"]) == (0.0, 1.0)


def test_a_mean_of_nothing_has_no_cosine():
    one, zero = torch.tensor([[1.0, 1.0]]).double(), torch.zeros(1, 2).double()
    assert statistics_of(one, zero)["cosine"] is None
    assert statistics_of(one, zero)["auc_held_out"] is None  # nothing is left when the pair is left out


def test_auc_counts_ties_half_and_a_wrong_order_as_nothing():
    positive = torch.tensor([[1.0], [0.0], [8.0]]).double()
    negative = torch.tensor([[0.0], [2.0]]).double()
    # direction 3 − 1 > 0; pairs that win: 1>0, 8>0, 8>2; tie 0=0: 3.5 of 6
    assert statistics_of(positive, negative)["auc"] == pytest.approx(3.5 / 6, abs=1e-15)


def left_out(positive: Tensor, negative: Tensor) -> float:
    """Leave-pair-out, one pair after the other: the direction is computed anew without it."""
    wins = 0.0
    for i in range(len(positive)):
        for j in range(len(negative)):
            rest = torch.cat([positive[:i], positive[i + 1 :]]), torch.cat([negative[:j], negative[j + 1 :]])
            score = float((positive[i] - negative[j]) @ (rest[0].mean(0) - rest[1].mean(0)))
            wins += 0.5 if abs(score) < 1e-9 else score > 0
    return wins / (len(positive) * len(negative))


@pytest.mark.parametrize(("n", "m", "apart"), [(2, 2, 0.0), (7, 5, 0.3), (6, 11, 1.0), (9, 9, 0.0)])
def test_the_held_out_auc_is_that_of_leaving_each_pair_out(
    n: int, m: int, apart: float, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(n * m)
    positive = torch.randn(n, 40, generator=generator).double() + 30 + apart
    negative = torch.randn(m, 40, generator=generator).double() + 30
    found = statistics_of(positive, negative)
    assert found["auc_held_out"] == pytest.approx(left_out(positive, negative), abs=1e-12)
    monkeypatch.setattr(contrast_module, "_PAIRS", 2 * m)  # in several pieces
    assert statistics_of(positive, negative) == found


def test_noise_is_told_apart_only_by_the_direction_that_was_made_from_it():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 1000, generator=generator).double()
    found = statistics_of(noise[:20], noise[20:])
    assert found["auc"] == 1.0
    assert found["auc_held_out"] is not None
    assert 0.2 < found["auc_held_out"] < 0.8


def test_the_same_example_in_both_groups_is_a_tie():
    positive = torch.tensor([[0.1, 0.7], [0.3, 0.2], [5.0, 1.0]]).double()
    found = statistics_of(positive, positive[:2])
    # direction (1.6, 0.3), up to a factor: 0.37 and 0.54 against themselves, 8.3 above both; 3 wins and 2 ties
    assert found["auc"] == pytest.approx((3 + 2 * 0.5) / 6, abs=1e-15)


def test_a_difference_of_means_is_the_mean_of_paired_differences():
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(2, 6, 3, 8, generator=generator)  # group, pair, layer, width
    found = contrast(pairs.flatten(0, 1), 6, [0, 1, 2])
    assert distance(found.direction, (pairs[0].double() - pairs[1].double()).mean(0)) < 1e-14


def test_each_layer_is_scaled_by_itself():
    direction = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]]).double()
    assert torch.equal(scaled(direction, None), direction)
    assert torch.allclose(scaled(direction, 10.0), torch.tensor([[[6.0, 8.0]], [[0.0, 10.0]]]).double())


# --- through the model


def plainly(family: str, point: str, layer: int, rows: slice) -> Tensor:
    """The difference of means by a plain model, one prompt at a time without padding."""
    groups = []
    for prompts in (POSITIVE, NEGATIVE):
        values = [watch(tiny_model(family), ids)[point][layer, 0].double() for ids in prompts]
        groups.append(torch.stack([value[rows].mean(0) for value in values]).mean(0))
    return groups[0] - groups[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("point", "layer"), [("resid_post", 2), ("mlp_out", 0)])
def test_a_vector_is_that_of_a_plain_model_with_hooks(family: str, point: str, layer: int, tmp_path: Path):
    session = session_of(family, tmp_path)
    made = session.create_steering_vector("v", POSITIVE, NEGATIVE, f"{point}[{layer}]")
    expected = plainly(family, point, layer, slice(-1, None))
    found = session.get_steering_vector("v")["vector"]
    assert found.dtype == torch.float32
    assert distance(found, expected) < 2e-5
    assert made["shape"] == [D_MODEL]
    assert made["layers"] == [layer]
    assert made["norms"] == [pytest.approx(float(expected.norm()), rel=1e-4)]


@pytest.mark.parametrize(
    ("positions", "rows"), [("last", slice(-1, None)), ("all", slice(None)), ({"start": 1, "stop": 4}, slice(1, 4))]
)
def test_positions_say_which_tokens_the_mean_is_taken_over(session: LocalSession, positions: Any, rows: slice):
    session.create_steering_vector("w", POSITIVE, NEGATIVE, "resid_post[1]", positions, overwrite=True)
    found = session.get_steering_vector("w")["vector"]
    assert distance(found, plainly("qwen3", "resid_post", 1, rows)) < 2e-5


def test_a_window_that_begins_after_a_shorter_example_has_ended_takes_what_there_is(session: LocalSession):
    session.create_steering_vector("w", POSITIVE, NEGATIVE, "resid_post[1]", {"start": 4}, overwrite=True)
    expected = plainly("qwen3", "resid_post", 1, slice(4, None))
    assert distance(session.get_steering_vector("w")["vector"], expected) < 2e-5


def test_heads_keep_their_axis_and_several_layers_get_one_direction_each(session: LocalSession):
    made = session.create_steering_vector("z", POSITIVE, NEGATIVE, "z[0:3:2]", normalise=2.5, overwrite=True)
    found = session.get_steering_vector("z")["vector"]
    assert made["layers"] == [0, 2]
    assert made["shape"] == [2, N_HEADS, D_HEAD]
    assert made["norms"] == [pytest.approx(2.5, rel=1e-6)] * 2
    for row, layer in zip(found, (0, 2), strict=True):
        expected = plainly("qwen3", "z", layer, slice(-1, None))
        assert distance(row / 2.5, expected / expected.norm()) < 2e-5
    assert [one["layer"] for one in made["statistics"]] == [0, 2]


def test_a_module_is_as_good_a_place(session: LocalSession):
    path = "model.layers.1.mlp.down_proj"
    made = session.create_steering_vector("m", POSITIVE, NEGATIVE, f"{path}.input", normalise="unit", overwrite=True)
    found = session.get_steering_vector("m")["vector"]
    model = tiny_model("qwen3")
    groups = [
        torch.stack([module_value(model, ids, path, "input")[-1] for ids in prompts]).double().mean(0)
        for prompts in (POSITIVE, NEGATIVE)
    ]
    expected = groups[0] - groups[1]
    assert distance(found, expected / expected.norm()) < 2e-5
    assert (made["layers"], made["statistics"][0]["layer"]) == ([], None)


def test_texts_and_conversations_are_tokenised_as_everywhere(session: LocalSession):
    tokenizer = session.model.tokenizer
    tokens = [tokenizer.encode("the rest"), tokenizer.encode(tokenizer.apply_chat_template(MESSAGES, tokenize=False))]
    for name, examples in (("t", ["the rest", MESSAGES]), ("i", tokens)):
        session.create_steering_vector(name, examples, ["a cat"], "resid_post[1]", overwrite=True)
    texts, ids = (session.get_steering_vector(name) for name in ("t", "i"))
    assert torch.equal(texts["vector"], ids["vector"])
    said = texts["provenance"]["positive"]
    assert said["examples"] == ["the rest", MESSAGES]
    assert said["token_ids_sha256"] == ids["provenance"]["positive"]["token_ids_sha256"]
    assert (said["count"], said["tokens"]) == (2, sum(map(len, tokens)))


def test_statistics_are_those_of_the_activations(session: LocalSession):
    made = session.create_steering_vector("s", POSITIVE, NEGATIVE, "resid_post[2]", normalise="unit", overwrite=True)
    groups = [
        torch.stack([watch(tiny_model("qwen3"), ids)["resid_post"][2, 0, -1] for ids in prompts]).double()
        for prompts in (POSITIVE, NEGATIVE)
    ]
    told = made["statistics"][0]
    means = [group.mean(0) for group in groups]
    assert told["positive_norm"] == pytest.approx(float(means[0].norm()), rel=1e-5)
    assert told["negative_norm"] == pytest.approx(float(means[1].norm()), rel=1e-5)
    assert told["cosine"] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-5)
    assert told["auc"] == 1.0
    assert told["auc_held_out"] == left_out(*groups)


def test_provenance_says_how_a_vector_was_made(session: LocalSession):
    made = session.create_steering_vector("p", POSITIVE, NEGATIVE, "resid_post[2]", normalise=3, overwrite=True)
    said = made["provenance"]
    assert said["model"] == session.identity.record()
    assert (said["method"], said["positions"], said["normalise"]) == ("difference of means", "last", 3.0)
    assert said["positive"]["examples"] == POSITIVE
    assert set(said["versions"]) >= {"nnsight", "torch", "transformers"}
    long = session.create_steering_vector("p", [[7] * 200] * 200, NEGATIVE, "resid_post[2]", overwrite=True)
    assert long["provenance"]["positive"]["examples"] is None  # too long to repeat: the hash tells them
    assert long["provenance"]["positive"]["count"] == 200


def test_others_may_use_the_model_between_two_batches(session: LocalSession):
    arguments = {"name": "b", "positive": prompts_of([5] * 20), "negative": NEGATIVE, "selector": "resid_post[1]"}
    steps = create_steering_vector.start(session, create_steering_vector.validate(arguments | {"overwrite": True}))
    assert list(steps) == [Progress(16, 22), Progress(22, 22)]


def test_a_name_that_is_taken_is_refused_before_anything_runs(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    session.create_steering_vector("taken", POSITIVE, NEGATIVE, "resid_post[1]", overwrite=True)
    monkeypatch.setattr(contrast_module, "forward", None)
    with pytest.raises(InvalidArgument, match="there is a steering vector 'taken' already"):
        session.create_steering_vector("taken", POSITIVE, NEGATIVE, "resid_post[1]")


def test_a_vector_of_the_same_model_in_another_dtype_is_another_models(session: LocalSession, tmp_path: Path):
    session.create_steering_vector("mine", POSITIVE, NEGATIVE, "resid_post[1]", overwrite=True)
    double = trace_model("double", tiny_model("qwen3").double(), tiny_tokenizer())
    other = LocalSession(double, store=tmp_path / "store", vectors_dir=session.vectors)
    with pytest.raises(VectorMismatch, match=r"'tiny-qwen3' .float32, .* and this is 'double' .float64"):
        other.get_steering_vector("mine")
    assert other.get_steering_vector("mine", any_model=True)["vector"].shape == (D_MODEL,)
    there = {one["name"]: one["of_this_model"] for one in other.list_steering_vectors()["vectors"]}
    assert there["mine"] is False
    other.create_steering_vector("mine", POSITIVE, NEGATIVE, "resid_post[1]", overwrite=True)
    assert other.get_steering_vector("mine")["vector"].dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"selector": "pattern[1]"}, BadSelector, "a pattern is no vector"),
        ({"selector": "logits"}, BadSelector, "only the last position"),
        ({"selector": "resid_post[9]"}, BadSelector, "0 to 2; the index names none"),
        ({"positions": {"start": 13}}, BadPositions, r"no token of positive\.0, which has 9"),
        ({"positions": "generated"}, BadPositions, r"no token of positive\.0"),
        ({"positions": "first"}, BadPositions, "one of all, prompt, generated, last"),
        ({"positive": []}, InvalidArgument, "positive is empty"),
        ({"negative": POSITIVE}, InvalidArgument, "the same mean in layer 1, there is no direction"),
        (
            {"positive": [[1, 7]], "negative": [[2, 7]], "selector": "resid_pre[0:2]"},
            InvalidArgument,
            "mean in layer 0,",
        ),
        ({"normalise": -1.0}, InvalidArgument, "normalise: None, 'unit' or a norm above 0"),
        ({"normalise": float("inf")}, InvalidArgument, "norm above 0"),
    ],
)
def test_what_gives_no_direction_is_refused(session: LocalSession, changes: dict[str, Any], error: type, words: str):
    arguments: dict[str, Any] = {"positive": POSITIVE, "negative": NEGATIVE, "selector": "resid_post[1]"} | changes
    with pytest.raises(error, match=words):
        session.create_steering_vector("never", **arguments)
    assert "never" not in session.vectors.names()


def test_nan_is_no_direction(tmp_path: Path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[250] = float("nan")
    session = LocalSession(trace_model("broken", model, tiny_tokenizer()), store=tmp_path / "store")
    with pytest.raises(NotFinite, match=r"NaN or inf at resid_post\[1\] for positive\.1"):
        session.create_steering_vector("v", [[3, 4], [5, 250]], [[6]], "resid_post[1]")


def test_what_would_not_fit_into_memory_is_not_begun(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    class Room:
        available = 1000

    monkeypatch.setattr(contrast_module.psutil, "virtual_memory", Room)
    with pytest.raises(CannotFit, match="5 examples in 1 layers take 960 bytes and 1,000 are free"):
        session.create_steering_vector("v", POSITIVE, NEGATIVE, "resid_post[1]")
