"""The command: measure what is not there yet, print every part against its limits, and write the page.

``python -m benchmarks evidence [PART ...] [--folder DIR] [--seed S] [--limit N] [--jobs N] [--page FILE]``

Parts are ``design``, ``hard``, ``coverage`` and ``edits``; all of them by default. Every target that was
taken apart is one line of ``DIR/PART.jsonl`` and is not taken apart again: delete the file to measure anew. The folder
also holds the experiment and, for ``hard``, the crowd, which are trained first if they are missing. ``--limit 0``
measures nothing and reports what is there. Another ``--seed`` draws other targets, kept in ``DIR/PART-S.jsonl``, and
writes no page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from rich.console import Console

from benchmarks.evidence import coverage, design, edits, hard
from benchmarks.evidence.bench import Bench
from benchmarks.evidence.figure import write_figure
from benchmarks.evidence.material import Material, prepare, train_crowd
from benchmarks.evidence.mixes import SEED, Mix
from benchmarks.evidence.report import Report, markdown, show
from benchmarks.evidence.rows import Row, Store, chosen
from benchmarks.jobs import measured

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
        Returns all targets that a seed draws.
    measure : callable
        Takes a merged target apart.
    report : callable
        Makes tables and checks of rows.
    crowd : bool
        Whether the crowd's fine-tunes are needed.
    """

    plan: Callable[[int], list[Mix]]
    measure: Callable[[Bench, Mix, Path], Row]
    report: Callable[[Sequence[Row]], Report]
    crowd: bool = False


PARTS = {
    "design": Part(design.plan, design.measure, design.report),
    "hard": Part(hard.plan, hard.measure, hard.report, crowd=True),
    "coverage": Part(coverage.plan, coverage.measure, coverage.report),
    "edits": Part(edits.plan, edits.measure, edits.report),
}


def run(arguments: Sequence[str] = ()) -> bool:
    """Measure, print and write; tell whether every limit of the chosen parts is met."""
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, _WIDTH)  # a narrow table of many columns cannot be read
    material = prepare(options.folder)
    met = True
    for name in options.parts or PARTS:
        rows = _measure(material, name, options)
        report = PARTS[name].report(rows)
        show(report, console)
        met = met and all(check.met for check in report.checks)
    if options.seed == SEED:
        write_page(_every_row(material), options.page)
    return met


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks evidence", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; by default all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draws")
    parser.add_argument("--jobs", type=int, default=1, help="targets that are taken apart at the same time")
    parser.add_argument("--limit", type=int, help="measure at most this many targets of each part")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; its figure goes into figures/")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; expected one of {', '.join(PARTS)}")
    return options


def _store(material: Material, name: str, seed: int) -> Store:
    return Store(material.folder / (f"{name}.jsonl" if seed == SEED else f"{name}-{seed}.jsonl"))


def _measure(material: Material, name: str, options: argparse.Namespace) -> list[Row]:
    """Measure the targets of a part that are missing, at most `--limit`, and return all rows of the plan."""
    part, store = PARTS[name], _store(material, name, options.seed)
    plan, done = part.plan(options.seed), store.read()
    missing = [mix for mix in plan if mix.name not in done][: options.limit]
    if missing and part.crowd:
        train_crowd(material)
    for mix in missing:  # before they are asked for by several processes
        for ingredient in mix.weights:
            material.checkpoint(ingredient, mix.change)
    for row in measured(partial(_row, material, name), missing, name, options.jobs):
        store.append(row)
    return chosen(store.read(), plan)


def _row(material: Material, name: str, mix: Mix) -> Row:
    """Merge a mix and take it apart."""
    bench = _opened(material)
    with bench.merged(mix) as merged:
        return PARTS[name].measure(bench, mix, merged)


@cache
def _opened(material: Material) -> Bench:
    """Return what all targets of a process share."""
    return Bench(material)


def _every_row(material: Material) -> dict[str, list[Row]]:
    stored = {name: _store(material, name, SEED).read() for name in PARTS}
    return {name: chosen(rows, PARTS[name].plan(SEED)) for name, rows in stored.items() if rows}


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
