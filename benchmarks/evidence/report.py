"""What a part of the benchmark reports: tables, and limits that are met or not; in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.evidence.scoring import Share


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes
    ----------
    title : str
        What it shows, with what one must know to read it.
    header : sequence of str
        Of the columns; the first one holds the names of the rows.
    rows : sequence of sequences of str
        The cells.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Check:
    """A measured value against its limit.

    Attributes
    ----------
    what : str
        What was measured.
    value : float or None
        None if nothing was measured, which does not meet a limit.
    low, high : float or None
        The limits, both allowed themselves.
    """

    what: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within the limits."""
        if self.value is None:
            return False
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def limit(self) -> str:
        """The limits in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What is shown of it."""
        shown = "not measured" if self.value is None else f"{self.value:.4g}"
        return self.what, shown, self.limit, "met" if self.met else "NOT MET"


@dataclass(frozen=True, slots=True)
class Report:
    """What a part found."""

    title: str
    about: str
    tables: Sequence[Table]
    checks: Sequence[Check]

    @property
    def every_table(self) -> list[Table]:
        """The tables, and the limits, if any, as one more."""
        if not self.checks:
            return list(self.tables)
        limits = Table("Limits.", ("measured", "value", "limit", ""), [check.cells for check in self.checks])
        return [*self.tables, limits]


def percent(share: Share) -> str:
    """Return a share as text, with its counts."""
    return "" if share.value is None else f"{share.value:.3f} ({share})"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as text; nothing for none."""
    return "" if value is None else f"{value:.{digits}f}"


def show(report: Report, console: Console) -> None:
    """Print a report."""
    console.print(f"\n[bold]{report.title}[/bold]")
    for table in report.every_table:
        shown = RichTable(title=table.title, title_justify="left", title_style="", header_style="bold")
        for place, name in enumerate(table.header):
            shown.add_column(name, justify="right" if place else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(report: Report) -> Iterator[str]:
    """Yield the lines of a section of the page."""
    yield from (f"## {report.title}", "", report.about, "")
    for table in report.every_table:
        yield from (table.title, "")
        yield f"| {' | '.join(table.header)} |"
        yield f"|---|{'---:|' * (len(table.header) - 1)}"
        yield from (f"| {' | '.join(row)} |" for row in table.rows)
        yield ""
