"""The search for the seed of a merge's masks: seeds per second, and minutes for all 2^32 of them.

Among the first draws, and a hundred million draws on, where the observations are parities of the seeded state; with no
observation wrong, and with a few. A slice of the seeds is tested, which holds the one that is looked for, and the time
of the whole extrapolated from processor seconds, shared by two cores. Beside it, a plain loop over seeds with numpy's
generator, which can only look among the first draws. What is compiled and prepared before is printed apart. Medians;
the cases take turns.

``python -m benchmarks seed_search --full`` tests all seeds once, a hundred million draws on, on all cores.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge.recipe.mersenne import NEAR, parity_masks
from unmerge.recipe.seed_search import SCALE, SEEDS, search

SLICE = 2**22
"""Seeds that are tested at a time."""
REPEATS = 5
LOOPED = 2**13
"""Seeds of the plain loop."""
CORES = 2
LIMIT_MINUTES = 10.0
"""For all seeds, on `CORES` cores."""
FAR = 10**8


@dataclass(frozen=True, slots=True)
class Case:
    """Observations of a mask, at density `density`, of which `wrong` are wrong."""

    name: str
    first: int
    last: int
    count: int
    wrong: int
    density: float = 0.5


CASES = (
    Case("among the first draws", 0, NEAR, 64, 0),
    Case("the same, 5 % wrong", 0, NEAR, 64, 3),
    Case("10^8 draws on", FAR, FAR + 10**6, 64, 0),
    Case("the same, 5 % wrong", FAR, FAR + 10**6, 64, 3),
    Case("the same, density 0.3", FAR, FAR + 10**6, 128, 2, 77 / 256),
    Case("192, density 0.1", FAR, FAR + 10**6, 192, 2, 0.1),
    Case("the same, 5 % wrong", FAR, FAR + 10**6, 192, 9, 0.1),
    Case("the same, density 0.9", FAR, FAR + 10**6, 192, 9, 0.9),
    Case("the same, density 0.3", FAR, FAR + 10**6, 192, 9, 77 / 256),
    Case("the same, density 0.5", FAR, FAR + 10**6, 192, 9),
)
Seen = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(*, full: bool = False) -> bool:
    """Print seeds per second and the minutes of a whole search against their limit; make one where `full`."""
    print_heading("The search for a seed")
    _compile()
    looped = _loop()
    sys.stdout.write(f"a loop over seeds with numpy's generator, one core: {looped:,.0f} seeds/s\n")
    rows, minutes = [], []
    turns = [[_measure(case) for case in CASES] for _ in range(REPEATS)]
    for case, measured in zip(CASES, zip(*turns, strict=True), strict=True):
        prepared, rate = (median(values) for values in zip(*measured, strict=True))
        minutes.append(SEEDS / (CORES * rate) / 60.0)
        shown = [f"{case.count}, {case.wrong}", f"{prepared:.2f}", f"{rate / 1e6:.1f}"]
        rows.append([case.name, *shown, f"{rate / looped:.0f}", f"{minutes[-1]:.1f}"])
    header = ["observations", "of them, wrong", "prepared in s", "10^6 seeds/s, one core", "over the loop", "minutes"]
    print_rows(header, rows)
    met = print_ratio(f"all seeds on {CORES} cores, the slowest", max(minutes), LIMIT_MINUTES, "min")
    return _complete(CASES[2]) and met if full else met


def _observe(case: Case, seed: int) -> Seen:
    """Return what is seen of a mask: as many kept elements as dropped ones, as `unmerge.recipe.mask_seed` chooses."""
    rng = np.random.default_rng(0)
    threshold = int(case.density * SCALE)
    twister = np.random.MT19937()
    np.random.RandomState(twister).seed(seed)
    twister.random_raw(case.first, output=False)
    below = (twister.random_raw(case.last - case.first) & (SCALE - 1)) < threshold
    half = case.count // 2
    kinds = ((np.flatnonzero(below), half), (np.flatnonzero(~below), case.count - half))
    chosen = np.sort(np.concatenate([rng.choice(kind, count, replace=False) for kind, count in kinds]))
    kept = below[chosen]
    kept[rng.choice(case.count, case.wrong, replace=False)] ^= True
    return case.first + chosen, np.full(case.count, threshold, dtype=np.uint32), kept


def _compile() -> None:
    began = time.process_time()
    for case in (CASES[0], Case("", 20_000, 30_000, 64, 0)):
        search(*_observe(case, 1), count=2)
    compiled = time.process_time() - began
    began = time.process_time()
    parity_masks(2**40, range(24))
    masked = time.process_time() - began
    sys.stdout.write(f"compiled in {compiled:.1f} s; the 24 parities of draw 2^40 in {1e3 * masked:.1f} ms\n")


def _loop() -> float:
    """Return seeds per second of a plain loop: seed the generator, and compare the first draws."""
    indices, thresholds, kept = _observe(CASES[0], LOOPED - 1)
    twister = np.random.MT19937()
    legacy = np.random.RandomState(twister)  # seeds as torch does
    found = []
    began = time.process_time()
    for seed in range(LOOPED):
        legacy.seed(seed)
        draws = twister.random_raw(NEAR)[indices] & (SCALE - 1)
        if ((draws < thresholds) == kept).all():
            found.append(seed)
    seconds = time.process_time() - began
    assert found == [LOOPED - 1]
    return LOOPED / seconds


def _measure(case: Case) -> tuple[float, float]:
    """Return seconds that a search takes before its first seed, and seeds per processor second after that."""
    seed = 3 * 2**30 + 1
    seen = _observe(case, seed)
    tolerated = (case.wrong + 0.5) / case.count
    began = time.process_time()
    search(*seen, first=seed, count=1, tolerated=tolerated)
    prepared = time.process_time() - began
    began = time.process_time()
    result = search(*seen, first=seed - SLICE // 2, count=SLICE, tolerated=tolerated)
    assert result.seeds == (seed,)
    return prepared, SLICE / (time.process_time() - began - prepared)


def _complete(case: Case) -> bool:
    """Test all seeds for the observations of one."""
    seed = int(np.random.default_rng().integers(SEEDS))
    began = time.perf_counter()
    result = search(*_observe(case, seed), tolerated=(case.wrong + 0.5) / case.count)
    seconds = time.perf_counter() - began
    chance = f"{result.expected_by_chance:.1g} expected by chance"
    sys.stdout.write(
        f"{result.tested:,} seeds tested in {seconds:.0f} s, planted {seed}, found {result.seeds}, {chance}\n"
    )
    return result.seeds == (seed,)
