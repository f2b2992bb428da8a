"""`POST /compare`: models that are loaded and models that are not, side by side."""

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from attribution.envelope import PROGRESS_TYPE
from attribution.errors import ModelNotFound
from attribution.session import LocalSession
from clients import AsyncModelClient, ModelClient
from server import registry as registry_module
from tests.clients.serving import over_socket
from tests.models import save_tiny
from tests.server.support import Served, serve, wait_until

TEXTS, TERMS = ["the rest is in a while", "ä 漢 the other"], ["the", "absent"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(save_tiny(family, root / family)) for family in ("llama", "gpt2")]


@pytest.fixture
def served(tmp_path: Path, folders: list[str]) -> Iterator[Served]:
    """A server on which the first model is loaded, and the second is not."""
    with serve(tmp_path, no_model=True) as made:
        assert made.post({"model_id": folders[0]}, "/models/load").status_code == 200
        yield made


def names(served: Served) -> list[str]:
    return served.http.get("/health").json()["loaded_models"]


def test_what_was_loaded_stays_and_what_was_not_is_gone(served: Served, folders: list[str], tmp_path: Path):
    answer = served.post({"models": folders, "sentences": TEXTS, "domain_terms": TERMS}, "/compare")
    assert answer.status_code == 200, answer.text
    assert names(served) == folders[:1]
    found = answer.json()
    assert found == LocalSession(store=tmp_path / "local").compare(folders, TEXTS, TERMS)
    assert not [thread for thread in threading.enumerate() if thread.name == f"model-{folders[1]}"]


def test_a_client_has_the_same_with_progress_and_its_model_stays_out_of_it(
    served: Served, folders: list[str], tmp_path: Path
):
    with ModelClient(http_client=served.http, model=folders[0]) as client:
        found = client.compare(folders, TEXTS, TERMS)
        assert found == client.compare(folders, TEXTS, TERMS, show_progress=False)
        with pytest.raises(ModelNotFound, match="no such model"):
            client.compare(["nope"], TEXTS)
    assert found == LocalSession(store=tmp_path / "local").compare(folders, TEXTS, TERMS)


def test_an_async_client_too(tmp_path: Path, folders: list[str]):
    async def compared(url: str) -> Any:
        async with AsyncModelClient(url) as client:
            return await client.compare(folders, TEXTS, TERMS)

    with over_socket(tmp_path) as (url, _):
        found = asyncio.run(compared(url))
    assert found == LocalSession(store=tmp_path / "local").compare(folders, TEXTS, TERMS)


def test_the_lines_of_progress_count_over_all_models(served: Served, folders: list[str]):
    headers = {"Accept": PROGRESS_TYPE}
    answer = served.http.post("/compare", json={"models": folders, "sentences": TEXTS}, headers=headers)
    lines = answer.content.split(b"\n")
    assert lines[0] == b'{"progress": {"done": 0, "total": 4}}'
    assert b'{"progress": {"done": 4, "total": 4}}' in lines


def test_a_model_that_fails_is_told_in_its_row(served: Served, folders: list[str], tmp_path: Path):
    broken = save_tiny("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    found = served.post({"models": [str(broken), folders[0]], "sentences": TEXTS}, "/compare").json()
    assert [row["error"] and row["error"]["code"] for row in found["models"]] == ["model_load_failed", None]
    answer = served.post({"models": [str(broken)], "sentences": TEXTS}, "/compare")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_load_failed")
    assert names(served) == folders[:1]


def test_nothing_of_a_guest_stays_in_memory(served: Served, folders: list[str], monkeypatch: pytest.MonkeyPatch):
    plain, made = registry_module.load, []

    def noted(spec: Any) -> Any:
        model = plain(spec)
        made.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(registry_module, "load", noted)
    served.post({"models": folders[1:], "sentences": TEXTS}, "/compare").raise_for_status()
    served.post({"models": folders[1:], "sentences": ["a b c " * 300]}, "/compare")
    assert [ref() for ref in made] == [None, None]


def test_an_unknown_model_fails_all_before_anything_is_loaded(
    served: Served, folders: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry_module, "load", None)
    answer = served.post({"models": [folders[1], "nope"], "sentences": TEXTS}, "/compare")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "models")


def test_a_guest_is_found_by_no_request_and_the_only_model_stays_the_only_one(
    served: Served, folders: list[str], monkeypatch: pytest.MonkeyPatch
):
    entered, release = threading.Event(), threading.Event()
    plain = registry_module.load

    def slow(spec: Any) -> Any:
        model = plain(spec)
        entered.set()
        release.wait(60)
        return model

    monkeypatch.setattr(registry_module, "load", slow)
    answers: list[Any] = []
    call = threading.Thread(
        target=lambda: answers.append(served.post({"models": [folders[1]], "sentences": TEXTS}, "/compare"))
    )
    call.start()
    try:
        assert entered.wait(60)
        assert names(served) == folders[:1]
        assert served.post({"sentences": TEXTS}, "/compare/measure").json()["model_id"] == folders[0]
        missing = served.post({"model": folders[1], "sentences": TEXTS}, "/compare/measure")
        assert missing.json()["error"]["code"] == "model_not_found"
    finally:
        release.set()
        call.join(60)
    assert answers[0].status_code == 200


def test_two_comparisons_have_their_guests_one_after_the_other(
    served: Served, folders: list[str], monkeypatch: pytest.MonkeyPatch
):
    plain, there, most = registry_module.load, [0], [0]
    stop = registry_module.ModelWorker.stop

    def counted(spec: Any) -> Any:
        there[0] += 1
        most[0] = max(most[0], there[0])
        time.sleep(0.2)
        return plain(spec)

    def stopped(worker: Any) -> None:
        stop(worker)
        there[0] -= 1

    monkeypatch.setattr(registry_module, "load", counted)
    monkeypatch.setattr(registry_module.ModelWorker, "stop", stopped)
    codes: list[int] = []
    body = {"models": [folders[1]], "sentences": TEXTS}
    calls = [threading.Thread(target=lambda: codes.append(served.post(body, "/compare").status_code)) for _ in "ab"]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)
    assert (codes, most, there) == ([200, 200], [1], [0])


@pytest.mark.parametrize("accept", ["application/json", None])
def test_a_client_that_leaves_ends_the_work_and_frees_the_place(
    folders: list[str], tmp_path: Path, accept: str | None, monkeypatch: pytest.MonkeyPatch
):
    plain, entered = registry_module.load, threading.Event()

    def slow(spec: Any) -> Any:
        entered.set()
        time.sleep(0.5)
        return plain(spec)

    monkeypatch.setattr(registry_module, "load", slow)
    with over_socket(tmp_path) as (url, app):
        body = {"models": [folders[1]], "sentences": TEXTS}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/compare", json=body, headers={"Accept": accept or PROGRESS_TYPE}, timeout=0.3)
        assert entered.wait(10)
        registry = app.state.sightline.registry
        wait_until(lambda: not registry._guests.locked())
        assert not [thread for thread in threading.enumerate() if thread.name == f"model-{folders[1]}"]
        monkeypatch.setattr(registry_module, "load", plain)
        assert httpx.post(f"{url}/compare", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"models": []}, "models"),
        ({"models": ["demo", "demo"]}, "models"),
        ({"sentences": []}, "sentences"),
        ({"model": "demo"}, "model"),
        ({"show_progress": True}, "show_progress"),
    ],
)
def test_what_is_wrong_is_refused(served: Served, body: dict[str, Any], param: str):
    answer = served.post({"models": ["demo"], "sentences": ["a"]} | body, "/compare")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_the_key_is_asked_for(tmp_path: Path):
    with serve(tmp_path, no_model=True, api_key="secret") as served:
        body = {"models": ["demo"], "sentences": ["K B"]}
        assert served.http.post("/compare", json=body).status_code == 401
        assert served.http.post("/compare", json=body, headers={"X-Api-Key": "secret"}).status_code == 200


def test_the_openapi_page_has_it(served: Served):
    schema = served.http.get("/openapi.json").json()["paths"]["/compare"]["post"]
    properties = schema["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"models", "sentences", "domain_terms"} <= set(properties)
    assert not {"model", "show_progress"} & set(properties)
    listed = {one["path"] for one in served.http.get("/attribution").json()["operations"]}
    assert {"/compare", "/compare/measure"} <= listed
