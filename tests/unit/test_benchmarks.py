"""What the benchmarks make of figures: ratios, verdicts, regressions, changes, tables."""

from __future__ import annotations

import os

import pytest

from benchmarks import compare, gross, growth, pages, results, sources, tables, timing
from benchmarks.goals import SECTIONS, Beats, Bound, Memory, Within, judge
from benchmarks.results import Results
from benchmarks.rows import ROWS
from benchmarks.targets import TARGETS
from benchmarks.timing import Timed

ABOUT = {
    "when": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "machine": "a machine",
    "versions": {"glusterfs-server": "10.3-5", "moosefs-master": None},
    "sizes": {"slice_s": 0.3, "large_tree_files": 1000, "large_directory_files": 1000},
}
TITLES = {"ext4": "ext4", "passthrough": "passthrough_ll", "replfs": "replfs"}


def found(**by_row) -> Results:
    return Results(dict(ABOUT), dict(TITLES), by_row)


def test_a_gain_is_in_the_direction_of_the_row():
    assert ROWS["create"].gain(200, 100) == 2
    assert ROWS["write_4k_p99"].gain(200, 100) == 0.5


def test_every_goal_is_about_rows_and_targets_that_exist():
    for goal in (goal for goals in SECTIONS.values() for goal in goals):
        match goal:
            case Beats(row, _, base, target):
                assert {row} <= set(ROWS)
                assert {base, target} <= set(TARGETS)
            case Bound(row, _):
                assert row in ROWS
            case Within(row, calm, _):
                assert {row, calm} <= set(ROWS)
            case _:
                assert isinstance(goal, Memory)


@pytest.mark.parametrize(
    ("goal", "by_row", "met"),
    [
        (Beats("create", 0.4, "ext4"), {"create": {"ext4": [100], "replfs": [40]}}, True),
        (Beats("create", 0.4, "ext4"), {"create": {"ext4": [100], "replfs": [39]}}, False),
        (Bound("create_cpu", 0.7), {"create_cpu": {"replfs": [0.7]}}, True),
        (Bound("create_cpu", 0.7), {"create_cpu": {"replfs": [0.71]}}, False),
        (Bound("compare_all", 20_000), {"compare_all": {"replfs": [20_001]}}, True),
        (Bound("compare_all", 20_000), {"compare_all": {"replfs": [19_999]}}, False),
        (Within("write_4k_p99_stream", "write_4k_p99", 10),
         {"write_4k_p99": {"replfs": [100]}, "write_4k_p99_stream": {"replfs": [1000]}}, True),
        (Within("write_4k_p99_stream", "write_4k_p99", 10),
         {"write_4k_p99": {"replfs": [100]}, "write_4k_p99_stream": {"replfs": [1001]}}, False),
        (Memory(), {"memory_known": {"replfs": [80.5]}}, True),
        (Memory(), {"memory_known": {"replfs": [81]}}, False),
    ],
)  # fmt: skip
def test_a_verdict(goal, by_row, met):
    assert goal.judge(found(**by_row)).met is met


def test_what_was_not_measured_is_not_judged():
    assert judge(found()) == {}
    assert judge(found(create={"replfs": [100]})) == {}


def test_a_verdict_uses_medians():
    by_target = {"passthrough": [1.0, 100.0, 1000.0], "replfs": [50.0, 1.0, 40.0]}
    verdict = Beats("create", 0.4, "passthrough").judge(found(create=by_target))
    assert verdict is not None
    assert verdict.found == "0.40x"


def test_changes_between_two_commits_need_a_tenth_and_ranges_apart():
    both: dict[str, dict[str, list[float]]] = {
        "create": {"before": [100, 101, 102], "after": [80, 81, 82]},
        "rename": {"before": [100, 101, 102], "after": [95, 96, 97]},
        "unlink": {"before": [100, 150, 200], "after": [90, 91, 101]},
        "write_4k_p99": {"before": [100, 101, 102], "after": [50, 51, 52]},
    }
    measured = Results(ABOUT, {"before": "one", "after": "another"}, both)
    slower, faster = compare.changes(measured, "before", "after")
    assert slower == ["create + write 1 KiB + close: 101 files/s before, 81 files/s after, 0.80x"]
    assert len(faster) == 1
    assert "4 KiB write, p99" in faster[0]


def test_a_gross_regression_is_a_third():
    assert gross.regressions({"create": 0.3}, {"create": 0.11}) == []
    (sentence,) = gross.regressions({"create": 0.3}, {"create": 0.09})
    assert "3.3 times slower" in sentence


@pytest.mark.parametrize("content", ["", "/autogroup-7 nice 0\n", None])
def test_a_kernel_with_or_without_groups_of_sessions(content, tmp_path, monkeypatch):
    group = tmp_path / "autogroup"
    if content is not None:
        group.write_text(content)
    given = []
    monkeypatch.setattr(gross, "_GROUP", group)
    monkeypatch.setattr(os, "getpriority", lambda *_: 5)
    monkeypatch.setattr(os, "setpriority", lambda *given_now: given.append(given_now[2]))
    with gross._before_all_others():
        assert given == [-20]
        assert not content or group.read_text() == "-20"
    assert given == [-20, 5]
    assert not content or group.read_text() == "0"


def test_what_is_stored_is_what_is_measured():
    ones = {row: {"passthrough": [1.0], "replfs": [1.0]} for row in (*ROWS, "round_trip")}
    assert set(gross.load()) == set(gross.ratios(found(**ones)))


def test_results_are_read_as_they_were_saved(tmp_path):
    saved = found(create={"ext4": [3.0], "replfs": [1.0, 2.0]})
    saved.save(tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == saved
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_page_of_a_run(tmp_path):
    by_target = {"ext4": [1000.0, 3000.0], "passthrough": [100.0], "replfs": [45.0, 50.0, 40.0]}
    pages.write_run(tmp_path, "first", found(create=by_target))
    text = (tmp_path / "first.md").read_text()
    assert "| **2,000** 20x (1,000 to 3,000) | **100** | **45** 0.45x (40 to 50) |" in text
    assert "Medians of 1 to 3 interleaved repetitions" in text
    assert "| at least 0.4x | 0.45x | met |" in text
    assert "glusterfs-server 10.3-5" in text
    assert "moosefs" not in text


PAGE = """# Performance
<!-- made: milestones -->
old
<!-- end -->
between
<!-- made: goals -->
<!-- end -->
<!-- made: table -->
<!-- end -->
<!-- made: growth -->
<!-- end -->
"""


def test_the_page_of_all_runs(tmp_path, monkeypatch):
    """It shows the newest run that compares something; what a person wrote stays."""
    monkeypatch.setattr(pages, "PERFORMANCE", tmp_path)
    monkeypatch.setattr(pages, "PAGE", tmp_path / "PAGE.md")
    pages.PAGE.write_text(PAGE)
    assert pages.fresh_page().count("None yet.") == 4
    first = found(create={"passthrough": [100.0], "replfs": [39.0]})
    second = found(create={"passthrough": [100.0], "replfs": [41.0]})
    alone = Results(ABOUT | {"when": "2027"}, {"replfs": "replfs"}, {"create": {"replfs": [7.0]}})
    second.about["when"] = "2026-02-02"
    for name, each in (("first", first), ("second", second), ("alone", alone)):
        each.save(tmp_path / f"{name}.json")
    pages.write_points(tmp_path, "one", dict(ABOUT), [("peers", "rename", 1, 250.0)])
    text = pages.fresh_page()
    assert "old" not in text
    assert "\nbetween\n" in text
    assert [line.split("]")[0] for line in text.splitlines() if line.startswith("| [")] == [
        "| [first", "| [second", "| [alone",
    ]  # fmt: skip
    assert "| **100** | **41** 0.41x |" in text
    assert "| FUSE in C that replicates nothing | 1 of 1 |  |" in text
    assert "| us per operation, by peers | 1 |" in text
    assert "| rename | 250 |" in text
    pages.PAGE.write_text(text)
    assert pages.fresh_page() == text


def test_the_row_of_a_milestone():
    lines = tables.milestones({"first": found(create={"replfs": [45.0]})}).splitlines()
    assert lines[-1].startswith(
        "| [first](performance/first.md) | 0123456789 | a machine | 45 |  |"
    )


def test_points_are_medians_in_order():
    points: list[growth.Point] = [
        ("peers", "rename", 1, 5.0),
        ("peers", "rename", 0, 1.0),
        ("peers", "rename", 1, 7.0),
    ]
    assert growth.medians(points) == {"peers": {"rename": [(0, 1.0), (1, 6.0)]}}


def test_a_loop_ends_by_number_or_by_time():
    assert timing.repeat(lambda _: None, 5, 60).count == 5
    assert timing.repeat(lambda _: None, 10**9, 0.001).count < 10**6
    assert Timed([1.0] * 98 + [2.0, 3.0]).percentile_us(99) == 3e6
    assert Timed([0.5, 0.5]).rate == 2


def test_a_tree_is_the_same_every_time(tmp_path):
    for name in ("one", "other"):
        sources.make_tree(tmp_path / name, 50)
    trees = [
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in tree}
        for name in ("one", "other")
        if (tree := [path for path in (tmp_path / name).rglob("*") if path.is_file()])
    ]
    assert trees[0] == trees[1]
    assert len(trees[0]) == 50
