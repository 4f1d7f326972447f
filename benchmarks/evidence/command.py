"""The command: measure what is not there yet, print every part against its limits, and write the page.

``python -m benchmarks evidence [PART ...] [--folder DIR] [--limit N] [--page FILE]``

Parts are ``design``, ``hard``, ``coverage`` and ``edits``; all of them by default. Every target that was
taken apart is one line of ``DIR/PART.jsonl`` and is not taken apart again: delete the file to measure anew. The folder
also holds the experiment and the crowd, which are trained first if they are missing. ``--limit 0`` measures nothing
and reports what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.evidence import coverage, design, edits, hard
from benchmarks.evidence.bench import Bench
from benchmarks.evidence.figure import write_figure
from benchmarks.evidence.material import prepare
from benchmarks.evidence.mixes import Mix
from benchmarks.evidence.report import Report, markdown, show
from benchmarks.evidence.rows import Row, Store, chosen

FOLDER = Path(".cache") / "evidence"
PAGE = Path("docs") / "evidence_measured.md"
_WIDTH = 150
_INTRODUCTION = """\
# The evidence, measured

This page is written by `python -m benchmarks evidence`. Merges are made by mergekit of really trained fine-tunes of
one small base; what is inside is known from the recipes. An atom is called present or absent, or it is said that one
cannot tell, which counts as not found. Cells like 45/46 are counts.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark.

    Attributes
    ----------
    plan : callable
        Returns all targets.
    measure : callable
        Takes a merged target apart.
    report : callable
        Makes tables and checks of rows.
    """

    plan: Callable[[], list[Mix]]
    measure: Callable[[Bench, Mix, Path], Row]
    report: Callable[[Sequence[Row]], Report]


PARTS = {
    "design": Part(design.plan, design.measure, design.report),
    "hard": Part(hard.plan, hard.measure, hard.report),
    "coverage": Part(coverage.plan, coverage.measure, coverage.report),
    "edits": Part(edits.plan, edits.measure, edits.report),
}


def run(arguments: Sequence[str] = ()) -> bool:
    """Measure, print and write; tell whether every limit of the chosen parts is met."""
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, _WIDTH)  # a narrow table of many columns cannot be read
    bench = Bench(prepare(options.folder))
    met = True
    for name in options.parts or PARTS:
        rows = _measure(bench, name, options.limit)
        report = PARTS[name].report(rows)
        show(report, console)
        met = met and all(check.met for check in report.checks)
    write_page(_every_row(bench), options.page)
    return met


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks evidence", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; by default all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept")
    parser.add_argument("--limit", type=int, help="measure at most this many targets of each part")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; its figure goes into figures/")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; expected one of {', '.join(PARTS)}")
    return options


def _store(bench: Bench, name: str) -> Store:
    return Store(bench.material.folder / f"{name}.jsonl")


def _measure(bench: Bench, name: str, limit: int | None) -> list[Row]:
    """Measure the targets of a part that are missing, at most `limit`, and return all rows of the plan."""
    part, store = PARTS[name], _store(bench, name)
    plan, done = part.plan(), store.read()
    missing = [mix for mix in plan if mix.name not in done][:limit]
    for mix in track(missing, name, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        with bench.merged(mix) as merged:
            store.append(part.measure(bench, mix, merged))
    return chosen(store.read(), plan)


def _every_row(bench: Bench) -> dict[str, list[Row]]:
    stored = {name: _store(bench, name).read() for name in PARTS}
    return {name: chosen(rows, PARTS[name].plan()) for name, rows in stored.items() if rows}


def write_page(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Write the page of all parts that have rows, and the figure of the hard mixes."""
    lines = [_INTRODUCTION]
    if rows.get("hard"):
        write_figure(rows["hard"], path.parent / "figures" / "detection.png")
        lines += ["![Detection rate against weight](figures/detection.png)", ""]
    for name, part in PARTS.items():
        if rows.get(name):
            lines += markdown(part.report(rows[name]))
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
