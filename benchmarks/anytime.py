"""Coefficients to +-0.01 from a sample of row blocks: what it reads and takes, and how often its intervals hold.

The cost is of a model with the attention shapes of Qwen2.5-7B, against the files' size. Coverage is counted on smaller
merges of four kinds, 200 orders of reading each, stopped by the same rule: how often the interval of a coefficient
holds what reading everything gives.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import seven_b
from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge import attribute
from unmerge.anytime import intervals, is_precise, looks
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.solvers import Nnls
from unmerge.statistics import Statistics

PRECISION = 0.01
BYTES_LIMIT, SECONDS_LIMIT = 0.02, 1.0
MODEL = 15.2e9
"""Bytes of all weights of Qwen2.5-7B in BF16."""
RUNS = 200
BLOCKS, ROWS, COLUMNS, RANK = 1200, 9, 256, 8
WEIGHTS = (0.5, 0.3, 0.15, 0.0)
Kind = Callable[[np.random.Generator, FloatArray], FloatArray]


def run(arguments: list[str] | None = None) -> bool:
    """Print bytes and seconds over their limits, and the coverage of the intervals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks anytime", description=__doc__)
    parser.add_argument("--layers", type=int, default=seven_b.LAYERS, help="of 28; fewer for a short run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    return _cost(options.layers, options.repeats, options.folder) & _coverage()


def _cost(layers: int, repeats: int, folder: Path | None) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        seven_b.write_models(place, layers, whole=False)
        atoms = [place / f"atom{number}" for number in range(seven_b.ATOMS)]
        adapters = sum(file.stat().st_size for file in place.glob("atom*/*.safetensors"))
        stored = adapters + sum(file.stat().st_size for file in place.glob("[bm]*/*.safetensors"))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = attribute(place / "merge", atoms, base=place / "base", precision=PRECISION)
            seconds.append(time.perf_counter() - start)
    read = int(next(text for text in found.notices if "bytes of weights" in text).split(" ")[0].replace(",", ""))
    print_heading(f"Anytime, shapes of Qwen2.5-7B, {layers} layers, {seven_b.ATOMS} adapters, {os.cpu_count()} cores")
    model = 2 * MODEL + adapters / layers * seven_b.LAYERS
    print_rows(
        ["of", "GB", "read"],
        [
            ["the files written here", f"{stored / 1e9:.2f}", f"{read / stored:.2%}"],
            ["two whole models and the adapters", f"{model / 1e9:.1f}", f"{read / model:.2%}"],
        ],
    )
    met = print_ratio("bytes read over those of the whole models", read / model, BYTES_LIMIT, "")
    return print_ratio("seconds, start-up not counted", median(seconds), SECONDS_LIMIT, "s") and met


def _linear(generator: np.random.Generator, atoms: FloatArray) -> FloatArray:
    return np.tensordot(WEIGHTS, atoms, 1) + 0.05 * atoms.std() * generator.standard_normal(atoms.shape[1:])


def _by_tensor(generator: np.random.Generator, atoms: FloatArray) -> FloatArray:
    own = np.asarray(WEIGHTS) * (1.0 + 0.4 * generator.standard_normal(len(WEIGHTS)))
    return np.tensordot(own, atoms, 1)


def _trimmed(generator: np.random.Generator, atoms: FloatArray) -> FloatArray:
    del generator
    kept = np.abs(atoms) > np.quantile(np.abs(atoms), 0.5, axis=(1, 2), keepdims=True)
    return np.tensordot(WEIGHTS, atoms * kept, 1)


def _dropped(generator: np.random.Generator, atoms: FloatArray) -> FloatArray:
    return np.tensordot(WEIGHTS, atoms * (generator.random(atoms.shape) < 0.2) / 0.2, 1)


KINDS: Mapping[str, Kind] = {
    "linear, rounded": _linear,
    "weights that differ by block": _by_tensor,
    "trimmed to half": _trimmed,
    "dropped at random to a fifth": _dropped,
}


def _population(generator: np.random.Generator, kind: Kind) -> list[Statistics]:
    """Return blocks of low-rank changes whose energies differ as those of tensors do."""
    found = []
    for _ in range(BLOCKS):
        size = np.exp(0.5 * generator.standard_normal((len(WEIGHTS), 1, 1)))
        left = generator.standard_normal((len(WEIGHTS), ROWS, RANK)) * size
        atoms = left @ generator.standard_normal((len(WEIGHTS), RANK, COLUMNS))
        merged = kind(generator, atoms)
        found.append(Statistics.of(atoms.reshape(len(WEIGHTS), -1).T, merged.ravel()))
    return found


def _coverage() -> bool:
    rows, worst = [], 1.0
    for label, kind in KINDS.items():
        blocks = _population(np.random.default_rng(0), kind)
        truth = Nnls(signed=False).solve(reduce(add, blocks)).coefficients
        held, read = np.zeros(len(WEIGHTS)), []
        for seed in range(RUNS):
            order = [blocks[place] for place in np.random.default_rng(seed).permutation(BLOCKS)]
            count = next(
                wanted for wanted in looks(BLOCKS) if is_precise(order[:wanted], BLOCKS, PRECISION, signed=False)
            )
            low, high = intervals(order[:count], BLOCKS, signed=False).T
            held += (low - 1e-12 <= truth) & (truth <= high + 1e-12)
            read.append(count)
        worst = min(worst, float(held.min()) / RUNS)
        rows.append([label, f"{median(read):.0f} of {BLOCKS}", ", ".join(f"{count / RUNS:.3f}" for count in held)])
    print_heading(f"Coverage of 95 % intervals to +-{PRECISION}, {RUNS} runs each")
    print_rows(["merge", "blocks read, median", "coverage of each coefficient"], rows)
    return print_ratio("what the worst coefficient lacks to 0.95, against 0.04", max(0.0, 0.95 - worst), 0.04, "")
