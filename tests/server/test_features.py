"""Features over HTTP: the registry of autoencoders, the routes, and the features of recorded answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.envelope import PROGRESS_TYPE
from attribution.features.sources import embedded_registry
from server.settings import Settings
from tests.autoencoders import N_FEATURES, numpy_features, save_random
from tests.models import D_MODEL
from tests.server.support import HELLO, Served, error_of, plain, serve

REGISTRY = """
[[source]]
model = "{model}"
folder = "one"
name = "one"
descriptions = "said.jsonl"

[[source]]
model = "elsewhere/model"
folder = "one"

[[source]]
model = "{model}"
folder = "wide"
name = "wide"

[[source]]
model = "{model}"
folder = "one"
colour = "blue"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """A folder with a registry and its autoencoders."""
    root = tmp_path_factory.mktemp("features")
    save_random(root / "one")
    save_random(root / "two", "mlp_in[2]", "mlp_out[2]", n_features=60, seed=1)
    save_random(root / "wide", d_in=D_MODEL + 1, d_dec=D_MODEL + 1)
    (root / "said.jsonl").write_text('{"index": 3, "description": "three"}\nbroken\n')
    (root / "features.toml").write_text(REGISTRY.format(model=folders["qwen3"]))
    return root


@pytest.fixture(scope="module")
def one(home: Path, folders: dict[str, Path]) -> Iterator[Served]:
    """A server with one model and the registry."""
    with serve(home, model=str(folders["qwen3"]), features=home / "features.toml") as served:
        yield served


@pytest.fixture
def name(folders: dict[str, Path]) -> str:
    return str(folders["qwen3"])


def test_the_registry_is_shown_with_what_is_ready_what_waits_and_what_failed(one: Served, name: str):
    rows = one.http.get("/features").json()
    assert rows["count"] == len(rows["sources"]) == 4
    ready, *others = rows["sources"]
    assert (ready["status"], ready["name"], ready["model_id"]) == ("ready", "one", name)
    assert (ready["reads"], ready["writes"], ready["n_features"]) == ("resid_post[1]", "resid_post[1]", N_FEATURES)
    assert ready["descriptions"]["n_described"] == ready["descriptions"]["n_problems"] == 1
    assert "said.jsonl, line 2" in ready["descriptions"]["problems"][0]
    status = {row["status"]: row for row in others if row["status"] == "waiting"}["waiting"]
    assert (status["model_id"], status["reason"]) == ("elsewhere/model", None)
    failed = {row["name"]: row["reason"] for row in others if row["status"] == "failed"}
    assert "source 3 ('wide')" in failed["wide"]
    assert f"width {D_MODEL + 1}" in failed["wide"]
    assert "source 4 ('one')" in failed[None]
    assert "colour" in failed[None]
    for model, count in ((name, 3), ("elsewhere/model", 1), ("nobody/nothing", 0)):
        found = one.http.get("/features", params={"model_id": model}).json()
        assert [row["model_id"] for row in found["sources"]] == [model] * found["count"] == [model] * count


def test_a_registry_that_is_none_stops_the_server_in_one_line(home: Path):
    from attribution.errors import InvalidArgument
    from server.app import create_app

    (home / "broken.toml").write_text("[[source")
    for path, said in (("broken.toml", "cannot be read"), ("absent.toml", "cannot be read")):
        with pytest.raises(InvalidArgument, match=said):
            create_app(Settings(no_model=True, features=home / path, store_dir=home / "s", activations_dir=home / "r"))


def test_topk_takes_model_id_or_model_and_refuses_two_that_differ(one: Served, name: str):
    body = {"text": "Hello there", "k": 3}
    found = [one.post(body | named, "/features/topk").json() for named in ({}, {"model": name}, {"model_id": name})]
    assert found[0] == found[1] == found[2]
    assert (found[0]["model_id"], found[0]["layer"], found[0]["source"]) == (name, 1, "one")
    assert one.post(body | {"model": name, "model_id": name}, "/features/topk").status_code == 200
    refused = one.post(body | {"model": name, "model_id": "another"}, "/features/topk")
    assert (refused.status_code, error_of(refused)["param"]) == (422, "model_id")
    absent = one.post(body | {"model_id": "absent"}, "/features/topk")
    assert (absent.status_code, error_of(absent)["code"]) == (404, "model_not_found")
    assert one.post(body | {"model_id": 3}, "/features/topk").status_code == 422


def test_every_operation_takes_model_id_and_the_schema_shows_it_where_it_is_usual(one: Served, name: str):
    assert one.post({"model_id": name, "token_ids": [1, 2]}, "/interventions/lens").status_code == 200
    rows = {row["name"]: row["parameters"]["properties"] for row in one.http.get("/attribution").json()["operations"]}
    assert {"model", "model_id"} <= set(rows["features_topk"])
    assert "model_id" not in rows["lens"]


def test_an_autoencoder_is_loaded_described_and_let_go(one: Served, home: Path):
    made = one.post({"folder": str(home / "two"), "name": "two"}, "/features/load")
    assert made.status_code == 200, made.text
    assert made.json() | {"status": "ready", "reason": None} == one.http.get("/features/two").json()
    assert (made.json()["reads"], made.json()["writes"]) == ("mlp_in[2]", "mlp_out[2]")
    feature = one.http.get("/features/one/3", params={"top_k": 2}).json()
    assert feature["description"] == "three"
    assert len(feature["promoted"]) == len(feature["neighbours"]) == 2
    assert feature == one.post({"source": "one", "index": 3, "top_k": 2}, "/features/describe").json()
    assert one.http.delete("/features/two").json() == {"unloaded": True, "source": "two"}
    for method, path in (("get", "/features/two"), ("delete", "/features/two"), ("get", "/features/two/1")):
        gone = getattr(one.http, method)(path)
        assert (gone.status_code, error_of(gone)["code"]) == (404, "source_not_found")
    assert one.http.get(f"/features/one/{N_FEATURES}").status_code == 422
    assert one.http.get("/features/one/x").status_code == 400


def test_the_features_of_a_chat_answer_are_read_from_what_it_recorded(
    one: Served, home: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    saved = [{"name": "here", "selector": "resid_post[0:2]"}]
    answer = one.chat(name, max_tokens=4, temperature=0, ignore_eos=True, savepoints=saved, store_activations=True)
    run = one.run(answer)
    run_id, ids = run["run_id"], run["choices"][0]["token_ids"]
    monkeypatch.delattr("attribution.features.topk.forward")  # nothing is run again
    found = one.post({"run_id": run_id, "layer": 1, "k": 5}, "/features/topk").json()
    assert found["activations"] == "recorded"
    assert [token["token_id"] for token in found["tokens"]] == ids[:-1]  # the last was never fed
    rows = (
        plain("qwen3").model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states[2][0].detach()
    )
    expected = numpy_features(home / "one", rows)
    for token, row in zip(found["tokens"], expected, strict=True):
        for one_feature in token["features"]:
            assert one_feature["activation"] == pytest.approx(row[one_feature["index"]], rel=1e-4, abs=1e-5)
    generated = one.post({"run_id": run_id, "positions": "generated", "k": 5}, "/features/topk").json()
    assert same_features(generated["tokens"], found["tokens"][run["choices"][0]["prompt_tokens"] :])
    last = one.post({"run_id": run_id, "positions": "last", "k": 5}, "/features/topk").json()
    assert [token["position"] for token in last["tokens"]] == [run["choices"][0]["prompt_tokens"] - 1]


def same_features(tokens: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether two replies list the same tokens and features, but for rounding."""
    columns = []
    for listed in (tokens, others):
        features = [
            (token["position"], one["index"], one["activation"]) for token in listed for one in token["features"]
        ]
        columns.append(list(zip(*features, strict=True)))
    (at, indices, values), (their_at, their_indices, their_values) = columns
    assert values
    return (at, indices) == (their_at, their_indices) and values == pytest.approx(their_values, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("saved", "origin"),
    [
        ({"selector": "resid_pre[2]"}, "recorded"),  # what leaves layer 1
        ({"selector": "model.layers.1.output"}, "recorded"),
        ({"selector": "resid_post[*]"}, "recorded"),
        ({"selector": "resid_post[2]"}, "computed"),
        ({"selector": "resid_post[1]", "positions": "generated"}, "computed"),
        ({"selector": "resid_post[1]", "dtype": "float16"}, "computed"),
        ({"selector": "pattern[1]"}, "computed"),
    ],
)
def test_what_was_not_recorded_whole_is_computed_and_gives_the_same(
    one: Served, name: str, saved: dict[str, Any], origin: str
):
    answer = one.chat(
        name,
        max_tokens=3,
        temperature=0,
        ignore_eos=True,
        savepoints=[{"name": "here"} | saved],
        store_activations=True,
    )
    run = one.run(answer)
    found = one.post({"run_id": run["run_id"], "source": "one", "k": 4}, "/features/topk").json()
    assert found["activations"] == origin
    ids = run["choices"][0]["token_ids"][:-1]
    computed = one.post({"token_ids": ids, "source": "one", "k": 4}, "/features/topk").json()
    assert same_features(found["tokens"], computed["tokens"])


def test_a_steered_answer_has_the_features_that_it_had_or_none(one: Served, name: str):
    steered = [{"type": "ablate", "selector": "mlp_out[0]"}]
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True, "interventions": steered}
    options |= {"store_activations": True}
    kept = one.run(one.chat(name, savepoints=[{"name": "a", "selector": "resid_post[1]"}], **options))
    found = one.post({"run_id": kept["run_id"], "source": "one"}, "/features/topk").json()
    assert found["activations"] == "recorded"
    ids = kept["choices"][0]["token_ids"][:-1]
    plainly = one.post({"token_ids": ids, "source": "one"}, "/features/topk").json()
    assert [token["features"] for token in found["tokens"]] != [token["features"] for token in plainly["tokens"]]
    for selector in ("resid_post[0]", "resid_pre[2]"):
        lost = one.run(one.chat(name, savepoints=[{"name": "a", "selector": selector}], **options))
        refused = one.post({"run_id": lost["run_id"], "source": "one"}, "/features/topk")
        assert (refused.status_code, error_of(refused)["param"]) == (422, "run_id")
        assert "interventions" in error_of(refused)["message"]


def test_a_model_that_is_unloaded_leaves_its_autoencoders_waiting(home: Path, folders: dict[str, Path], name: str):
    with serve(home / "again", no_model=True, features=home / "features.toml") as served:
        served.http.post("/models/load", json={"model_id": name})
        assert served.post({"text": "a"}, "/features/topk").status_code == 200
        store = served.app.state.sightline.registry.features
        assert store.weights.used > 0
        served.http.post("/models/unload", json={"model_id": name})
        assert store.weights.used == 0
        assert {row["status"] for row in served.http.get("/features").json()["sources"]} == {"waiting", "failed"}
        gone = served.post({"text": "a"}, "/features/topk")
        assert (gone.status_code, error_of(gone)["code"]) == (404, "model_not_found")
        served.http.post("/models/load", json={"model_id": name})
        assert served.http.get("/features/one").json()["status"] == "ready"


@pytest.mark.parametrize("header", [{"X-Api-Key": "secret"}, {"Authorization": "Bearer secret"}])
def test_a_server_with_a_key_asks_for_it(home: Path, header: dict[str, str]):
    with serve(home / "locked", no_model=True, api_key="secret", features=home / "features.toml") as locked:
        body = {"text": "a", "model_id": "absent"}
        refused = locked.http.post("/features/topk", json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert locked.http.post("/features/topk", json=body, headers={"X-Api-Key": "wrong"}).status_code == 401
        assert locked.http.post("/features/topk", json=body, headers=header).status_code == 404
        assert locked.http.get("/features").status_code == 401
        assert locked.http.get("/features", headers=header).status_code == 200


def test_the_embedded_model_finds_the_autoencoders_that_come_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "shipped" / "features.toml"
    monkeypatch.setattr("attribution.features.sources.embedded_registry", lambda: path)
    with serve(tmp_path / "none") as served:
        assert served.http.get("/features").json() == {"sources": [], "count": 0}
    path.parent.mkdir()
    path.write_text("[[source")
    with serve(tmp_path / "broken") as served:
        (row,) = served.http.get("/features").json()["sources"]
        assert (row["model_id"], row["status"]) == ("demo", "failed")
    save_random(path.parent / "sae", "resid_post[2]", d_in=128, d_dec=128, name="demo")
    path.write_text('[[source]]\nmodel = "demo"\nfolder = "sae"\n')
    with serve(tmp_path / "some") as served:
        assert [row["name"] for row in served.http.get("/features").json()["sources"]] == ["2-resid_post"]
        assert served.post({"messages": HELLO}, "/features/topk").json()["source"] == "2-resid_post"


def test_the_registry_of_the_embedded_model_lies_in_the_package():
    assert embedded_registry().parent.name == "demo_features"
    assert embedded_registry().parent.parent.name == "puzzles"


def test_progress_is_told_between_batches(one: Served):
    texts = ["the rest in a while " * 12] * 40
    with one.http.stream(
        "POST",
        "/features/topk",
        json={"text": texts, "k": 1, "positions": "last"},
        headers={"Accept": PROGRESS_TYPE},
    ) as answer:
        assert answer.status_code == 200
        body = b"".join(answer.iter_bytes())
    lines = [json.loads(line) for line in body.split(b"\n") if line.startswith(b'{"progress"')]
    assert [line["progress"]["done"] for line in lines][-1] == 40
    assert len(lines) == 3  # of 16 rows at most
