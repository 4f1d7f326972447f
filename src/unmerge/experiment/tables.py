"""The paper's Tables 1 to 6 beside ours, and the tables it lacks.

Every number is a mean over merges (a merge is one target of one seed) after one setting per merge and algorithm
was chosen. Where merges were inverted, Tables 3 to 5 have lines for that, which need no setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unmerge.experiment.aggregation import (
    WAYS,
    Quantity,
    Summary,
    Way,
    choose,
    mean_and_std,
    paper_numbers,
    speaks_of,
    summarise,
)
from unmerge.experiment.claims import Claim, claims
from unmerge.experiment.layout import INVERSIONS
from unmerge.experiment.paper import facts
from unmerge.experiment.readings import (
    ALGORITHMS,
    COORDINATES,
    GROUPS,
    METHODS,
    OPTIONAL_MEASURES,
    TRAINED,
    Run,
    read_results,
    read_training,
)
from unmerge.experiment.results import Inversion, read_inversions
from unmerge.experiment.sheets import Sheet, to_csv, to_latex, to_markdown

MEASURE_NAMES = {
    "error": "Reconstruction error",
    "precision": "Precision",
    "recall": "Recall",
    "perfect_match": "Perfect match rate",
    "sparsity": "Sparsity",
    "coefficient_mae": "Coefficient error (MAE)",
    "unexplained": "Unexplained share",
    "rounding_floor": "Rounding floor",
}
INVERTED = "UNMERGE, inverted"
"""The label of inversions, where algorithms stand."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: its labels, and the quantities that share its cells."""

    labels: tuple[str, ...]
    quantities: tuple[Quantity, ...]


def write_tables(results: Path, output: Path) -> list[Path]:
    """Write the paper's tables with its numbers beside ours, and the tables that it lacks.

    Parameters
    ----------
    results : path
        Folder with ``results.parquet`` and ``training.json``, or the Parquet file beside ``training.json``. Lines of
        ``inversions.parquet`` are added if it lies beside them.
    output : path
        Folder to write to: three files per table, and ``tables.md`` with all of them.

    Returns
    -------
    list of path
        The files. The same results always give the same bytes.

    Raises
    ------
    UnmergeError
        The results are missing, or not of this experiment.
    MissingExtraError
        pyarrow is not installed.
    """
    runs = read_results(results)
    inversions = read_inversions((results if results.is_dir() else results.parent) / INVERSIONS)
    sheets = make_sheets(runs, read_training(results), facts(), inversions)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for sheet in sheets:
        forms = {"md": to_markdown(sheet), "csv": to_csv(sheet), "tex": to_latex(sheet)}
        written += [_write(output / f"{sheet.name}.{ending}", text) for ending, text in forms.items()]
    return [*written, _write(output / "tables.md", "\n".join(to_markdown(sheet) for sheet in sheets))]


def _write(path: Path, text: str) -> Path:
    # Bytes, not text: the same on systems that end lines in another way.
    path.write_bytes(text.encode("utf-8"))
    return path


class Book:
    """The results under all four ways of choosing, and the paper's numbers.

    Parameters
    ----------
    runs : sequence of Run
        All of them.
    paper : mapping
        What `unmerge.experiment.paper.facts` returns.
    """

    def __init__(self, runs: Sequence[Run], paper: Mapping[str, Any]) -> None:
        self.runs = runs
        self.paper = paper_numbers(paper)
        self.choices = {way: choose(runs, way) for way in WAYS}

    def summary(self, way: Way, quantity: Quantity) -> Summary:
        """Return a quantity as one way of choosing gives it."""
        return summarise(self.choices[way], quantity)


def make_sheets(
    runs: Sequence[Run],
    training: Sequence[Mapping[str, Any]],
    paper: Mapping[str, Any],
    inversions: Sequence[Inversion] = (),
) -> list[Sheet]:
    """Make all tables.

    Parameters
    ----------
    runs : sequence of Run
        The results.
    training : sequence of mapping
        One per seed and task: ``seed``, ``task``, ``loss_before``, ``loss_after``, ``relative_norm``.
    paper : mapping
        What `unmerge.experiment.paper.facts` returns.
    inversions : sequence of Inversion
        Without them there are no lines and no table of inversions.
    """
    book = Book(runs, paper)
    compared = [_compare(book, name, title, labels, lines) for name, title, labels, lines in _plans()]
    others = [_orderings(book), _settings(book), _training(training, paper), _failures(runs)]
    if not inversions:
        return [*compared, *others]
    return [*(_with_inversions(sheet, inversions) for sheet in compared), _inversions(inversions), *others]


def _plans() -> list[tuple[str, str, tuple[str, ...], list[Line]]]:
    """Return name, title, headings and lines of every table that has the paper's column."""
    by_method = ("Algorithm", "Merging")
    by_group = ("Algorithm", "Category")
    return [
        (
            "table-1-overall",
            "Table 1: overall performance",
            ("Algorithm", "Measure"),
            [
                Line((label, MEASURE_NAMES[measure]), (Quantity(measure, name),))
                for name, label in ALGORITHMS.items()
                for measure in ("error", "precision", "sparsity")
            ],
        ),
        (
            "table-2-nnls-by-category",
            "Table 2: performance by category (NNLS)",
            ("Measure", "Category"),
            [
                Line((MEASURE_NAMES[measure], label), (Quantity(measure, "nnls", group),))
                for measure in ("error", "precision", "recall", "perfect_match")
                for group, label in GROUPS.items()
            ],
        ),
        ("table-3-error-by-method", "Table 3: error on known merges", by_method, _lines_by_method("error")),
        ("table-4-error-by-category", "Table 4: error by category", by_group, _lines_by_group("error")),
        (
            "table-5-precision-recall",
            "Table 5: precision / recall on known merges",
            by_method,
            _lines_by_method("precision", "recall"),
        ),
        ("table-6-sparsity", "Table 6: number of components on known merges", by_method, _lines_by_method("sparsity")),
        (
            "coefficients-by-method",
            "Coefficient error on known merges (mean absolute; not in the paper)",
            by_method,
            _lines_by_method("coefficient_mae"),
        ),
        (
            "coefficients-by-category",
            "Coefficient error by category (mean absolute; not in the paper)",
            by_group,
            _lines_by_group("coefficient_mae"),
        ),
        (
            "rounding",
            "Unexplained share / rounding floor of NNLS (not in the paper)",
            ("Category", "Merging"),
            [
                Line(
                    (group_label, label),
                    tuple(Quantity(measure, "nnls", group, method) for measure in OPTIONAL_MEASURES),
                )
                for group, group_label in GROUPS.items()
                for method, label in METHODS.items()
            ],
        ),
    ]


def _lines_by_method(*measures: str) -> list[Line]:
    return [
        Line((label, method_label), tuple(Quantity(measure, name, "known", method) for measure in measures))
        for name, label in ALGORITHMS.items()
        for method, method_label in METHODS.items()
    ]


def _lines_by_group(*measures: str) -> list[Line]:
    return [
        Line((label, group_label), tuple(Quantity(measure, name, group) for measure in measures))
        for name, label in ALGORITHMS.items()
        for group, group_label in GROUPS.items()
    ]


def _compare(book: Book, name: str, title: str, labels: tuple[str, ...], lines: Sequence[Line]) -> Sheet:
    body, records = [], []
    in_paper = any(quantity in book.paper for line in lines for quantity in line.quantities)
    for line in lines:
        cells = [_paper_cell([book.paper.get(quantity) for quantity in line.quantities])] if in_paper else []
        for way in WAYS:
            summaries = [book.summary(way, quantity) for quantity in line.quantities]
            cells.append(_cell(line.quantities, summaries))
            records += [
                _record(labels, line, way, quantity, summary, book.paper.get(quantity))
                for quantity, summary in zip(line.quantities, summaries, strict=True)
            ]
        body.append((*line.labels, *cells))
    head = (*labels, *(["Paper"] if in_paper else []), *(way.label for way in WAYS))
    return Sheet(name, title, head, body, len(labels), [_coverage(book, lines)], records)


def _coverage(book: Book, lines: Sequence[Line]) -> str:
    """Say how many runs are behind a table, and how many of them failed."""
    quantities = [line.quantities[0] for line in lines]
    inside = [run for run in book.runs if any(speaks_of(quantity, run) for quantity in quantities)]
    merges = len({(run.seed, run.target) for run in inside})
    failed = sum(run.failure is not None for run in inside)
    return f"Mean ± population standard deviation over {merges} merges; {failed} of {len(inside)} runs failed."


def _decimals(measure: str) -> int:
    """Return the paper's two decimals, or three for a measure whose values are some hundredths."""
    return 3 if measure in ("coefficient_mae", *OPTIONAL_MEASURES) else 2


def _paper_cell(numbers: Sequence[tuple[float, float | None] | None]) -> str:
    given = [_spread(mean, std, 2) for mean, std in (number for number in numbers if number is not None)]
    return " / ".join(given) if len(given) == len(numbers) else "–"


def _cell(quantities: Sequence[Quantity], summaries: Sequence[Summary]) -> str:
    first = summaries[0]
    alone = len(summaries) == 1
    parts = [
        _spread(summary.mean, summary.std if alone else None, _decimals(quantity.measure))
        for quantity, summary in zip(quantities, summaries, strict=True)
        if summary.mean is not None
    ]
    if len(parts) == len(summaries):
        lost = f" ({first.lost} of {first.lost + first.merges} failed)" if first.lost else ""
        return " / ".join(parts) + lost
    if first.lost and not first.merges:
        return f"all {first.lost} failed"
    return "not measured" if any(summary.failed or summary.merges for summary in summaries) else "no runs"


def _spread(mean: float, std: float | None, decimals: int) -> str:
    return f"{mean:.{decimals}f}" + ("" if std is None else f" ± {std:.{decimals}f}")


def _record(
    labels: Sequence[str],
    line: Line,
    way: Way,
    quantity: Quantity,
    summary: Summary,
    paper: tuple[float, float | None] | None,
) -> dict[str, object]:
    paper_mean, paper_std = paper or (None, None)
    return {
        **{heading.lower(): label for heading, label in zip(labels, line.labels, strict=True)},
        "quantity": quantity.measure,
        "coordinates": way.coordinates,
        "chosen_by": way.chosen_by,
        "paper_mean": paper_mean,
        "paper_std": paper_std,
        "mean": summary.mean,
        "std": summary.std,
        "merges": summary.merges,
        "merges_failed": summary.lost,
        "runs_failed": summary.failed,
    }


def _with_inversions(sheet: Sheet, inversions: Sequence[Inversion]) -> Sheet:
    """Return Tables 3 to 5 with lines of inversions under those of the algorithms, and other tables as they are."""
    lines = [line for line in _inverted_lines(sheet.name) if _of(inversions, line.quantities[0])]
    if not lines:
        return sheet
    body, records = list(sheet.body), list(sheet.records)
    labels = sheet.head[: sheet.labels]
    for line in lines:
        summaries = [_summary(inversions, quantity) for quantity in line.quantities]
        # The inverted model is compared over all parameters, and there is no setting to choose.
        cells = ["–" if way.coordinates == "top_k" else _cell(line.quantities, summaries) for way in WAYS]
        body.append((*line.labels, "–", *cells))
        records += [
            _record(labels, line, way, quantity, summary, None)
            for way in WAYS
            if way.coordinates == "all"
            for quantity, summary in zip(line.quantities, summaries, strict=True)
        ]
    return replace(sheet, body=body, records=records, notes=[*sheet.notes, _inverted_note(inversions, lines)])


def _inverted_lines(name: str) -> list[Line]:
    """Return the lines of inversions for a table: none, if it is not the paper's Table 3, 4 or 5."""
    measures = {"table-3-error-by-method": ("error",), "table-5-precision-recall": ("precision", "recall")}
    if name in measures:
        return [
            Line((INVERTED, label), tuple(Quantity(measure, "inverted", "known", method) for measure in measures[name]))
            for method, label in METHODS.items()
        ]
    if name == "table-4-error-by-category":
        return [Line((INVERTED, label), (Quantity("error", "inverted", group),)) for group, label in GROUPS.items()]
    return []


def _of(inversions: Sequence[Inversion], quantity: Quantity) -> list[Inversion]:
    return [one for one in inversions if quantity.group in (None, one.group) and quantity.method in (None, one.method)]


def _summary(inversions: Sequence[Inversion], quantity: Quantity) -> Summary:
    cases = _of(inversions, quantity)
    failed = sum(one.failure is not None for one in cases)
    values = [value for one in cases if (value := getattr(one, quantity.measure)) is not None]
    mean, std = mean_and_std(values) if values else (None, None)
    return Summary(mean, std, len(values), failed, failed)


def _inverted_note(inversions: Sequence[Inversion], lines: Sequence[Line]) -> str:
    inside = {(one.seed, one.target): one for line in lines for one in _of(inversions, line.quantities[0])}
    seeds = ", ".join(str(seed) for seed in sorted({seed for seed, _ in inside}))
    failed = sum(one.failure is not None for one in inside.values())
    return (
        f"{INVERTED}: the model that the recovered recipe makes, over all parameters; {len(inside)} merges of seed "
        f"{seeds}, {failed} failed."
    )


_INVERSION_COLUMNS = {
    "precision": ("Precision", 2),
    "recall": ("Recall", 2),
    "weight_error": ("Largest weight error", 4),
    "equal_share": ("Equal elements", 5),
    "error": ("Reconstruction error", 5),
    "decoy_error": ("Decoys leave", 2),
    "seconds": ("Seconds", 0),
}
"""Measures of inversions in their own table: heading, and decimals."""


def _inversions(inversions: Sequence[Inversion]) -> Sheet:
    body, records = [], []
    for group, group_label in GROUPS.items():
        for method, label in METHODS.items():
            own = _of(inversions, Quantity("error", "inverted", group, method))
            if own:
                body.append((group_label, label, *_inversion_cells(own)))
        records += [_inversion_record(one) for one in inversions if one.group == group]
    head = (
        "Category",
        "Merging",
        "Merges",
        "Status",
        "Method right",
        *(name for name, _ in _INVERSION_COLUMNS.values()),
    )
    explained = (
        "Means over merges; the largest weight error is the largest of all. Decoys leave: share of the energy that "
        "decoded masks leave if the members are exchanged for others of their size, on sharp elements."
    )
    notes = [explained, _inverted_note(inversions, [Line((), (Quantity("error", "inverted"),))])]
    return Sheet("inversions", "Recipes recovered (not in the paper)", head, body, 2, notes, records)


def _inversion_cells(own: Sequence[Inversion]) -> list[str]:
    statuses = Counter(one.status or "failed" for one in own)
    said = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    right = sum(one.method_right is True for one in own)
    cells = [str(len(own)), said, f"{right} of {len(own)}"]
    for measure, (_, decimals) in _INVERSION_COLUMNS.items():
        values = [value for one in own if (value := getattr(one, measure)) is not None]
        shown = max if measure == "weight_error" else lambda found: mean_and_std(found)[0]
        cells.append(f"{shown(values):.{decimals}f}" if values else "–")
    return cells


def _inversion_record(one: Inversion) -> dict[str, object]:
    return {name: value for name, value in asdict(one).items() if name != "recipe"} | {
        "members": ", ".join(one.members)
    }


def _orderings(book: Book) -> Sheet:
    body, records = [], []
    for claim in claims():
        quantities = [quantity for _, quantity in claim.terms]
        judged = {"Paper": [book.paper.get(quantity, (None, None))[0] for quantity in quantities]}
        judged |= {way.label: [book.summary(way, quantity).mean for quantity in quantities] for way in WAYS}
        body.append((claim.text, *(f"{_verdict(claim, values)} ({_said(values)})" for values in judged.values())))
        records += [_claim_record(claim, source, values) for source, values in judged.items()]
    note = "Judged on the numbers rounded to two decimals, as printed, in the order that the claim names."
    head = ("Claim", "Paper", *(way.label for way in WAYS))
    return Sheet("orderings", "What the paper claims", head, body, 1, [note], records)


def _claim_record(claim: Claim, source: str, values: Sequence[float | None]) -> dict[str, object]:
    # JSON keeps claims of one and of eight numbers in one column.
    numbers = dict(zip((label for label, _ in claim.terms), values, strict=True))
    said = json.dumps(numbers, ensure_ascii=False)
    return {"claim": claim.text, "numbers_of": source, "verdict": _verdict(claim, values), "numbers": said}


def _verdict(claim: Claim, values: Sequence[float | None]) -> str:
    known = [round(value, 2) for value in values if value is not None]
    if len(known) < len(values):
        return "not measured"
    return "holds" if claim.holds(known) else "does not hold"


def _said(values: Sequence[float | None]) -> str:
    return ", ".join("–" if value is None else f"{value:.2f}" for value in values)


def _settings(book: Book) -> Sheet:
    tried: dict[tuple[str, str], None] = {}
    for run in sorted(book.runs, key=lambda run: (list(ALGORITHMS).index(run.algorithm), run.setting)):
        tried[run.algorithm, run.setting] = None
    counts = {
        way: Counter((one.best.algorithm, one.best.setting) for one in choices if one.best is not None)
        for way, choices in book.choices.items()
    }
    body, records = [], []
    for name, setting in tried:
        chosen = [counts[way][name, setting] for way in WAYS]
        body.append((ALGORITHMS[name], setting, *(str(count) for count in chosen)))
        records += [
            {"algorithm": ALGORITHMS[name], "setting": setting, "coordinates": way.coordinates}
            | {"chosen_by": way.chosen_by, "merges": count}
            for way, count in zip(WAYS, chosen, strict=True)
        ]
    note = "How many merges each setting was chosen for. Of equal settings the sparsest is taken, then the first."
    head = ("Algorithm", "Setting", *(way.label for way in WAYS))
    return Sheet("settings", "Settings chosen (not in the paper)", head, body, 2, [note], records)


def _training(training: Sequence[Mapping[str, Any]], paper: Mapping[str, Any]) -> Sheet:
    body, records = [], []
    for task in paper["tasks"]:
        own = [one for one in training if one["task"] == task["name"]]
        place = "dictionary" if task["in_dictionary"] else "unknown"
        numbers = {name: mean_and_std([one[name] for one in own]) if own else None for name in TRAINED}
        norms = [one["relative_norm"] for one in own]
        span = (min(norms), max(norms)) if norms else (None, None)
        body.append((task["name"], task["family"], place, *_training_cells(numbers)))
        records.append(
            {"task": task["name"], "family": task["family"], "place": place, "seeds": len(own)}
            | {f"{name}_mean": None if pair is None else pair[0] for name, pair in numbers.items()}
            | {f"{name}_std": None if pair is None else pair[1] for name, pair in numbers.items()}
            | {"relative_norm_min": span[0], "relative_norm_max": span[1]}
        )
    head = ("Task", "Family", "In", "Size beside the base (%)", "Loss before", "Loss after")
    return Sheet("training", "Adapters (not in the paper)", head, body, 3, [_span_note(training)], records)


def _training_cells(numbers: Mapping[str, tuple[float, float] | None]) -> list[str]:
    cells = []
    for name, pair in numbers.items():
        factor, decimals = (100.0, 2) if name == "relative_norm" else (1.0, 3)
        cells.append("no runs" if pair is None else _spread(pair[0] * factor, pair[1] * factor, decimals))
    return cells


def _span_note(training: Sequence[Mapping[str, Any]]) -> str:
    if not training:
        return "No adapter was trained."
    norms = [100 * one["relative_norm"] for one in training]
    seeds = len({one["seed"] for one in training})
    return (
        f"Mean ± population standard deviation over {seeds} seeds. Size: norm of the change over norm of the changed "
        f"weights, from {min(norms):.2f} % to {max(norms):.2f} %."
    )


def _failures(runs: Sequence[Run]) -> Sheet:
    counts = Counter(
        (ALGORITHMS[run.algorithm], METHODS[run.method], GROUPS[run.group], COORDINATES[run.coordinates], run.failure)
        for run in runs
        if run.failure is not None
    )
    keys = sorted(counts, key=lambda key: tuple(str(part) for part in key))
    head = ("Algorithm", "Merging", "Category", "Coordinates", "Reason", "Runs")
    body = [(*(str(part) for part in key), str(counts[key])) for key in keys]
    records = [dict(zip((name.lower() for name in head), (*key, counts[key]), strict=True)) for key in keys]
    note = f"{sum(counts.values())} of {len(runs)} runs failed. A failed run counts as nothing else."
    return Sheet("failures", "Failures", head, body, 5, [note], records)
