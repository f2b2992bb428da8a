"""The table of the benchmarks: parts are measured on their own and kept together."""

import json

import pytest

from benchmarks.table import Row, Section, write
from benchmarks.timing import Prepared, in_turn, milliseconds, ratio


def section(title: str, *rows: Row) -> Section:
    return Section(title, list(rows), 5, "a note", "2026-11-21", "2 cores")


def test_a_part_that_is_measured_again_replaces_its_own_rows_and_no_others(tmp_path, capsys):
    write([section("One", Row("before", "", 1.0, "")), section("Two", Row("kept", "≤ 3", 2.0, "4, 2 ms"))], tmp_path)
    write([section("One", Row("new", "", 0.0312, ""), Row("no ratio", "", None, "7 ms"))], tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "before" not in text
    assert "| new | 0.031 |  |  |" in text
    assert "| no ratio |  |  | 7 ms |" in text
    assert "| kept | 2.00 | ≤ 3 | 4, 2 ms |" in text
    assert text.index("## One") < text.index("## Two")
    assert [one["title"] for one in json.loads((tmp_path / "results.json").read_text())] == ["One", "Two"]
    assert "| new | 0.031 |" in capsys.readouterr().out


def test_a_ratio_is_the_median_of_the_ratios_of_single_rounds():
    # 2/1, 30/10, 8/2: the median is 3; that of the medians would be 8/2
    assert ratio({"a": [2.0, 30.0, 8.0], "b": [1.0, 10.0, 2.0]}, "a", "b") == 3.0


def test_medians_are_shown_with_three_digits():
    assert milliseconds([0.0012345], [0.0456], [0.5, 0.7, 9.0]) == "1.23, 45.6, 700 ms"


def test_every_round_measures_every_work_and_prepares_each_call():
    done: list[str] = []
    works = {
        "plain": lambda: done.append("plain"),
        "prepared": Prepared(lambda: done.append("prepare"), lambda given: done.append(f"work {given}")),
    }
    times = in_turn(works, rounds=3)
    assert [len(one) for one in times.values()] == [3, 3]
    assert done.count("prepare") == done.count("work None") > 3
    last = len(done) - 1 - done[::-1].index("plain")
    assert done[last + 1 :] == ["prepare", "work None"] * 50  # the second work of the last round, as often as allowed


@pytest.mark.parametrize("parts", [["nothing"], ["serving", "nothing"]])
def test_a_part_that_does_not_exist_is_refused_before_anything_runs(parts, monkeypatch, capsys):
    from benchmarks import __main__ as command

    monkeypatch.setattr("sys.argv", ["benchmarks", *parts])
    with pytest.raises(SystemExit):
        command.main()
    assert "there is no part nothing; there are serving, attribution, concurrency" in capsys.readouterr().err
