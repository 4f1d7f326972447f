"""``import unmerge`` takes under 0.5 s; its first use, four times as long as importing numpy and pydantic; no torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.table import print_heading, print_ratio

LIMIT_SECONDS = 0.5
LIMIT_TIMES = 4.0
"""A ratio does not depend on how fast a machine is at the moment."""
_PROBE = """
import sys, time
start = time.perf_counter()
import unmerge
imported = time.perf_counter()
import numpy, pydantic.main
needed = time.perf_counter()
for name in unmerge.__all__:
    getattr(unmerge, name)
used = time.perf_counter()
heavy = [name for name in ("torch", "sklearn", "transformers", "scipy") if name in sys.modules]
print(imported - start, needed - imported, used - imported, *heavy)
"""


@dataclass(frozen=True)
class StartUp:
    """What start-up costs.

    Attributes
    ----------
    seconds : float
        Of ``import unmerge``.
    times : float
        First use of every public name, its imports of numpy and pydantic included, over these two.
    heavy : tuple of str
        Heavy modules that came along.
    """

    seconds: float
    times: float
    heavy: tuple[str, ...]


def measure(runs: int = 5) -> StartUp:
    """Return medians over fresh processes."""
    found: list[tuple[float, float]] = []
    heavy: list[str] = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True).stdout
        imported, needed, used, *heavy = output.split()
        found.append((float(imported), float(used) / float(needed)))
    seconds, times = zip(*found[1:], strict=True)  # the first fills the file cache
    return StartUp(statistics.median(seconds), statistics.median(times), tuple(heavy))


def run() -> bool:
    """Print both against their limits."""
    print_heading("Start-up")
    found = measure()
    met = print_ratio("import unmerge, median of 5 processes", found.seconds, LIMIT_SECONDS, "s")
    first = print_ratio("first use over importing numpy and pydantic", found.times, LIMIT_TIMES, "times")
    sys.stdout.write(f"heavy modules imported: {', '.join(found.heavy) or 'none'}\n")
    return met and first and not found.heavy
