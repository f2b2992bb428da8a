import io
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Thread

import pytest

from server import logs
from server.metrics import Metrics
from server.settings import Settings

log = logging.getLogger("server.something")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Stderr:
    """What was written to stderr so far."""

    capsys: pytest.CaptureFixture[str]
    text: str = ""

    def getvalue(self) -> str:
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Stderr]:
    """Where the log goes; afterwards the logging module is as it was found."""
    root, names = logging.getLogger(), ("", "sightline", "puzzles", "attribution", "server", "clients")
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in names}
    yield Stderr(capsys)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def configure(**given: object) -> None:
    logs.configure(Settings.model_validate(given))


def test_a_record_is_one_json_object_with_its_extra_fields(stderr: Stderr):
    configure(log_format="json")
    log.info("loaded %s", "demo", extra={"seconds": 1.5, "path": Path("/x"), "request_id": "abc"})
    record = json.loads(stderr.getvalue())
    assert datetime.fromisoformat(record.pop("time")).tzinfo is not None
    assert record == {
        "level": "info",
        "logger": "server.something",
        "message": "loaded demo",
        "request_id": "abc",
        "seconds": 1.5,
        "path": "/x",
    }


def test_an_extra_field_takes_no_name_of_the_record_itself(stderr: Stderr):
    configure(log_format="json")
    log.info("hello", extra={"level": "mine", "time": 3})
    record = json.loads(stderr.getvalue())
    assert (record["level"], record["extra_level"], record["extra_time"]) == ("info", "mine", 3)


def test_a_record_carries_the_id_of_the_request_it_was_made_in_and_no_other(stderr: Stderr):
    configure(log_format="json")

    def serve(name: str) -> None:
        logs.request_id.set(name)
        log.info(name)

    for name in ("one", "two"):
        thread = Thread(target=copy_context().run, args=(serve, name))
        thread.start()
        thread.join()
    log.info("outside")
    records = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [record.get("request_id") for record in records] == ["one", "two", None]


def test_text_shows_extra_fields_and_the_request_and_stays_on_one_line(stderr: Stderr):
    configure(log_format="text")
    token = logs.request_id.set("r1")
    log.warning("asked for %s", "evil\n12:00:00 ERROR forged", extra={"route": "/v1"})
    logs.request_id.reset(token)
    (line,) = stderr.getvalue().splitlines()
    assert line.endswith(r"WARNING server.something: asked for evil\n12:00:00 ERROR forged route=/v1 [r1]")


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_is_logged_with_its_traceback(stderr: Stderr, form: str):
    configure(log_format=form)
    try:
        raise ValueError("the reason")
    except ValueError:
        log.exception("failed")
    text = stderr.getvalue()
    if form == "json":
        text = json.loads(text)["exception"]
    assert "Traceback (most recent call last)" in text
    assert text.strip().endswith("ValueError: the reason")


def test_auto_is_text_on_a_terminal_and_json_elsewhere(stderr: Stderr, monkeypatch: pytest.MonkeyPatch):
    configure()
    log.info("piped")
    assert json.loads(stderr.getvalue())["message"] == "piped"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure()
    log.info("shown")
    assert terminal.getvalue().endswith("INFO    server.something: shown\n")


def test_the_log_file_gets_the_same_records_and_is_opened_anew_after_rotation(stderr: Stderr, tmp_path: Path):
    file = tmp_path / "server.log"
    configure(log_file=file, log_format="text")
    log.info("first")
    file.rename(tmp_path / "server.log.1")
    log.info("second")
    assert "first" in (tmp_path / "server.log.1").read_text()
    assert file.read_text().endswith("second\n")
    assert len(stderr.getvalue().splitlines()) == 2


def test_configuring_again_doubles_no_line_and_keeps_the_handlers_of_others(stderr: Stderr):
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    configure()
    configure()
    log.info("once")
    assert len(stderr.getvalue().splitlines()) == 1
    assert other in logging.getLogger().handlers
    logging.getLogger().removeHandler(other)


def test_the_level_is_that_of_sightline_and_libraries_speak_from_warning_on(stderr: Stderr):
    configure(log_level="debug", log_format="text")
    log.debug("ours")
    logging.getLogger("sightline.http").debug("ours too")
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble")
    assert [line.split(": ")[1] for line in stderr.getvalue().splitlines()] == ["ours", "ours too", "trouble"]
    configure(log_level="error", log_format="text")
    log.warning("not wanted")
    assert "not wanted" not in stderr.getvalue()


def test_a_log_file_that_cannot_be_opened_is_an_error_and_changes_nothing(stderr: Stderr, tmp_path: Path):
    configure()
    with pytest.raises(FileNotFoundError):
        configure(log_file=tmp_path / "nowhere" / "server.log")
    log.info("still here")
    assert "still here" in stderr.getvalue()


def samples(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render()[0].decode().splitlines()
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_every_metric_is_shown_under_its_name_and_labels():
    metrics = Metrics()
    metrics.requests_total.labels("/v1/chat/completions", "POST", "200").inc()
    metrics.request_seconds.labels("/v1/chat/completions").observe(0.2)
    metrics.prompt_tokens_total.labels("demo").inc(30)
    metrics.completion_tokens_total.labels("demo").inc(12)
    metrics.queue_length.labels("demo").set(3)
    metrics.batch_size.labels("demo").observe(4)
    metrics.step_seconds.labels("demo").observe(0.003)
    metrics.time_to_first_token_seconds.labels("demo").observe(0.04)
    metrics.capture_bytes_total.labels("demo").inc(4096)
    metrics.models_loaded.set(1)
    shown = samples(metrics)
    path = 'route="/v1/chat/completions"'
    expected = {
        f'sightline_requests_total{{method="POST",{path},status="200"}}': 1,
        f'sightline_request_seconds_bucket{{le="0.1",{path}}}': 0,
        f'sightline_request_seconds_bucket{{le="0.25",{path}}}': 1,
        f"sightline_request_seconds_sum{{{path}}}": 0.2,
        'sightline_prompt_tokens_total{model="demo"}': 30,
        'sightline_completion_tokens_total{model="demo"}': 12,
        'sightline_queue_length{model="demo"}': 3,
        'sightline_batch_size_bucket{le="2.0",model="demo"}': 0,
        'sightline_batch_size_bucket{le="4.0",model="demo"}': 1,
        'sightline_step_seconds_count{model="demo"}': 1,
        'sightline_time_to_first_token_seconds_sum{model="demo"}': 0.04,
        'sightline_capture_bytes_total{model="demo"}': 4096,
        "sightline_models_loaded": 1,
    }
    assert {name: shown.get(name) for name in expected} == expected
    assert metrics.render()[1].startswith("text/plain")


def test_two_apps_in_one_process_count_for_themselves():
    one, two = Metrics(), Metrics()
    one.models_loaded.inc()
    assert (samples(one)["sightline_models_loaded"], samples(two)["sightline_models_loaded"]) == (1, 0)
