"""What stands around every request: the key, its id, the log, the metrics; and what anyone may see."""

import json
import logging
import re
import secrets
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

import server.routes.openai
from server import logs
from server.settings import Settings
from tests.server.support import HELLO, Served, error_of, serve

KEY = "key-123"


@pytest.fixture(scope="module")
def locked(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """A server that asks for a key."""
    model = str(folders["gpt2"])
    with serve(tmp_path_factory.mktemp("locked"), key=KEY, model=model, api_key=KEY) as served:
        served.names["gpt2"] = model
        yield served


def _bearer(key: str) -> dict[str, Any]:
    return {"Authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (_bearer(KEY), 200),
        ({"Authorization": b"bearer " + KEY.encode()}, 200),  # the scheme's name has no case
        ({"X-Api-Key": KEY.encode()}, 200),
        ({"X-Api-Key": KEY.encode()} | _bearer("what the SDK sends when it must send something"), 200),
        ({}, 401),
        (_bearer("wrong"), 401),
        (_bearer(""), 401),
        (_bearer(KEY[:-1]), 401),
        (_bearer(KEY + "x"), 401),
        ({"Authorization": KEY.encode()}, 401),
        ({"Authorization": b"Basic " + KEY.encode()}, 401),
        ({"X-Api-Key": b"wrong"}, 401),
        ({"X-Api-Key": b""}, 401),
        ({"X-Api-Key": b"wrong"} | _bearer(KEY), 401),
        ({"Api-Key": KEY.encode()}, 401),
    ],
    ids=str,
)
def test_the_key_opens_and_nothing_else_does(locked: Served, headers: dict[str, Any], status: int):
    answer = locked.http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 401:
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        assert KEY not in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("POST", "/models/load"),
        ("POST", "/models/unload"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/runs"),
        ("GET", "/runs/" + "0" * 32),
        ("GET", "/runs/" + "0" * 32 + "/0/x"),
        ("DELETE", "/runs/" + "0" * 32),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/redoc"),
        ("GET", "/nope"),
        ("GET", "//health"),
        ("GET", "/health/../runs"),
    ],
)
def test_everything_but_health_asks_for_the_key(locked: Served, method: str, path: str):
    assert locked.http.request(method, path).status_code == 401


def test_every_route_is_among_those(locked: Served):
    """A route that is added without a line above fails here."""
    paths = {getattr(route, "path", "") for route in locked.http.app.routes}  # type: ignore[attr-defined]
    known = {"/health", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"}
    known |= {"/models", "/models/load", "/models/unload", "/v1/models", "/v1/models/{name:path}"}
    known |= {"/v1/chat/completions", "/v1/completions", "/runs", "/runs/{run_id}", "/runs/{run_id}/{choice}/{name}"}
    assert {path for path in paths if path} <= known


def test_health_is_open(locked: Served):
    assert locked.http.get("/health").status_code == 200


def test_a_key_is_checked_before_a_body_is_read(locked: Served):
    answer = locked.http.post("/v1/chat/completions", content=b"{broken", headers={"Content-Type": "application/json"})
    assert answer.status_code == 401


def test_the_sdk_with_the_key_is_served_and_with_another_is_not(locked: Served):
    sdk = OpenAI(base_url="http://testserver/v1", api_key="open", http_client=locked.http, max_retries=0)
    ours = OpenAI(
        base_url="http://testserver/v1",
        api_key="unused",
        http_client=locked.http,
        default_headers={"X-Api-Key": KEY},
        max_retries=0,
    )
    assert ours.chat.completions.create(model=locked.names["gpt2"], messages=HELLO, max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        sdk.chat.completions.create(model=locked.names["gpt2"], messages=HELLO, max_tokens=1)
    assert caught.value.code == "invalid_api_key"


def test_keys_are_compared_in_constant_time(locked: Served, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[bytes, bytes]] = []

    def spy(given: bytes, expected: bytes) -> bool:
        seen.append((given, expected))
        return False

    monkeypatch.setattr(secrets, "compare_digest", spy)
    assert locked.http.get("/v1/models", headers=_bearer("guess")).status_code == 401
    assert seen == [(b"guess", KEY.encode())]


def test_the_key_is_nowhere_to_be_seen(locked: Served):
    for path in ("/health", "/metrics", "/openapi.json", "/models", "/runs"):
        assert KEY not in locked.http.get(path, headers=_bearer(KEY)).text


def test_a_key_may_have_any_characters(tmp_path: Path):
    with serve(tmp_path, no_model=True, api_key="schlüssel €") as served:
        for key, status in (("schlüssel €", 200), ("schlussel €", 401)):
            assert served.http.get("/runs", headers={"X-Api-Key": key.encode()}).status_code == status


# Health.


def test_health_says_what_runs_where(house: Served):
    import importlib.metadata

    import torch

    body = house.http.get("/health").json()
    assert body == {
        "status": "ok",
        "version": importlib.metadata.version("sightline"),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "gpu": body["gpu"],
        "loaded_models": list(house.names.values()),
        "queue_length": 0,
    }
    assert (body["gpu"] is None) == (not torch.cuda.is_available())


def test_the_documentation_describes_every_route(house: Served):
    assert house.http.get("/docs").status_code == 200
    paths = house.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/models/load", "/runs/{run_id}", "/health"} <= set(paths)
    fields = house.http.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "savepoints", "store_activations", "chat_template_kwargs", "min_p"} <= set(fields)


# Ids and logs.


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", None),
        ("GET", "/nope", None),
        ("POST", "/v1/chat/completions", {"messages": HELLO, "model": "gpt-4"}),
        ("POST", "/v1/chat/completions", {}),
        ("POST", "/v1/chat/completions", {"messages": HELLO, "model": "QWEN", "max_tokens": 1, "stream": True}),
    ],
    ids=["health", "no route", "no model", "no body", "stream"],
)
def test_every_answer_has_its_own_request_id(house: Served, qwen: str, method: str, path: str, body):
    if body and body.get("model") == "QWEN":
        body = body | {"model": qwen}
    ids = [house.http.request(method, path, json=body).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in ids)
    assert ids[0] != ids[1]


@pytest.fixture
def log_file(tmp_path: Path):
    """The log of a server, as `sightline serve --log-file` writes it; afterwards logging is as it was."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in ("", *logs._OURS)}
    logs.configure(Settings(log_file=tmp_path / "log", log_format="json"))
    yield tmp_path / "log"
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _lines(log_file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def test_each_request_is_one_line_of_the_log_with_its_id(house: Served, qwen: str, log_file: Path):
    asked = [
        house.http.get("/health"),
        house.post({"model": qwen, "messages": HELLO, "max_tokens": 2}),
        house.post({"model": qwen, "messages": HELLO, "max_tokens": 2, "stream": True}),
        house.post({"model": "gpt-4", "messages": HELLO}),
        house.http.get("/nope%0d%0aINFO forged: line"),
    ]
    lines = _lines(log_file)
    assert len(lines) == len(asked)
    for line, answer in zip(lines, asked, strict=True):
        assert line["request_id"] == answer.headers["x-request-id"]
        assert line["status"] == answer.status_code
        assert line["method"] == answer.request.method
        assert line["level"] == "info"
        assert line["ms"] >= 0
    assert [line["path"] for line in lines[:2]] == ["/health", "/v1/chat/completions"]


def test_what_is_asked_and_answered_is_not_in_the_log(house: Served, qwen: str, log_file: Path):
    house.post({"model": qwen, "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 2})
    assert "a secret" not in log_file.read_text()


def test_a_bug_is_a_500_with_its_id_and_its_traceback_under_that_id_in_the_log(
    house: Served, qwen: str, log_file: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(server.routes.openai, "open_answer", fail)
    answer = house.post({"model": qwen, "messages": HELLO})
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert "nobody thought" not in answer.text
    request_id = answer.headers["x-request-id"]
    failures = [line for line in _lines(log_file) if line["level"] == "error"]
    assert len(failures) == 1
    assert "nobody thought of this" in failures[0]["exception"]
    assert failures[0]["request_id"] == request_id
    (line,) = [line for line in _lines(log_file) if line["message"] == "request"]
    assert (line["status"], line["request_id"]) == (500, request_id)


# Metrics.


def _metrics(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def _change(before: Any, after: Any, name: str, **labels: str) -> float:
    """By how much the samples of this name with these labels have changed, together."""

    def total(samples: Any) -> float:
        return sum(
            value
            for (sample, found), value in samples.items()
            if sample == f"sightline_{name}" and set(labels.items()) <= found
        )

    return total(after) - total(before)


def test_a_request_moves_the_metrics(house: Served, qwen: str):
    before = _metrics(house)
    savepoints = [{"name": "a", "selector": "resid_post[*]"}]
    answer = house.chat(qwen, n=2, max_tokens=5, ignore_eos=True, savepoints=savepoints)
    assert house.post({"model": "gpt-4", "messages": HELLO}).status_code == 404
    after = _metrics(house)
    route = "/v1/chat/completions"
    assert _change(before, after, "requests_total", route=route, method="POST", status="200") == 1
    assert _change(before, after, "requests_total", route=route, method="POST", status="404") == 1
    assert _change(before, after, "request_seconds_count", route=route) == 2
    assert answer.usage is not None
    assert _change(before, after, "prompt_tokens_total", model=qwen) == answer.usage.prompt_tokens == 22
    assert _change(before, after, "completion_tokens_total", model=qwen) == answer.usage.completion_tokens == 10
    run_id = answer.choices[0].message.run_id  # type: ignore[attr-defined]
    size = sum(path.stat().st_size for path in (house.runs / run_id).rglob("*") if path.is_file())
    assert _change(before, after, "capture_bytes_total", model=qwen) == size
    assert _change(before, after, "batch_size_count", model=qwen) == 4  # the first token comes from the prompt
    assert _change(before, after, "batch_size_sum", model=qwen) == 8
    assert _change(before, after, "step_seconds_count", model=qwen) == 4
    assert _change(before, after, "time_to_first_token_seconds_count", model=qwen) == 2
    assert after["sightline_models_loaded", frozenset()] == 5
    assert after["sightline_queue_length", frozenset({("model", qwen)})] == 0


def test_two_servers_in_one_process_count_apart(house: Served, locked: Served):
    before = house.http.get("/metrics").text
    locked.http.get("/health")
    assert 'route="/health"' in locked.http.get("/metrics", headers=_bearer(KEY)).text
    assert [line for line in before.splitlines() if "/health" in line and "total" in line] == [
        line for line in house.http.get("/metrics").text.splitlines() if "/health" in line and "total" in line
    ]


def test_paths_that_nobody_serves_make_no_metrics_of_their_own(house: Served):
    before = _metrics(house)
    for index in range(5):
        house.http.get(f"/made/up/{index}")
    after = _metrics(house)
    assert _change(before, after, "requests_total", route="unmatched") == 5
    assert not any("/made/up" in str(labels) for _, labels in after)
