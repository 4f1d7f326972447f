"""The test of presence beside the pass that it rides on, on tensors as wide as a 7B model's.

Two layers with the attention shapes of Qwen2.5-7B and eight adapters of rank 32, of which four are in the merge. The
test's time is what keeping contacts adds to the pass, and the test itself; estimates and intervals come after it and
are printed apart. Medians; the two passes take turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge.attribution import Target, open_target
from unmerge.dictionary import Base, Dictionary, combine, open_atom, open_base
from unmerge.evidence.identifiability import alike_groups
from unmerge.findings import examine, presence_tests
from unmerge.regression import Regression, regress
from unmerge.solvers import Nnls, Solution
from unmerge.testing import quantise, write_adapter, write_checkpoint

SHAPES = {"q_proj": (3584, 3584), "k_proj": (512, 3584), "v_proj": (512, 3584), "o_proj": (3584, 3584)}
ATOMS, PRESENT, RANK = 8, 4, 32
LAYERS, REPEATS = 2, 5
Result = TypeVar("Result")
LIMIT = 1.0
"""Of the test's time over the pass's."""


def run() -> bool:
    """Print the test's time over the time of the statistics pass."""
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(limits=1):
        base, dictionary, target = _open(Path(folder))
        times = [_measure(base, dictionary, target) for _ in range(REPEATS)]
    plain, with_contacts, test, rest = (median(column) for column in zip(*times, strict=True))
    print_heading(f"The test of presence, {ATOMS} adapters of rank {RANK}, tensors of 3,584 columns")
    rows = [
        ["statistics pass", f"{plain:.3f}", "1"],
        ["keeping contacts", f"{with_contacts - plain:.3f}", f"{(with_contacts - plain) / plain:.2f}"],
        ["testing", f"{test:.3f}", f"{test / plain:.2f}"],
        ["weights, intervals and the rest", f"{rest:.3f}", f"{rest / plain:.2f}"],
    ]
    print_rows(["part", "seconds", "over the pass"], rows)
    return print_ratio("test over pass", (with_contacts - plain + test) / plain, LIMIT, "times")


def _open(folder: Path) -> tuple[Base, Dictionary, Target]:
    generator = np.random.default_rng(0)
    weights = {
        f"model.layers.{layer}.self_attn.{module}.weight": quantise(0.02 * generator.standard_normal(shape), "BF16")
        for layer in range(LAYERS)
        for module, shape in SHAPES.items()
    }
    write_checkpoint(folder / "base", weights)
    merged = dict(weights)
    for number in range(ATOMS):
        changes = write_adapter(folder / f"atom{number}", generator, weights, rank=RANK, size=0.012)
        if number < PRESENT:
            merged = {name: value + changes[name] / PRESENT for name, value in merged.items()}
    write_checkpoint(folder / "merge", merged)
    base = open_base(str(folder / "base"))
    atoms = [open_atom(str(folder / f"atom{number}"), base) for number in range(ATOMS)]
    return base, combine(base, atoms), open_target(str(folder / "merge"), base)


def _measure(base: Base, dictionary: Dictionary, target: Target) -> tuple[float, float, float, float]:
    """Return seconds of the pass without and with contacts, of the test, and of what follows it."""
    solver = Nnls(signed=False)

    def go(contacts: bool) -> Regression:
        return regress(target.vector, target.rows, dictionary, (), base, contacts=contacts)

    plain, _ = _timed(lambda: go(False))
    with_contacts, regression = _timed(lambda: go(True))
    solution: Solution = solver.solve(regression.total)
    groups = alike_groups(regression.total.gram)
    test, _ = _timed(lambda: presence_tests(regression, solution, groups, signed=False))
    whole, _ = _timed(lambda: examine(regression, solution, solver, target.vector, base))
    return plain, with_contacts, test, whole - test


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
