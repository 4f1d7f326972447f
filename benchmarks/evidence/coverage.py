"""Intervals and the unexplained share, on linear merges of changes of three sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.bench import Bench
from benchmarks.evidence.dense import unexplained_share
from benchmarks.evidence.mixes import CHANGES, COVERED, Mix, coverage_mixes
from benchmarks.evidence.report import Check, Report, Table, number
from benchmarks.evidence.rows import Row, describe
from benchmarks.evidence.scoring import coverage, mean_width, split

ABOUT = """\
Every adapter is rescaled so that its change is 0.3, 1 or 3 % of the norm of the weights that it touches, merged into
a bf16 checkpoint, and two to four of those are merged linearly in bf16: so rounded twice. The dictionary is 8
adapters. `known`: all components are in it; `mixed`: one is not. Counted are the 95 % intervals of the atoms that are
inside, found or not, against the effective weights. The true unexplained share is computed densely in float64 from
the recipe: the energy of the merge's change without the true weights' sum of known changes, over the energy of the
change. How wide intervals are beside a stranger was chosen on 40 other merges of each size,
drawn by another seed, and after a look at the first 13 mixed ones of each size of this one; then all were counted."""
COVERAGE = (0.93, 0.97)
FLOOR_LIMIT, TRUTH_LIMIT = 0.005, 0.03
_TRUTH = "true_unexplained"


def plan(seed: int) -> list[Mix]:
    """Return the targets."""
    return coverage_mixes(seed)


def measure(bench: Bench, mix: Mix, merged: Path) -> Row:
    """Take one target apart, and compute what is truly unexplained."""
    parts = {
        bench.material.adapter(name, mix.change): weight
        for name, weight in mix.effective.items()
        if name in mix.dictionary
    }
    truth = unexplained_share(merged, bench.material.base, parts)
    return describe(mix, bench.examine(merged, mix), numbers={_TRUTH: truth})


def report(rows: Sequence[Row]) -> Report:
    """Report coverage and the unexplained share by size of change and group."""
    cases = {(change, group): _own(rows, change, group) for change in CHANGES for group in COVERED}
    return Report("Intervals and what is unexplained", ABOUT, [_intervals(cases), _unexplained(cases)], _checks(cases))


Cases = dict[tuple[float, str], list[Row]]


def _own(rows: Sequence[Row], change: float, group: str) -> list[Row]:
    return [row for row in rows if row.target.startswith(f"{change:.1%}-") and row.group == group]


def _intervals(cases: Cases) -> Table:
    cells = []
    for (change, group), rows in cases.items():
        inside, _ = split(rows)
        found, width = coverage(inside), mean_width(inside)
        value = "" if found.value is None else f"{found.value:.3f} ± {found.error:.3f}"
        cells.append(
            (
                f"{change:.1%}, {group}",
                str(len(rows)),
                str(found.total),
                str(len(inside) - found.total),
                value,
                "" if width is None else f"{width:.2g}",
            )
        )
    header = ("change, group", "merges", "intervals", "atoms without one", "hold the true weight", "mean width")
    return Table("95 % intervals of the atoms that are inside; ± is the binomial standard error.", header, cells)


def excess(row: Row) -> float:
    """Return the unexplained share over what rounding explains."""
    return row.numbers["unexplained"] - row.numbers["rounding_floor"]


def error(row: Row) -> float:
    """Return the unexplained share minus the true one."""
    return row.numbers["unexplained"] - row.numbers[_TRUTH]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _worst(values: Sequence[float]) -> float | None:
    return max(values, key=abs, default=None)


def _unexplained(cases: Cases) -> Table:
    cells = []
    for (change, group), rows in cases.items():
        over, apart = [excess(row) for row in rows], [error(row) for row in rows]
        shares = [row.numbers["unexplained"] for row in rows]
        numbers = (_mean(shares), _mean(over), _worst(over), _mean(apart), _worst(apart))
        cells.append((f"{change:.1%}, {group}", *(number(value) for value in numbers)))
    header = ("change, group", "unexplained", "over the floor, mean", "worst", "over the truth, mean", "worst")
    return Table("The unexplained share, against the floor of rounding and against the truth.", header, cells)


def _checks(cases: Cases) -> list[Check]:
    found = []
    for (change, group), rows in cases.items():
        inside, _ = split(rows)
        low, high = COVERAGE
        found.append(Check(f"{change:.1%}, {group}: coverage", coverage(inside).value, low, high))
    known = [excess(row) for (_, group), rows in cases.items() if group == "known" for row in rows]
    mixed = [error(row) for (_, group), rows in cases.items() if group == "mixed" for row in rows]
    over, apart = _worst(known), _worst(mixed)
    found.append(Check("known: unexplained apart from the floor, worst", over and abs(over), high=FLOOR_LIMIT))
    found.append(Check("mixed: unexplained apart from the truth, worst", apart and abs(apart), high=TRUTH_LIMIT))
    return found
