"""``import unmerge`` takes under 0.5 s and does not import torch."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.table import print_heading, print_ratio

LIMIT_SECONDS = 0.5
_PROBE = """
import sys, time
start = time.perf_counter()
import unmerge
seconds = time.perf_counter() - start
heavy = [name for name in ("torch", "sklearn", "transformers", "scipy") if name in sys.modules]
print(seconds, *heavy)
"""


def measure(runs: int = 5) -> tuple[float, list[str]]:
    """Return the median seconds of a fresh import, and the heavy modules that it pulled in."""
    seconds: list[float] = []
    heavy: list[str] = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True).stdout
        first, *heavy = output.split()
        seconds.append(float(first))
    return statistics.median(seconds[1:]), heavy  # the first fills the file cache


def run() -> bool:
    """Print the import time against its limit."""
    print_heading("Start-up")
    seconds, heavy = measure()
    met = print_ratio("import unmerge, median of 5 processes", seconds, LIMIT_SECONDS, "s")
    sys.stdout.write(f"heavy modules imported: {', '.join(heavy) or 'none'}\n")
    return met and not heavy
