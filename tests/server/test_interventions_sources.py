"""Interventions that name what is stored: steering vectors by name, and means over the samples of a dataset."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.steering import SteeringVector
from attribution.stored import Identity
from tests.attribution.plain import watch
from tests.models import D_HEAD, D_MODEL, N_HEADS
from tests.server.steering_cases import Case, vector
from tests.server.steering_oracle import Edit
from tests.server.support import Served, encode, error_of, plain
from tests.server.test_interventions import ask, check

TEXTS = ["Hello there", "What a day, is it not", "re in the"]


@pytest.fixture(autouse=True, scope="module")
def _no_vector_is_left(house: Served) -> Iterator[None]:
    yield
    vectors = house.loaded(house.names["qwen3"]).session.vectors
    for name in vectors.names():
        vectors.delete(name)


def keep(house: Served, model: str, name: str, tensor: Tensor, selector: str, layers: tuple[int, ...]) -> None:
    """Store a steering vector of a model."""
    loaded = house.loaded(model)
    provenance = {"model": Identity.of(loaded.model).record()}
    stacked = len(layers) > 1
    made = SteeringVector(name, tensor, selector, layers, stacked, provenance, tuple({} for _ in layers))
    loaded.session.vectors.write(made, overwrite=True)


def test_a_steering_vector_is_used_by_its_name_at_any_layer(house: Served, qwen: str):
    wide = vector(D_MODEL, 8)
    keep(house, qwen, "mood", wide, "resid_post[0]", (0,))
    change = {"type": "add", "selector": "resid_post[1:]", "name": "mood", "strength": 3}
    answer = ask(house, qwen, [change])
    check(house, answer, "qwen3", Case([], [Edit("resid_post", (1, 2), lambda x: x + 3 * wide)]))
    assert answer.choices[0].message.interventions[0]["name"] == "mood"


def test_a_vector_of_several_layers_gives_each_layer_its_own(house: Served, qwen: str):
    both = torch.stack([vector(D_MODEL, 1), vector(D_MODEL, 2)])
    keep(house, qwen, "layered", both, "resid_pre[1:]", (1, 2))
    change = {"type": "project_out", "selector": "resid_pre[1:]", "name": "layered"}
    units = both / both.norm(dim=-1, keepdim=True)
    edits = [
        Edit("resid_pre", (layer,), lambda x, u=unit: x - (x @ u)[:, None] * u)
        for layer, unit in zip((1, 2), units, strict=True)
    ]
    check(house, ask(house, qwen, [change]), "qwen3", Case([], edits))
    refused = house.post(_body(qwen, change | {"selector": "resid_pre[0]"}))
    assert refused.status_code == 422
    assert error_of(refused)["param"] == "interventions.0.name"
    assert "[1, 2]" in error_of(refused)["message"]


def test_a_vector_at_heads_acts_as_one_or_head_by_head(house: Served, qwen: str):
    heads = vector(N_HEADS * D_HEAD, 3).view(N_HEADS, D_HEAD)
    keep(house, qwen, "heads", heads, "z[1]", (1,))
    flat = heads.flatten() / heads.norm()
    whole = {"type": "project_out", "selector": "z[1]", "name": "heads"}
    as_one = Edit("z", (1,), lambda x: x - (x @ flat)[:, None] * flat)
    check(house, ask(house, qwen, [whole]), "qwen3", Case([], [as_one]))

    def by_head(head: int) -> Edit:
        unit = heads[head] / heads[head].norm()
        return Edit("z", (1,), lambda x: x - (x @ unit)[..., None] * unit, heads=(head,))

    check(house, ask(house, qwen, [whole | {"heads": [4, 2]}]), "qwen3", Case([], [by_head(4), by_head(2)]))


def test_a_vector_that_is_not_there_or_does_not_fit_is_refused(house: Served, qwen: str):
    keep(house, qwen, "narrow", vector(7, 1), "model.layers[0].mlp.gate_proj.output", ())
    change = {"type": "add", "selector": "resid_post[1]"}
    absent = house.post(_body(qwen, change | {"name": "nobody"}))
    assert (absent.status_code, error_of(absent)["code"]) == (404, "vector_not_found")
    assert error_of(absent)["param"] == "interventions.0.name"
    narrow = house.post(_body(qwen, change | {"name": "narrow"}))
    assert (narrow.status_code, error_of(narrow)["code"]) == (409, "vector_mismatch")
    assert "[7]" in error_of(narrow)["message"]
    other = house.names["llama"]  # shares the folder, not the weights
    keep(house, qwen, "mood-of-another", vector(D_MODEL, 8), "resid_post[0]", (0,))
    foreign = house.post(_body(other, change | {"name": "mood-of-another"}))
    assert (foreign.status_code, error_of(foreign)["code"]) == (409, "vector_mismatch")


def _body(model: str, *interventions: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello there"}]
    return {"model": model, "messages": messages, "max_tokens": 2, "interventions": list(interventions)}


@pytest.fixture(scope="module")
def dataset(house: Served) -> Iterator[str]:
    """A dataset of three stored samples, for two of the models."""
    for family in ("qwen3", "gemma2"):
        for number, text in enumerate(TEXTS):
            body = {"model": house.names[family], "dataset_id": f"mean-{family}", "sample_id": number, "prompt": text}
            assert house.post(body, "/attribution/forward").status_code == 200
    yield "mean"
    for family in ("qwen3", "gemma2"):
        body = {"model": house.names[family], "dataset_id": f"mean-{family}"}
        assert house.post(body, "/attribution/clear_cache").status_code == 200


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize(
    ("point", "selector", "heads"),
    [
        ("resid_pre", "resid_pre[1:]", None),
        ("resid_post", "resid_post[1:]", None),
        ("mlp_out", "mlp_out[1:]", None),
        ("attn_out", "attn_out[1:]", None),
        ("z", "z[1:]", None),
        ("z", "z[1:]", [5, 1]),
    ],
)
def test_the_mean_is_that_over_all_positions_of_all_samples(
    house: Served, dataset: str, family: str, point: str, selector: str, heads: list[int] | None
):
    model = house.names[family]
    seen = [watch(plain(family), encode(text)) for text in TEXTS]
    rows = torch.cat([one[point][:, 0] for one in seen], dim=1).double()  # [layer, position of any sample, …]
    means = rows.mean(1).float()
    change = {"type": "ablate", "selector": selector, "mode": "mean", "dataset_id": f"{dataset}-{family}"}

    def put(layer: int) -> list[Edit]:
        mean = means[layer].flatten()
        if heads is None:
            return [Edit(point, (layer,), lambda x: mean.expand_as(x))]
        return [Edit(point, (layer,), lambda x, h=h: means[layer, h].expand_as(x), heads=(h,)) for h in heads]

    answer = ask(house, model, [change if heads is None else change | {"heads": heads}])
    check(house, answer, family, Case([], [edit for layer in (1, 2) for edit in put(layer)]))


def test_a_mean_that_cannot_be_told_is_refused(house: Served, qwen: str, dataset: str):
    change = {"type": "ablate", "mode": "mean", "selector": "q[1]", "dataset_id": f"{dataset}-qwen3"}
    unknown = house.post(_body(qwen, change))
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "interventions.0.dataset_id")
    assert "resid_pre, resid_post, mlp_out, z, attn_out" in error_of(unknown)["message"]
    absent = house.post(_body(qwen, change | {"selector": "z[1]", "dataset_id": "nothing"}))
    assert (absent.status_code, error_of(absent)["code"]) == (404, "dataset_not_found")
    foreign = house.post(_body(qwen, change | {"selector": "z[1]", "dataset_id": f"{dataset}-gemma2"}))
    assert (foreign.status_code, error_of(foreign)["code"]) == (409, "sample_mismatch")
