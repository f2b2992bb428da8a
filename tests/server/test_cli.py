import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.commands.serve import greeting
from server.settings import Settings
from tests.server.command_line import cells, refusal, sightline

COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_help_lists_every_command():
    text = sightline("--help").stdout
    for name in ("serve", "models", "runs", "inspect", "demo", "train-demo", "--version"):
        assert name in text
    assert sightline().stdout == text


def test_a_real_process_shows_help_without_loading_anything_heavy():
    code = (
        "import sys\nfrom server.cli import app\n"
        "try: app(['serve', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'nnsight', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-batch" in done.stdout


def test_the_version_is_that_of_the_package():
    assert re.fullmatch(r"sightline \d+\.\d+\.\d+\n", sightline("--version").stdout)


def test_serve_has_an_option_for_every_setting_with_its_default():
    text = " ".join(sightline("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert ("[model]" if name == "model" else f"--{name.replace('_', '-')} ") in text
    assert "(default 20GiB)" in text
    assert "(default /tmp/nnsight_activations)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["serve", "--nope"], "No such option: --nope"),
        (["serve", "--port", "high"], "--port: Input should be a valid integer"),
        (
            ["serve", "--max-batch", "0"],
            "--max-batch: Input should be greater than or equal to 1 (found '0')",
        ),
        (["serve", "--log-format", "xml"], "--log-format: Input should be 'auto', 'json' or 'text'"),
        (["serve", "demo", "--no-model"], "exclude each other"),
        (["serve", "--host", "0.0.0.0"], "no API key is set"),
        (["models", "--models-dir", "nowhere"], "is not a folder"),
        (["inspect", "nowhere.pt"], "there is no file 'nowhere.pt'"),
        (["inspect"], "Missing argument"),
        (["train-demo", "--minutes", "0"], "'--minutes'"),
    ],
)
def test_what_was_typed_wrong_is_told_in_one_line_with_exit_code_2(arguments: list[str], message: str):
    assert message in refusal(sightline(*arguments), 2)


def test_a_wrong_variable_is_told_by_every_command_that_reads_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_ACTIVATION_DIR", "/x")
    for command in ("serve", "runs", "models"):
        assert "SIGHTLINE_ACTIVATION_DIR; did you mean activations_dir?" in refusal(sightline(command), 2)


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(sightline("serve", "--port", port), 1)
    assert line.startswith(f"sightline: cannot listen on 127.0.0.1 port {port}: Address already in use")


def test_a_host_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIGHTLINE_API_KEY", "k")
    assert "cannot listen on no.such.invalid" in refusal(sightline("serve", "--host", "no.such.invalid"), 1)


def test_a_log_file_that_cannot_be_written_is_told(tmp_path: Path):
    file = tmp_path / "nowhere" / "log"
    assert refusal(sightline("serve", "--log-file", file), 1) == f"sightline: {file}: No such file or directory"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "Sightline serves demo at http://127.0.0.1:80/v1. Try: curl -H"),
        ({"host": "::1", "model": "m"}, "Sightline serves m at http://[::1]:80/v1"),
        ({"host": "[::1]"}, "at http://[::1]:80/v1"),
        (
            {"host": "0.0.0.0", "api_key": "secret"},
            'http://localhost:80/v1. Try: curl -H "Authorization: Bearer $S',
        ),
        ({"no_model": True}, 'http://127.0.0.1:80/models/load -d \'{"model_id": "demo"}\''),
    ],
)
def test_the_greeting_says_where_what_and_what_to_try(given: dict[str, object], expected: str):
    line = greeting(Settings.model_validate(given), 80)
    assert expected in line
    assert "secret" not in line
    assert "\n" not in line


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A real server without a model on a free port, and the line that it printed."""
    arguments = ["serve", "--no-model", "--port", "0", "--activations-dir", str(tmp_path / "acts")]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    timer = threading.Timer(60, process.kill)
    timer.start()
    yield process, process.stdout.readline()
    timer.cancel()
    process.kill()
    process.communicate()


def test_a_server_says_where_it_is_answers_there_and_stops_in_good_order(
    served: tuple[subprocess.Popen[str], str],
):
    process, line = served
    url = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert url, line
    with urllib.request.urlopen(f"{url[0]}/health", timeout=10) as answer:
        assert json.load(answer)["status"] == "ok"
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    records = [json.loads(record) for record in log.splitlines()]
    assert [record["path"] for record in records if record["message"] == "request"] == ["/health"]


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(tmp_path: Path):
    done = subprocess.run(
        [*COMMAND, "serve", str(tmp_path / "no-model-here"), "--port", "0", "--log-level", "error"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("sightline: cannot load")
    assert (done.returncode, done.stdout) == (1, "")


def test_models_shows_the_embedded_model_and_what_is_wrong_with_a_folder(tmp_path: Path):
    (tmp_path / "models" / "bad").mkdir(parents=True)
    (tmp_path / "models" / "bad" / "config.json").write_text("{")
    lines = sightline("models", "--models-dir", tmp_path / "models").stdout.splitlines()
    rows = {cells(line)[0]: cells(line) for line in lines[1:]}
    assert rows["demo"][1:3] == ["qwen3", "yes"]
    assert rows[str(tmp_path / "models" / "bad")][-1].startswith("config.json is not JSON")


def test_train_demo_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = {}
    monkeypatch.setattr("puzzles.train.train", lambda out, **options: seen.update(out=out, **options))
    assert sightline("train-demo", "--out", tmp_path, "--minutes", "0.5", "--seed", "7").exit_code == 0
    assert seen == {"out": tmp_path, "minutes": 0.5, "seed": 7}
