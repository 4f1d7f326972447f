"""A table in three forms: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table, ready to be written.

    Attributes
    ----------
    head, body : sequence of cells
        As people read them, rounded.
    labels : int
        How many of the first columns are labels; the others are centred.
    records : sequence of mapping
        The same numbers unrounded, for the CSV.
    """

    name: str
    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    labels: int
    notes: Sequence[str]
    records: Sequence[Mapping[str, object]]


def to_markdown(sheet: Sheet) -> str:
    """Return a table as Markdown, under its title and with its notes."""
    rule = ["---" if number < sheet.labels else ":---:" for number in range(len(sheet.head))]
    lines = [_markdown_line(row) for row in (sheet.head, rule, *sheet.body)]
    return "\n".join([f"### {sheet.title}", "", *lines, "", *sheet.notes, ""])


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def to_csv(sheet: Sheet) -> str:
    """Return a table's numbers as CSV, one per row and not rounded; what was not measured is empty."""
    text = io.StringIO()
    columns = list(sheet.records[0]) if sheet.records else [heading.lower() for heading in sheet.head]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sheet.records)
    return text.getvalue()


def to_latex(sheet: Sheet) -> str:
    """Return a table as LaTeX: a ``table`` with a ``tabular`` between the rules of the package booktabs."""
    columns = "l" * sheet.labels + "c" * (len(sheet.head) - sheet.labels)
    caption = " ".join((f"{sheet.title}.", *sheet.notes))
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            "\\footnotesize",
            f"\\caption{{{latex_text(caption)}}}",
            f"\\label{{tab:{sheet.name}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            _latex_line(sheet.head),
            "\\midrule",
            *(_latex_line(row) for row in sheet.body),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(latex_text(cell) for cell in cells) + " \\\\"


LATEX = str.maketrans(
    {
        "\\": "\\textbackslash{}",
        "&": "\\&",
        "%": "\\%",
        "$": "\\$",
        "#": "\\#",
        "_": "\\_",
        "{": "\\{",
        "}": "\\}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": "$\\pm$",
        "≤": "$\\leq$",
        "–": "--",
        "|": "$|$",
        '"': "\\textquotedbl{}",
    }
)


def latex_text(text: str) -> str:
    """Return text that LaTeX sets as it is."""
    return " ".join(text.split()).translate(LATEX)
