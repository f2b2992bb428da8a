import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.commands.inspect_file import BLOCK, SHOWN_ROWS, row_norms
from server.commands.output import amount, size
from tests.server.command_line import cells, refusal, sightline

RUN = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


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
    assert f"no runs below {acts} start with 'ffff'" in refusal(sightline("runs", "ffff", "--activations-dir", acts), 2)
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
