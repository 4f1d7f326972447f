from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.evidence import coverage, design, edits, hard
from benchmarks.evidence.command import write_page
from benchmarks.evidence.dense import changes, unexplained_share
from benchmarks.evidence.figure import write_figure
from benchmarks.evidence.material import every_name, lora_scale
from benchmarks.evidence.mixes import Kind, draw_hard
from benchmarks.evidence.peers import said_by_paper
from benchmarks.evidence.report import Check, Report, Table, markdown
from benchmarks.evidence.rows import Answer, Row, Store, chosen
from benchmarks.evidence.scoring import (
    Share,
    accused_targets,
    bin_of,
    contradicted,
    detection,
    exceedance,
    mean_width,
    score,
    split,
    undecided,
)
from benchmarks.evidence.scoring import coverage as count_coverage

from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint


def answer(
    name: str,
    truth: float = 0.0,
    kind: Kind = "other",
    *,
    present: bool | None = False,
    coefficient: float = 0.0,
    p_value: float | None = 0.5,
    bounds: tuple[float, float] | None = None,
    detectable: float | None = None,
) -> Answer:
    low, high = bounds or (None, None)
    return Answer(name, truth, kind, False, coefficient, truth, low, high, present, p_value, detectable, "")


ROWS = [
    Row(
        "first",
        "mixed",
        "linear",
        {"a": 0.04, "b": 0.6, "x": 0.36},
        (
            answer("a", 0.04, "present", coefficient=0.05, bounds=(0.0, 0.03), detectable=0.03),
            answer("b", 0.6, "present", present=True, coefficient=0.6, p_value=1e-9, bounds=(0.55, 0.65)),
            answer("c", kind="sibling", present=True, coefficient=0.2, p_value=1e-5),
            answer("d", kind="twin", present=True, coefficient=0.3, p_value=1e-7),
        ),
    ),
    Row(
        "second",
        "unknown",
        "ties",
        {"x": 1.0},
        (answer("a", coefficient=0.005), answer("b", present=None), answer("c", p_value=None), answer("d")),
    ),
]


def test_scores_leave_twins_out() -> None:
    found = score(ROWS)
    assert (found.precision, found.recall, found.accused) == (Share(1, 2), Share(1, 2), Share(1, 5))
    assert accused_targets(ROWS) == Share(1, 2)
    assert undecided(ROWS[1].answers) == 1


def test_the_papers_rule_looks_at_the_coefficient() -> None:
    assert score(ROWS, said_by_paper).recall == Share(2, 2)
    assert score(ROWS, said_by_paper).accused == Share(1, 5)


def test_detection_is_counted_by_weight() -> None:
    assert [bin_of(weight) for weight in (0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0)] == [0, 1, 2, 3, 4, 5, 5]
    assert detection(ROWS) == [Share(0, 0), Share(0, 0), Share(0, 1), Share(0, 0), Share(0, 0), Share(1, 1)]


def test_calibration_counts_only_what_was_tested() -> None:
    _, outside = split(ROWS)
    assert exceedance(outside, 0.001) == Share(1, 4)


def test_a_miss_above_the_detectable_weight_contradicts_it() -> None:
    inside, _ = split(ROWS)
    assert contradicted(inside) == Share(1, 1)


def test_intervals_are_counted_where_there_are_some() -> None:
    inside, _ = split(ROWS)
    assert count_coverage(inside) == Share(1, 2)
    assert mean_width(inside) == pytest.approx(0.065)


def test_shares_know_their_error() -> None:
    assert Share(0, 0).value is None
    assert Share(1, 4).error == pytest.approx(np.sqrt(0.25 * 0.75 / 4))
    low, high = Share(0, 10).within()
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-3)  # Wilson's
    assert Share(10, 10).within() == pytest.approx((1 - high, 1.0))


def test_limits_are_allowed_and_nothing_measured_is_not() -> None:
    assert Check("", 1.0, low=1.0).met
    assert Check("", 0.95, 0.93, 0.97).met
    assert not Check("", 0.98, 0.93, 0.97).met
    assert not Check("", None, high=1.0).met


def test_tables_become_markdown() -> None:
    report = Report("Title", "About.", [Table("What.", ("a", "b"), [("1", "2")])], [Check("x", 2.0, high=1.0)])
    lines = list(markdown(report))
    assert lines[0] == "## Title"
    assert "| 1 | 2 |" in lines
    assert "| x | 2 | at most 1 | NOT MET |" in lines


def test_rows_are_kept_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    assert store.read() == {}
    store.append(ROWS[0])
    with store.path.open("a") as file:
        file.write('{"target": "sec')  # a kill in the middle of a line
    assert list(store.read()) == ["first"]
    store.append(ROWS[1])
    assert store.read() == {row.target: row for row in ROWS}


def test_rows_that_are_not_planned_are_left_out() -> None:
    mix = draw_hard(every_name(), 8, 1)
    row = Row(mix.name, mix.group, mix.method, mix.effective, ())
    assert chosen({"gone": ROWS[0], mix.name: row}, [mix]) == [row]


def test_what_is_unexplained_is_computed_densely(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = {name: quantise(value, "BF16") for name, value in tiny_model(rng).items()}
    change = {name: write_adapter(tmp_path / name, rng, base) for name in ("known", "stranger")}
    merged = {
        name: value + 0.6 * change["known"].get(name, 0.0) + 0.4 * change["stranger"].get(name, 0.0)
        for name, value in base.items()
    }
    folders = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "merged", merged, "F32")
    own = changes(tmp_path / "known")
    assert lora_scale(tmp_path / "known") > 0.0
    assert own.keys() == change["known"].keys()
    for name, value in own.items():
        np.testing.assert_allclose(value, change["known"][name], atol=1e-6)
    rest = sum(float(np.vdot(value, value)) for value in change["stranger"].values()) * 0.16
    energy = sum(float(np.vdot(merged[name] - base[name], merged[name] - base[name])) for name in base)
    found = unexplained_share(folders[1], folders[0], {tmp_path / "known": 0.6})
    assert found == pytest.approx(rest / energy, rel=1e-4)


def test_parts_report_nothing_measured_and_the_page_holds_what_was(tmp_path: Path) -> None:
    for part in (design, hard, coverage, edits):
        assert part.report([]).tables
    numbers = {"unexplained": 0.1, "rounding_floor": 0.09, "true_unexplained": 0.1}
    row = Row("1.0%-known-000", "known", "linear", {"b": 0.6}, ROWS[0].answers, numbers)
    write_page({"coverage": [row]}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| 1.0%, known | 1 | 2 | 0 | 0.500 ± 0.354 | 0.065 |" in text
    assert "Hard mixes" not in text


def test_the_figure_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.png", "other.png"):
        write_figure(ROWS, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_the_tables_of_hard_mixes_count_every_size() -> None:
    atoms = tuple(answer(f"a{place}", kind="sibling") for place in range(7))
    row = Row("008-000-linear", "known", "linear", {"b": 0.06}, (answer("b", 0.06, "present", present=True), *atoms))
    report = hard.report([row])
    assert all(check.met for check in report.checks)
    detected = report.tables[0].rows
    assert ("8 atoms, linear", "", "", "", "1/1", "", "") in detected
    assert ("64 atoms, linear", "", "", "", "", "", "") in detected
