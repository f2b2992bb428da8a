"""The command that draws the pictures of the front page draws them, and they show what their titles say."""

import re
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from attribution import LocalSession
from examples import pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    return LocalSession("demo", store=tmp_path_factory.mktemp("store"))


def test_the_head_of_the_picture_looks_most_at_the_neighbour_that_the_rule_uses(model: LocalSession):
    axes: list[Axes] = pictures.grid(model, pictures.sixteen(model)).axes
    discs = [
        (one.radius, one.center, panel.get_title().split("\n")[0])
        for panel in axes
        for one in panel.patches
        if isinstance(one, Circle)
    ]
    # 'paint up' takes the colour of the lower neighbour: of row 1, column 1 that is row 2, column 1
    assert max(discs)[1:] == ((1.5, 2.5), "test input")


def test_the_command_draws_the_pictures_that_the_tree_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(pictures, "side_neighbor_relations", ("shift left", pictures.SHOWN))  # sixteen take longer
    monkeypatch.setattr(sys, "argv", ["pictures", "--out", str(tmp_path / "new")])
    pictures.main()
    drawn = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in drawn] == ["graph.png", "grid.png"]
    assert sorted(capsys.readouterr().out.split()) == [str(file) for file in drawn]
    for file in (*drawn, *(ROOT / "docs" / one.name for one in drawn)):
        assert file.read_bytes().startswith(b"\x89PNG"), file


def test_what_the_pictures_say_of_the_demo_model_is_what_the_notebook_finds():
    text = (ROOT / "examples" / "minarc_local.ipynb").read_text()
    assert re.search(rf"head {pictures.LAYER}\.{pictures.HEAD}: \+3\.", text)
