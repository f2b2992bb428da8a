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
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from server.cli import app
from server.commands.inspect_file import BLOCK, SHOWN_ROWS, row_norms
from server.commands.output import amount, size
from server.commands.serve import greeting
from server.settings import Settings

RUN = "0123456789abcdef" * 2
COMMAND = [sys.executable, "-c", "from server.cli import main; main()"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def sightline(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="sightline")


def refusal(result: Result, code: int) -> str:
    """The one line on stderr of a command that failed."""
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("sightline: ")
    return line


def cells(line: str) -> list[str]:
    """A line of a table: columns are at least two spaces apart."""
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recorded run of one choice: two layers of five positions, the third row of the first layer broken."""
    folder = tmp_path / "acts" / RUN / "0"
    folder.mkdir(parents=True)
    resid = torch.ones(2, 5, 4)
    resid[1] *= 3
    resid[0, 2, 0], resid[0, 2, 1] = torch.nan, torch.inf
    torch.save(resid, folder / "resid.pt")
    meta = {
        "file": str(folder / "resid.pt"),
        "selector": "resid_post[0:2]",
        "shape": [2, 5, 4],
        "dtype": "float32",
        "positions": [1, 6, 1],
        "axis": 1,
        "bytes": 160,
    }
    choice = {
        "index": 0,
        "prompt_tokens": 4,
        "finish_reason": "stop",
        "text": "K\nB",
        "token_ids": [11, 12, 13, 14, 15, 16, 17],
        "tokens": ["a", "b", "\n", "d", "e", "f", "g"],
        "activations": {"resid": meta},
    }
    record = {
        "run_id": RUN,
        "created": 1795228022.0,
        "model": "demo",
        "dtype": "float32",
        "seed": 5,
        "choices": [choice],
    }
    (folder.parent / "run.json").write_text(json.dumps(record))
    return folder / "resid.pt"


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
    assert (
        refusal(sightline("serve", "--log-file", file), 1) == f"sightline: {file}: No such file or directory"
    )


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


def test_runs_lists_what_is_recorded(run: Path):
    lines = sightline("runs", "--activations-dir", run.parents[2]).stdout.splitlines()
    assert cells(lines[0]) == ["run", "time", "model", "choices", "size", "savepoints"]
    assert [cells(line)[0] for line in lines[1:]] == [RUN]
    assert cells(lines[1])[2:4] + cells(lines[1])[-1:] == ["demo", "1", "resid"]


def test_runs_says_when_there_are_none(tmp_path: Path):
    assert sightline("runs", "--activations-dir", tmp_path / "none").stdout.startswith("No runs: there is no")
    assert sightline("runs", "--activations-dir", tmp_path).stdout == f"No runs below {tmp_path}.\n"


def test_a_run_is_shown_by_the_start_of_its_id_with_its_tensors(run: Path):
    text = sightline("runs", RUN[:8], "--activations-dir", run.parents[2]).stdout
    assert r"choice 0: 4 + 3 tokens, stop: 'K\nB'" in text
    assert f"run_id: {RUN}" in text
    row = cells(text.splitlines()[-1])
    # rows of ones have norm 2, rows of threes norm 6; the broken row counts for neither: (4·2 + 5·6) / 9
    assert row == ["resid", "[2, 5, 4]", "float32", "160 B", "4.222", "2", "6", "1", "1", "resid_post[0:2]"]


def test_a_run_that_is_not_there_or_not_unique_is_told(run: Path):
    acts = run.parents[2]
    assert f"no runs below {acts} start with 'ffff'" in refusal(
        sightline("runs", "ffff", "--activations-dir", acts), 2
    )
    other = acts / f"{RUN[:-1]}0"
    other.mkdir()
    (other / "run.json").write_text((acts / RUN / "run.json").read_text().replace(RUN, other.name))
    assert "2 runs below" in refusal(sightline("runs", RUN[:8], "--activations-dir", acts), 2)


def test_inspect_shows_each_position_of_a_run_with_its_token(run: Path):
    lines = sightline("inspect", run).stdout.splitlines()
    assert cells(lines[1])[:4] == ["resid", "[2, 5, 4]", "float32", "160 B"]
    rows = [cells(line) for line in lines[4:]]
    # positions 1 to 5; the norm is the mean over the two layers: (2 + 6) / 2
    assert rows[0] == ["1", "12", "'b'", "4", "0", "0"]
    assert rows[1] == ["2", "13", r"'\n'", "4", "0", "0"]
    assert rows[2] == ["3", "14", "'d'", "nan", "1", "1"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]


def test_inspect_leaves_out_the_middle_of_many_rows_and_says_so(run: Path):
    length = SHOWN_ROWS + 5
    torch.save(torch.ones(length, 4), run)
    file = run.parents[1] / "run.json"
    record = json.loads(file.read_text())
    choice = record["choices"][0]
    choice["token_ids"], choice["tokens"] = [0] * length, ["x"] * length
    choice["activations"]["resid"] |= {"axis": 0, "positions": [0, length, 1]}
    file.write_text(json.dumps(record))
    text = sightline("inspect", run).stdout
    assert text.splitlines()[-1] == f"rows 20 to 24 of {length} are left out; --all shows them"
    assert len(sightline("inspect", run, "--all").stdout.splitlines()) == 4 + length


def test_inspect_refuses_a_run_whose_record_does_not_fit(run: Path):
    torch.save(torch.ones(2, 6, 4), run)
    result = sightline("inspect", run)
    assert result.exit_code == 2
    assert "run.json gives 5 positions along axis 1; the tensor is [2, 6, 4]" in result.stderr
    (run.parents[1] / "run.json").write_text("[]")
    assert "does not describe resid.pt" in refusal(sightline("inspect", run), 2)


def test_inspect_reads_safetensors_and_dictionaries_of_tensors(tmp_path: Path):
    tensors = {"a": torch.full((3, 4), 0.5), "b": torch.arange(6).reshape(2, 3)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pt")
    for name in ("t.safetensors", "t.pt"):
        rows = [cells(line) for line in sightline("inspect", tmp_path / name).stdout.splitlines()[1:]]
        assert rows[0] == ["a", "[3, 4]", "float32", "48 B", "1", "1", "1", "0", "0"]
        assert rows[1][:4] == ["b", "[2, 3]", "int64", "48 B"]


@pytest.mark.parametrize("content", [b"", b"no tensor", b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_inspect_refuses_what_holds_no_tensors(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert "cannot be read as tensors" in refusal(sightline("inspect", tmp_path / name), 2)


def test_inspect_runs_no_code_that_a_file_brings(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    assert "cannot be read as tensors" in refusal(sightline("inspect", tmp_path / "evil.pt"), 2)
    assert not (tmp_path / "pwned").exists()


def test_row_norms_are_exact_for_every_number_of_axes_and_beyond_one_block():
    # 3-4-5; in bfloat16 1e30 squared would overflow float32
    norms, nan, inf = row_norms(torch.tensor([[3.0, 4.0], [1e30, 0.0]], dtype=torch.bfloat16))
    assert norms[0] == 5
    assert norms[1] == pytest.approx(1e30, rel=1e-2)
    assert row_norms(torch.tensor(-2.0))[0] == 2
    assert row_norms(torch.zeros(0, 4))[0].shape == (0,)
    assert row_norms(torch.ones(2, 3, 5, 4))[0].shape == (2, 3, 5)
    wide = torch.ones(5, BLOCK // 2 - 1)
    wide[4, 7] = torch.nan
    norms, nan, inf = row_norms(wide)
    assert norms[3] == pytest.approx((BLOCK // 2 - 1) ** 0.5)
    assert (nan.tolist(), inf.tolist()) == ([0, 0, 0, 0, 1], [0] * 5)


def test_sizes_and_amounts_are_shown_with_a_unit():
    assert [size(n) for n in (None, 0, 1023, 1536, 5 * 2**40)] == ["?", "0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert [amount(n) for n in (None, 999, 882_000, 1_543_714_304)] == ["?", "999", "882 k", "1.54 B"]


def test_train_demo_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = {}
    monkeypatch.setattr("puzzles.train.train", lambda out, **options: seen.update(out=out, **options))
    assert sightline("train-demo", "--out", tmp_path, "--minutes", "0.5", "--seed", "7").exit_code == 0
    assert seen == {"out": tmp_path, "minutes": 0.5, "seed": 7}
