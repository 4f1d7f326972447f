"""The command: measure what is not there yet, print every part against its limits, and write the page.

``python -m benchmarks recipes [recover|verify ...] [--folder DIR] [--limit N] [--jobs N] [--page FILE]``

Every merge that was recovered, and every recipe that was verified, is one line of ``DIR/recover.jsonl`` or
``DIR/verify.jsonl`` and is not measured again: delete the line, or the file, to measure anew. The folder also holds the
experiment, whose fine-tunes are trained first if they are missing. ``--limit 0`` measures nothing and reports what is
there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.evidence.command import FOLDER
from benchmarks.evidence.material import Material, prepare
from benchmarks.evidence.report import Report, markdown, show
from benchmarks.jobs import measured
from benchmarks.recipes import recovered, recovering, verifying
from benchmarks.recipes.cases import cases
from benchmarks.recipes.lies import claims
from benchmarks.recipes.rows import Recovered, Store, Verified

PAGE = Path("docs") / "recipes_measured.md"
_WIDTH = 160
_INTRODUCTION = """\
# Recipes, measured

This page is written by `python -m benchmarks recipes`. Merges are made by mergekit, with one thread of torch unless
something else is said, of really trained fine-tunes of one small base, and stored in bfloat16. The dictionary is 8 of
them.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark.

    Attributes
    ----------
    plan : callable
        Returns all that is measured; each has a name.
    measure : callable
        Measures one.
    kind : type
        Of the rows.
    report : callable
        Makes tables and checks of rows.
    """

    plan: Callable[[], Sequence[Any]]
    measure: Callable[[Material, Any], Any]
    kind: type
    report: Callable[[Sequence[Any]], Report]


PARTS = {
    "recover": Part(cases, recovering.measure, Recovered, recovered.report),
    "verify": Part(claims, verifying.measure, Verified, verifying.report),
}


def run(arguments: Sequence[str] = ()) -> bool:
    """Measure, print and write; tell whether every limit of the chosen parts is met."""
    options = _parse(arguments)
    console = Console()
    console.width = max(console.width, _WIDTH)  # a narrow table of many columns cannot be read
    material = prepare(options.folder)
    met = True
    for name in options.parts or PARTS:
        report = PARTS[name].report(_measure(material, name, options))
        show(report, console)
        met = met and all(check.met for check in report.checks)
    write_page({name: _rows(material, name) for name in PARTS}, options.page)
    return met


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks recipes", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; by default all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept")
    parser.add_argument("--jobs", type=int, default=1, help="measurements at the same time")
    parser.add_argument("--limit", type=int, help="measure at most this many of each part")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; expected one of {', '.join(PARTS)}")
    return options


def _store(material: Material, name: str) -> Store[Any]:
    return Store(material.folder / f"{name}.jsonl", PARTS[name].kind)


def _measure(material: Material, name: str, options: argparse.Namespace) -> list[Any]:
    """Measure what is missing of a part, at most `--limit`, and return all its rows."""
    part, store = PARTS[name], _store(material, name)
    done = store.read()
    missing = [item for item in part.plan() if item.name not in done][: options.limit]
    for row in measured(partial(part.measure, material), missing, name, options.jobs):
        store.append(row)
    return _rows(material, name)


def _rows(material: Material, name: str) -> list[Any]:
    """Return the rows of what is planned, in the order of the plan."""
    stored = _store(material, name).read()
    return [stored[item.name] for item in PARTS[name].plan() if item.name in stored]


def write_page(rows: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write the page of all parts that have rows."""
    lines = [_INTRODUCTION]
    for name, part in PARTS.items():
        if rows.get(name):
            lines += markdown(part.report(rows[name]))
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
