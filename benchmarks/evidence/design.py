"""The paper's design: 216 targets, and the 8 adapters of the paper's dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.bench import Bench
from benchmarks.evidence.mixes import Mix, design_mixes
from benchmarks.evidence.peers import said_by_paper
from benchmarks.evidence.report import Check, Report, Table, percent
from benchmarks.evidence.rows import Row, describe
from benchmarks.evidence.scoring import Rule, accused_targets, claimed, score, split, undecided
from unmerge.experiment.mergekit import METHODS

ABOUT = """\
18 compositions by 4 methods in the worlds of 3 seeds, as in the [paper's experiment](paper.md); the dictionary is the
8 adapters. `known`: all components are in the dictionary; `mixed`: some; `unknown`: none. The paper's rule calls an
atom present if its NNLS coefficient is over 0.01; it is applied to the same results, so over all parameters."""
GROUPS = ("known", "mixed", "unknown")
UNKNOWN_RATE = 1 / 200
"""Accusations per atom tested that unknown merges may have."""


def plan(seed: int) -> list[Mix]:
    """Return the targets, which are the same whatever the seed."""
    del seed
    return design_mixes()


def measure(bench: Bench, mix: Mix, merged: Path) -> Row:
    """Take one target apart."""
    return describe(mix, bench.examine(merged, mix))


def report(rows: Sequence[Row]) -> Report:
    """Report precision, recall and accusations by group and method."""
    return Report(
        "The paper's design",
        ABOUT,
        [_table(rows, "The test.", claimed), _table(rows, "The paper's rule on the same results.", said_by_paper)],
        _checks(rows),
    )


def _table(rows: Sequence[Row], title: str, rule: Rule) -> Table:
    header = ("group, method", "targets", "precision", "recall", "absent accused", "targets with one", "cannot tell")
    cells = []
    for group in GROUPS:
        for method in (*METHODS, "all"):
            own = [row for row in rows if row.group == group and method in (row.method, "all")]
            found = score(own, rule)
            inside, outside = split(own)
            cannot = str(undecided([*inside, *outside])) if rule is claimed else ""
            cells.append(
                (
                    f"{group}, {method}",
                    str(len(own)),
                    percent(found.precision),
                    percent(found.recall),
                    percent(found.accused),
                    str(accused_targets(own, rule).count),
                    cannot,
                )
            )
    return Table(title, header, cells)


def _checks(rows: Sequence[Row]) -> list[Check]:
    found = {group: score([row for row in rows if row.group == group]) for group in GROUPS}
    return [
        Check("known: precision", found["known"].precision.value, low=1.0),
        Check("known: recall", found["known"].recall.value, low=1.0),
        Check("mixed: precision", found["mixed"].precision.value, low=0.99),
        Check("mixed: recall", found["mixed"].recall.value, low=0.99),
        Check("unknown: accusations per atom tested", found["unknown"].accused.value, high=UNKNOWN_RATE),
    ]
