"""`sightline demo`, as a user runs it: a real server in a process of its own, the SDK and the client over a socket."""

import re
from pathlib import Path

import pytest

from server import demo


def test_the_demo_solves_a_puzzle_attributes_a_cell_and_proves_it_by_ablation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(tmp_path)
    said = capsys.readouterr().out
    assert "16 of 16 cells right" in said
    error = re.search(r"completeness error (\S+)\)", said)
    assert error is not None
    assert float(error[1]) < 1e-3
    lost = re.search(r"the 5 highest heads \(.*\) +(\S+)", said)
    median = re.search(r"median of 100 draws +(\S+)", said)
    beaten = re.search(r"cost more than (\d+) of 100", said)
    assert lost is not None
    assert median is not None
    assert beaten is not None
    # what the embedded model does: 10.2 nats against 0.2, and 100 of 100
    assert float(lost[1]) > 5 * float(median[1]) + 1
    assert int(beaten[1]) >= 95
    picture = (tmp_path / "heads.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000
    assert "cells right" in (tmp_path / "demo.svg").read_text().replace("&#160;", " ")
