"""Measurements side by side in several processes, with progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Row = TypeVar("Row")


def measured(measure: Callable[[Item], Row], items: Sequence[Item], label: str, jobs: int) -> Iterator[Row]:
    """Yield the row of each item as soon as it is known; with several jobs, in any order."""
    rows = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(measure)(item) for item in items)
    console = Console(stderr=True)
    yield from track(rows, label, total=len(items), console=console, disable=not sys.stderr.isatty())
