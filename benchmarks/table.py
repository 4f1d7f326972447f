"""How benchmarks print what they measured."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import numpy as np


def print_heading(title: str) -> None:
    """Print a title and the machine."""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    sys.stdout.write(f"\n{title}\n{platform.machine()}, {platform.system()}, {versions}\n")


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table in Markdown."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"| {cells} |\n")


def print_ratio(what: str, value: float, limit: float, unit: str) -> bool:
    """Print a measured value over its limit, and tell whether the limit is kept."""
    met = value <= limit
    verdict = "within" if met else "OVER"
    sys.stdout.write(f"{what}: {value:.4g} {unit}, {value / limit:.2f} of the limit {limit:g} {unit}: {verdict}\n")
    return met
