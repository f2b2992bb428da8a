"""Steering by feature in chats: greedy text and logits, against hooks on a plain transformers model."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.features.places import Place
from attribution.features.writing import write_autoencoder
from tests.attribution.features.plain_autoencoder import by_loops
from tests.attribution.plain import distance, watch
from tests.models import FAMILIES
from tests.server import feature_cases
from tests.server.feature_cases import FEATURE, SOURCES, Steered, cases, source, write_source
from tests.server.steering_oracle import steered_logits
from tests.server.support import HELLO, HELLO_TEXT, Served, encode, error_of, plain, serve, wait_until

PROMPT = encode(HELLO_TEXT)
TOLERANCE = 3e-5
TOKENS = 6


def load(served: Served, family: str, folder: Path) -> None:
    """Give a server all sources of a family."""
    for name in SOURCES:
        path = write_source(family, name, folder / family / name)
        asked = {"model": served.names[family], "folder": str(path), "name": name}
        if name == "resid":
            (folder / "said.jsonl").write_text(f'{{"index": {FEATURE}, "description": "what is said"}}\n')
            asked["descriptions"] = str(folder / "said.jsonl")
        answer = served.http.post("/features/load", json=asked)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def steered(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that feeds prompts in pieces, with a model of each family and its sources."""
    folder = tmp_path_factory.mktemp("steered")
    with serve(folder, no_model=True, prefill_chunk=96, max_batch=24) as served:
        yield _with_sources(served, folders, folder, FAMILIES)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on the reference path."""
    folder = tmp_path_factory.mktemp("alone")
    with serve(folder, no_model=True, max_batch=1) as served:
        yield _with_sources(served, folders, folder, ("qwen3", "gemma2", "gpt2"))


def _with_sources(served: Served, folders: dict[str, Path], folder: Path, families: tuple[str, ...]) -> Served:
    for family in families:
        assert served.post({"model_id": str(folders[family])}, "/models/load").status_code == 200
        served.names[family] = str(folders[family])
        load(served, family, folder)
    return served


def ask(served: Served, model: str, interventions: list[dict[str, Any]], **body: Any) -> Any:
    savepoints = [{"name": "logits", "selector": "logits"}]
    extra = {"interventions": interventions} if interventions else {}
    options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "savepoints": savepoints}
    return served.chat(model, **(options | extra | body))


def check(served: Served, answer: Any, family: str, case: Steered) -> None:
    tokens = served.generated(answer)
    assert len(tokens) == TOKENS
    model = plain(family)
    with case.open(model):
        expected = steered_logits(model, PROMPT + tokens[:-1], case.edits)[len(PROMPT) - 1 :]
    assert tokens == expected.argmax(-1).tolist()
    found = torch.load(answer.choices[0].message.activation_files["logits"], weights_only=True)
    assert distance(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_each_row_what_hooks_on_a_plain_model_give(steered: Served, family: str) -> None:
    asked, model = cases(family), steered.names[family]
    calls = [lambda one=one: ask(steered, model, one.interventions) for one in asked.values()]
    texts = set()
    for (name, case), answer in zip(asked.items(), steered.together(model, calls), strict=True):
        assert steered.run(answer)["choices"][0]["largest_batch"] > 3, name
        check(steered, answer, family, case)
        texts.add(tuple(steered.generated(answer)))
    assert len(texts) > len(asked) / 2, "interventions that change nothing show nothing"


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_the_reference_path_gives_the_same(alone: Served, family: str) -> None:
    for case in cases(family).values():
        check(alone, ask(alone, alone.names[family], case.interventions), family, case)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_neighbours_keep_every_bit(steered: Served, family: str) -> None:
    model = steered.names[family]
    transcoded = cases(family)["many"].interventions
    worker, runs = steered.loaded(model).worker, []
    # the same batch in the same order, once with and once without the interventions of its other row
    for interventions in ([], transcoded):
        with ThreadPoolExecutor(2) as pool:
            with steered.held(model):
                futures = []
                for waiting, these in enumerate(([], interventions), 1):
                    futures.append(pool.submit(ask, steered, model, these))
                    wait_until(lambda waiting=waiting: worker.queue_length == waiting)
            files = [one.result(120).choices[0].message.activation_files["logits"] for one in futures]
        runs.append([torch.load(file, weights_only=True) for file in files])
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][1], runs[1][1])


# --- the receipt


def test_the_receipt_says_what_was_found_before(steered: Served) -> None:
    family, one = "llama", source("llama", "resid")
    request = {"type": "feature", "source": "resid", "index": FEATURE, "operation": "clamp", "value": 8}
    answer = ask(steered, steered.names[family], [request | {"positions": "prompt"}])
    (receipt,) = answer.choices[0].message.interventions
    found = receipt.pop("activation_before")
    assert receipt == {
        "type": "feature",
        "selector": "resid_post[1]",
        "source": "resid",
        "index": FEATURE,
        "operation": "clamp",
        "description": "what is said",
        "steps": receipt["steps"],
        "positions": len(PROMPT),
        "ranges": [[0, len(PROMPT), 1]],
        "layers": [1],
    }
    rows = watch(plain(family), PROMPT)["resid_post"][1, 0]
    expected = [by_loops(one, row.tolist())[1][FEATURE] for row in rows]
    assert found["active_positions"] == sum(value > 0 for value in expected)
    assert 0 < found["active_positions"] < len(PROMPT)
    said = (found["mean"], found["min"], found["max"])
    assert said == pytest.approx((sum(expected) / len(expected), min(expected), max(expected)), rel=1e-4)


def test_an_added_feature_has_no_activation_and_a_clamp_that_was_never_made_none(steered: Served) -> None:
    add = {"type": "feature", "layer": 1, "source": "transcoder", "index": 3}
    late = {"start": len(PROMPT) + 20}
    never = {"type": "feature", "source": "mid", "index": 3, "operation": "clamp", "value": 1, "positions": late}
    model = steered.names["qwen2"]
    text = ask(steered, model, [add]).choices[0].message.content
    answer = ask(steered, model, [add, never], max_tokens=40, stop=[text[:1]])  # which ends it at once
    first, second = answer.choices[0].message.interventions
    assert (first["operation"], first["description"], first["steps"] > 0) == ("add", None, True)
    assert "activation_before" not in first
    assert (second["steps"], second["activation_before"]) == (0, None)


def test_choices_and_the_baseline_each_have_their_own_numbers(steered: Served) -> None:
    family = "qwen3"
    request = {"type": "feature", "source": "transcoder", "index": FEATURE, "operation": "clamp", "value": 9}
    answer = ask(steered, steered.names[family], [request], n=2, temperature=1.0, seed=3, baseline=True)
    record = steered.run(answer)["choices"]
    for choice, kept in zip(answer.choices, record, strict=True):
        (receipt,) = choice.message.interventions
        assert receipt["positions"] == len(PROMPT) + TOKENS - 1
        assert math.isfinite(receipt["activation_before"]["mean"])
        assert len(choice.baseline["tokens"]) == TOKENS
        assert kept["token_ids"][len(PROMPT) :] != choice.baseline["token_ids"]
    one, other = (choice.message.interventions[0]["activation_before"]["mean"] for choice in answer.choices)
    assert one != other


# --- refusals

OK = {"type": "feature", "source": "resid", "index": FEATURE}
CLAMP = OK | {"operation": "clamp", "value": 2}


@pytest.mark.parametrize(
    ("intervention", "status", "field", "said"),
    [
        ({"type": "feature", "source": "resid"}, 400, "index", "'feature' needs 'index'"),
        (OK | {"source": "none"}, 404, "source", "no autoencoder named 'none'"),
        ({"type": "feature", "layer": 1, "index": 0}, 422, "source", "several autoencoders"),
        (OK | {"layer": 0}, 404, "source", "named 'resid' and at layer 0"),
        ({"type": "feature", "layer": 9, "index": 0}, 404, "layer", "at layer 9"),
        (OK | {"index": 23}, 422, "index", "index is 23; the features of 'resid' are 0 to 22"),
        (OK | {"index": -1}, 422, "index", "index is -1"),
        (OK | {"index": "7"}, 400, "index", "7"),
        (OK | {"index": 1.5}, 400, "index", "1.5"),
        (OK | {"index": True}, 400, "index", "True"),
        (OK | {"operation": "set"}, 400, "operation", "'add' or 'clamp'"),
        (OK | {"value": 2}, 400, "value", "operation 'add' takes no 'value'; it takes 'strength'"),
        (OK | {"strength": "much"}, 400, "strength", "much"),
        (CLAMP | {"strength": 1}, 400, "strength", "operation 'clamp' takes no 'strength'; it takes 'value'"),
        (CLAMP | {"normalise": "both"}, 400, "normalise", "operation 'clamp' takes no 'normalise'"),
        (OK | {"operation": "clamp"}, 400, "value", "operation 'clamp' needs 'value'"),
        (CLAMP | {"value": [2.0]}, 400, "value", "a number; found a list"),
        (CLAMP | {"value": -0.5}, 400, "value", "value is -0.5; an activation is never below 0"),
        (CLAMP | {"value": "2"}, 400, "value", "a finite number"),
        (CLAMP | {"value": [2.0, "x"]}, 400, "value", "a list of them, is expected; 'x' is none"),
        (OK | {"selector": "resid_post[1]"}, 400, "selector", "'feature' takes no 'selector'"),
        (OK | {"heads": [1]}, 400, "heads", "'feature' takes no 'heads'"),
        (OK | {"positions": {"start": 50, "stop": 60}}, 400, "positions", "at most 25 positions"),
        (OK | {"type": "knockout"}, 400, "source", "'knockout' takes no 'source'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused_before_a_token(
    steered: Served, intervention: dict[str, Any], status: int, field: str, said: str
) -> None:
    model = steered.names["qwen3"]
    before = steered.steps(model)
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "interventions": [OK, intervention]}
    answer = steered.post(body)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, f"interventions.1.{field}"), error
    assert said in error["message"]
    assert steered.steps(model) == before


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(steered: Served, text: str) -> None:
    model = steered.names["qwen3"]
    for change in ('"strength": X', '"operation": "clamp", "value": X'):
        sent = f'{{"type": "feature", "source": "resid", "index": 1, {change.replace("X", text)}}}'
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "a"}}], "interventions": [{sent}]}}'
        answer = steered.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text


def test_an_autoencoder_of_another_model_is_not_taken(house: Served, steered: Served) -> None:
    body = {"model": house.names["llama"], "messages": HELLO, "max_tokens": 4, "interventions": [OK]}
    error = error_of(house.post(body))
    assert (error["code"], error["param"]) == ("source_not_found", "interventions.0.source")


def test_a_feature_without_a_direction_is_not_added_relatively(steered: Served, tmp_path: Path) -> None:
    one = source("qwen3", "resid")
    one.W_dec[5] = 0
    write_autoencoder(tmp_path / "dead", one, reads=Place("resid_post", 1))
    model = steered.names["qwen3"]
    asked = {"model": model, "folder": str(tmp_path / "dead"), "name": "dead"}
    assert steered.http.post("/features/load", json=asked).status_code == 200
    dead = {"type": "feature", "source": "dead", "index": 5, "normalise": "relative"}
    answer = steered.post({"model": model, "messages": HELLO, "max_tokens": 4, "interventions": [dead]})
    assert "writes nothing and has no direction" in error_of(answer)["message"]
    assert steered.http.delete("/features/dead", params={"model_id": model}).status_code == 200


def test_what_is_read_behind_where_it_is_written_cannot_be_clamped(steered: Served, tmp_path: Path) -> None:
    one = source("qwen3", "transcoder")
    write_autoencoder(tmp_path / "back", one, reads=Place("resid_post", 1), writes=Place("mlp_out", 1))
    model = steered.names["qwen3"]
    asked = {"model": model, "folder": str(tmp_path / "back"), "name": "back"}
    assert steered.http.post("/features/load", json=asked).status_code == 200
    back = {"type": "feature", "source": "back", "index": 5, "operation": "clamp", "value": 1}
    answer = steered.post({"model": model, "messages": HELLO, "max_tokens": 4, "interventions": [back]})
    assert "which the model reaches after mlp_out[1]" in error_of(answer)["message"]
    assert steered.http.delete("/features/back", params={"model_id": model}).status_code == 200


def test_every_source_of_the_cases_is_used() -> None:
    used = {one.get("source") for case in feature_cases.cases("llama").values() for one in case.interventions}
    assert used - {None} == set(SOURCES)


@pytest.mark.parametrize(
    ("name", "selector"), [("resid", "resid_post[1]"), ("heads", "z[1]"), ("transcoder", "mlp_out[1]")]
)
def test_a_feature_kept_as_a_steering_vector_steers_as_the_feature_does(
    steered: Served, name: str, selector: str
) -> None:
    model = steered.names["llama"]
    asked = {"model": model, "name": f"kept-{name}", "source": name, "index": FEATURE, "overwrite": True}
    answer = steered.http.post("/steering/features", json=asked)
    assert answer.status_code == 200, answer.text
    kept = answer.json()
    assert (kept["selector"], kept["provenance"]["source"], kept["provenance"]["index"]) == (selector, name, FEATURE)
    assert kept["norms"] == pytest.approx([float(source("llama", name).W_dec[FEATURE].norm())], rel=1e-6)
    by_name = {"type": "add", "selector": selector, "name": f"kept-{name}", "strength": 3}
    by_feature = {"type": "feature", "source": name, "index": FEATURE, "strength": 3}
    files = [ask(steered, model, [one]).choices[0].message.activation_files["logits"] for one in (by_name, by_feature)]
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert distance(first, second) < 1e-6


def test_others_are_served_while_the_store_of_autoencoders_is_busy(steered: Served) -> None:
    store = steered.app.state.sightline.registry.features
    body = {"model": steered.names["qwen3"], "messages": HELLO, "max_tokens": 1, "interventions": [OK]}
    with ThreadPoolExecutor(2) as pool:
        with store._lock:  # as while descriptions are read
            steering = pool.submit(steered.post, body)
            time.sleep(0.5)
            assert pool.submit(steered.http.get, "/v1/models").result(timeout=10).status_code == 200
            assert not steering.done()
        assert steering.result(timeout=60).status_code == 200
