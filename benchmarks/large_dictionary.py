"""A dictionary of 1,000 adapters beside one of eight: the time of an answer, of adding one more, and memory.

Attention matrices with the shapes of Qwen2.5-7B, adapters of rank 16 in BF16, a merge of four of them. The whole
answer (`unmerge.attribute`, with the opening of all files) with the large dictionary over that with the small one;
adding one atom over opening the base and reading that atom, header, bytes and digest, as any use must; the peak of
a fresh process; and the answer with a part of the atoms beside that of all of them compared on all parameters. Medians;
the measurements take turns. An adapter takes 0.7 MB a layer and is kept once: with all 28 layers, 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.seven_b import ATTENTION
from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge import Attribution, attribute, dictionary
from unmerge.testing import quantise, write_checkpoint, write_safetensors

FloatArray32 = NDArray[np.float32]

ATOMS, FEW, RANK, WEIGHTS = 1000, 8, 16, (0.4, 0.3, 0.2, 0.1)
NEW = 12
PIECE = 20
"""Adapters that are written before the dictionary takes them and they are deleted."""
TIMES, ADDING, MEMORY, APART = 5.0, 1.5, 2e9, 1e-3
"""Limits: of the two times, of bytes, and of the difference between coefficients."""
_PROBE = """
import re, sys
from pathlib import Path
import unmerge
unmerge.attribute(sys.argv[1] + "/merge", [sys.argv[1] + "/large"], base=sys.argv[1] + "/base")
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def run(arguments: list[str] | None = None) -> bool:
    """Print the times, the peak of memory and the differences, over their limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks large_dictionary", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of 28; 0.7 GB of disk each")
    parser.add_argument("--atoms", type=int, default=ATOMS)
    parser.add_argument("--compared", type=int, default=96, help="atoms of the comparison with the full solution")
    parser.add_argument("--repeats", type=int, default=5, help=f"at most {NEW}: each adds another adapter")
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _write(folder, options.layers, options.atoms, options.compared)
        os.sync()  # else the disk is busy with what was written here while the rest is measured
        times = [_measure(folder, number) for number in range(options.repeats)]
        peak = int(subprocess.check_output([sys.executable, "-c", _PROBE, str(folder)]))
        screened, full = (
            attribute(folder / "merge", [folder / "some"], base=folder / "base", exact=exact) for exact in (False, True)
        )
    middle = {part: median(found[part] for found in times) for part in times[0]}
    shapes = f"shapes of Qwen2.5-7B, {options.layers} layers"
    print_heading(f"{options.atoms} adapters of rank {RANK}, {shapes}, {os.cpu_count()} threads")
    print_rows(["part", "seconds"], [[part, f"{seconds:.3f}"] for part, seconds in middle.items()])
    answers, adding = middle["answer"] / middle["answer of eight"], middle["adding"] / middle["reading"]
    met = print_ratio("answering with all over with eight", answers, TIMES, "times")
    met &= print_ratio("adding one over opening the base and reading it", adding, ADDING, "times")
    sys.stdout.write(f"adding one over reading its bytes: {middle['adding'] / middle['bytes']:.1f} times\n")
    met &= print_ratio("peak memory of the process", peak / 1e9, MEMORY / 1e9, "GB")
    return _same(screened, full) and met


def _measure(folder: Path, number: int) -> dict[str, float]:
    """Return the seconds of each part, measured one after the other."""
    base, new = folder / "base", folder / f"new{number}"

    def answer(known: str) -> Callable[[], object]:
        return lambda: attribute(folder / "merge", [folder / known], base=base)

    def read() -> None:
        dictionary.open_atom(str(new), dictionary.open_base(str(base)))

    def bytes_of() -> None:
        for file in new.iterdir():
            file.read_bytes()

    return {
        "answer of eight": _seconds(answer("small")),
        "answer": _seconds(answer("large")),
        "bytes": _seconds(bytes_of),
        "reading": _seconds(read),
        "adding": _seconds(
            lambda: dictionary.add(folder / "large", [str(new)], str(base), workers=os.cpu_count() or 1)
        ),
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _same(screened: Attribution, full: Attribution) -> bool:
    """Print how far the screened answer is from the full one."""
    first, second = ({item.name: item for item in found.components} for found in (screened, full))
    named = [{name for name, item in found.items() if item.present} for found in (first, second)]
    present = len(named[0] ^ named[1])
    apart = max(abs(item.coefficient - second[name].coefficient) for name, item in first.items())
    weights = max((abs((first[name].weight or 0.0) - (second[name].weight or 0.0)) for name in named[1]), default=0.0)
    met = print_ratio(f"atoms of {len(first)} present in one of the answers only", present, 0.5, "atoms")
    met &= print_ratio("largest difference of coefficients", apart, APART, "")
    return print_ratio("largest difference of present weights", weights, APART, "") and met


def _write(folder: Path, layers: int, atoms: int, compared: int) -> None:
    """Write the base, three dictionaries, new adapters, and a merge of the first four."""
    generator = np.random.default_rng(0)
    # Slices of one pool are as good as new draws, and quick: what is measured does not depend on the values.
    pool = quantise(0.02 * generator.standard_normal(1 << 24), "BF16").astype(np.float32)
    base = {
        f"model.layers.{layer}.self_attn.{module}.weight": _draw(pool, generator, shape)
        for layer in range(layers)
        for module, shape in ATTENTION.items()
    }
    write_checkpoint(folder / "base", base)
    goal = {name: weight.copy() for name, weight in base.items()}
    shapes = {name: weight.shape for name, weight in base.items()}
    del base
    for start in range(0, atoms, PIECE):
        paths = []
        for number in range(start, min(atoms, start + PIECE)):
            paths.append(folder / f"atom{number:04d}")
            factors = _write_adapter(paths[-1], pool, generator, shapes)
            for name, (left, right) in factors.items() if number < len(WEIGHTS) else ():
                goal[name] += np.float32(WEIGHTS[number]) * (left @ right)
        _keep(folder / "small", paths[: max(0, FEW - start)], folder / "base")
        _keep(folder / "some", paths[: max(0, compared - start)], folder / "base")
        _keep(folder / "large", paths, folder / "base")
        for path in paths:
            shutil.rmtree(path)
    write_checkpoint(folder / "merge", goal)
    for number in range(NEW):
        _write_adapter(folder / f"new{number}", pool, generator, shapes)


def _draw(pool: FloatArray32, generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray32:
    size = math.prod(shape)
    start = int(generator.integers(len(pool) - size))
    return pool[start : start + size].reshape(shape)


def _write_adapter(
    folder: Path, pool: FloatArray32, generator: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[FloatArray32, FloatArray32]]:
    """Write an adapter of random factors, and return them: left, right."""
    factors = {}
    for name, (rows, columns) in shapes.items():
        factors[name] = (_draw(pool, generator, (rows, RANK)), _draw(pool, generator, (RANK, columns)))
    stored = {}
    for name, (left, right) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        stored[f"{module}.lora_A.weight"], stored[f"{module}.lora_B.weight"] = right, left
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(ATTENTION)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", stored)
    return factors


def _keep(path: Path, adapters: Sequence[Path], base: Path) -> None:
    if adapters:
        verb = dictionary.add if path.exists() else dictionary.build
        verb(path, [str(adapter) for adapter in adapters], str(base), workers=os.cpu_count() or 1)
