"""The cost of an answer as the work grows: layers times 1, 2, 4, 8, and atoms times 8, 64, 512.

Attention matrices of Qwen2.5-7B, which the adapters of rank 16 in a built dictionary change all: over every parameter.
Of more than 64 adapters those that show in sketches are compared, as users get it; with ``--exact`` all are, one with
another. Each measurement is a process of its own, which tells the time of the answer (start-up not counted) and the
peak of its memory. A slope is that of the logarithm over the logarithm of the size, by least squares on all
measurements, with its standard error: 1 is a cost that grows as the work does, less is one that grows more slowly.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.scaling_figure import write_figure
from benchmarks.seven_b import build_dictionary, write_models
from benchmarks.table import print_heading, print_ratio, print_rows

LAYERS = (1, 2, 4, 8)
ATOMS = (8, 64, 512)
RANK = 16
LIMIT = 1.0
"""Of a slope, its standard error taken off twice: no cost may grow faster than the work."""
_PROBE = """
import re, sys, time
from pathlib import Path
import unmerge
start = time.perf_counter()
unmerge.attribute(sys.argv[1] + "/merge", [sys.argv[1] + "/known"], base=sys.argv[1] + "/base",
                  exact=sys.argv[2] == "True")
seconds = time.perf_counter() - start
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@dataclass(frozen=True)
class Point:
    """Measurements of one size: seconds, and bytes at the peak, of each process."""

    size: int
    seconds: tuple[float, ...]
    memory: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """What a cost does as one thing grows; `unit` names that thing."""

    unit: str
    points: tuple[Point, ...]

    def slope(self, cost: str) -> tuple[float, float]:
        """Return the slope of ``seconds`` or ``memory`` in logarithms, and its standard error."""
        pairs = [(point.size, value) for point in self.points for value in getattr(point, cost)]
        size, value = np.log(np.array(pairs, dtype=np.float64)).T
        centered = size - size.mean()
        slope = float(centered @ value / (centered @ centered))
        rest = value - value.mean() - slope * centered
        return slope, float(np.sqrt(rest @ rest / (len(rest) - 2) / (centered @ centered)))


def run(arguments: list[str] | None = None) -> bool:
    """Print times, memory and slopes; tell whether no slope is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="two sizes or more, with 8 atoms")
    parser.add_argument("--atoms", type=int, nargs="+", default=ATOMS, help="two sizes or more, with one layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", action="store_true", help="compare all atoms, whatever their sketches say")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; a temporary folder by default")
    parser.add_argument("--figure", type=Path, help="draw the curves too, as docs/figures/scaling.png")
    options = parser.parse_args(arguments or [])
    print_heading(f"Cost as the work grows, adapters of rank {RANK}, {os.cpu_count()} threads")
    curves = (
        _curve("layers", [(layers, layers, ATOMS[0]) for layers in options.layers], options),
        _curve("atoms", [(atoms, 1, atoms) for atoms in options.atoms], options),
    )
    if options.figure:
        write_figure(curves, options.figure)
    met = [_print_slope(curve, cost) for curve in curves for cost in ("seconds", "memory")]
    return all(met)


def _curve(unit: str, sizes: Sequence[tuple[int, int, int]], options: argparse.Namespace) -> Curve:
    """Measure each (size, layers, atoms), and print the medians."""
    curve = Curve(unit, tuple(_measure(*size, options) for size in sizes))
    rows = []
    for point, before in zip(curve.points, (None, *curve.points[:-1]), strict=True):
        times = f"{median(point.seconds) / median(before.seconds):.2f}" if before else ""
        rows.append([str(point.size), f"{median(point.seconds):.2f}", times, f"{median(point.memory) / 1e9:.3f}"])
    print_rows([unit, "seconds", "times those before", "peak memory, GB"], rows)
    return curve


def _measure(size: int, layers: int, atoms: int, options: argparse.Namespace) -> Point:
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_models(folder, layers, whole=False, atoms=atoms, rank=RANK)
        build_dictionary(folder, os.cpu_count() or 1, atoms)
        _probe(folder, options.exact)  # what was written is in the page cache from here on
        found = [_probe(folder, options.exact) for _ in range(options.repeats)]
    return Point(size, tuple(seconds for seconds, _ in found), tuple(memory for _, memory in found))


def _probe(folder: Path, exact: bool) -> tuple[float, float]:
    command = [sys.executable, "-c", _PROBE, str(folder), str(exact)]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(peak)


def _print_slope(curve: Curve, cost: str) -> bool:
    slope, error = curve.slope(cost)
    what = f"slope of {cost} over {curve.unit}, {slope:.2f} with a standard error of {error:.2f}, less two of these"
    return print_ratio(what, slope - 2.0 * error, LIMIT, "")
