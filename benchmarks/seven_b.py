"""Exact attribution of a model with the shapes of Qwen2.5-7B, beside what it cannot do without.

The attention matrices of 28 layers (822 M parameters, 1.6 GB in BF16), eight adapters of rank 32 in a dictionary:
the time of the pass, after which exact coefficients are known, the same with the contacts that the test of presence
needs, and the whole answer, over the longer of reading its bytes and the one large GEMM at the rate that this machine's
sgemm reaches on the same shapes. With ``--whole``, all 7.6 G parameters are compared, over reading them. Medians; the
measurements take turns. The checkpoints are synthetic, written before and deleted after.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge import attribute, dictionary
from unmerge.attribution import open_target
from unmerge.dictionary import open_base, open_dictionary
from unmerge.regression import regress
from unmerge.testing import encode

HIDDEN, KEYS, INNER, VOCABULARY, LAYERS = 3584, 512, 18944, 152_064, 28
ATTENTION = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KEYS, HIDDEN), "v_proj": (KEYS, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
OTHERS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ATOMS, PRESENT, RANK = 8, 4, 32
LIMIT = 1.5
"""Of the time over the longer of reading and the GEMM."""
MEMORY = 10**9
"""Bytes of the process at its peak."""
PIECE = 1 << 22
_PROBE = """
import re, sys, time
from pathlib import Path
start = time.perf_counter()
import unmerge
seconds = time.perf_counter() - start
unmerge.attribute(sys.argv[1] + "/merge", [sys.argv[1] + "/known"], base=sys.argv[1] + "/base")
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
Bits = NDArray[np.uint16]


def run(arguments: list[str] | None = None) -> bool:
    """Print times over their limits, and the peak of memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks seven_b", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of 28; fewer for a short run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="compare all tensors (30 GB of disk)")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_models(folder, options.layers, whole=options.whole)
        build_dictionary(folder, threads)
        times = [_measure(folder, threads, whole=options.whole) for _ in range(options.repeats)]
        startup, peak = _probe(folder)
    middle, spent = ({part: median(found[part][kind] for found in times) for part in times[0]} for kind in (0, 1))
    print_heading(f"Shapes of Qwen2.5-7B, {options.layers} layers, {ATOMS} adapters of rank {RANK}, {threads} threads")
    limit = max(middle["reading"], 0.0 if options.whole else middle["GEMM"])
    print_rows(
        ["part", "seconds", "over the longer of reading and GEMM", "CPU seconds", "over the GEMM's"],
        [
            [part, f"{middle[part]:.3f}", f"{middle[part] / limit:.2f}", f"{spent[part]:.3f}",
             f"{spent[part] / spent['GEMM']:.2f}"]
            for part in middle
        ],
    )  # fmt: skip
    sys.stdout.write(f"import unmerge in a fresh process: {startup:.2f} s, not counted above\n")
    what = "comparing all tensors over reading them" if options.whole else "the pass over its limit"
    met = print_ratio(what, middle["pass"] / limit, LIMIT, "times")
    met &= print_ratio("the same with contacts", middle["pass, with contacts"] / limit, LIMIT, "times")
    met &= print_ratio("the whole answer over the same", middle["answer"] / limit, LIMIT, "times")
    return print_ratio("peak memory of the process", peak / 1e9, MEMORY / 1e9, "GB") and met


def _measure(folder: Path, threads: int, *, whole: bool) -> dict[str, tuple[float, float]]:
    """Return seconds, and CPU seconds of all threads, of each part, measured one after the other."""
    base = open_base(str(folder / "base"))
    known = open_dictionary(folder / "known", base)
    goal = open_target(str(folder / "merge"), base)

    def go(*, contacts: bool = False) -> None:
        regress(goal.vector, goal.rows, known, (), base, exact=whole, contacts=contacts, workers=threads)

    def answer() -> None:
        attribute(folder / "merge", [folder / "known"], base=folder / "base", exact=whole, workers=threads)

    return {
        "reading": _seconds(lambda: _read(folder, threads)),
        "GEMM": _gemm_seconds(_elements(folder)),
        "pass": _seconds(go),
        "pass, with contacts": _seconds(lambda: go(contacts=True)),
        "answer": _seconds(answer),
    }


def _seconds(work: Callable[[], None]) -> tuple[float, float]:
    start, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - spent


def _read(folder: Path, threads: int) -> None:
    """Read all weights into reused memory, as many files at once as there are threads."""

    def read(file: Path) -> None:
        buffer = bytearray(PIECE)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    files = [*sorted((folder / "base").glob("*.safetensors")), *sorted((folder / "merge").glob("*.safetensors"))]
    files += sorted((folder / "known" / "atoms").rglob("*.safetensors"))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, files))


def _gemm_seconds(elements: int) -> tuple[float, float]:
    """Return how long the products of so many elements with all right factors take at sgemm's rate, all threads."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((HIDDEN, HIDDEN), dtype=np.float32)
    factors = generator.standard_normal((HIDDEN, ATOMS * RANK), dtype=np.float32)
    out = np.empty((HIDDEN, ATOMS * RANK), np.float32)
    np.matmul(values, factors, out=out)
    rounds = 5

    def work() -> None:
        for _ in range(rounds):
            np.matmul(values, factors, out=out)

    seconds, spent = _seconds(work)
    scale = elements / values.size / rounds
    return seconds * scale, spent * scale


def _elements(folder: Path) -> int:
    base = open_base(str(folder / "base"))
    return sum(
        rows * columns
        for name, (rows, columns) in base.shapes.items()
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in ATTENTION
    )


def _probe(folder: Path) -> tuple[float, int]:
    """Return the seconds of the import and the peak memory of a process that answers once."""
    command = [sys.executable, "-c", _PROBE, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, peak = re.findall(r"[\d.e+-]+", output)
    return float(seconds), int(peak)


@dataclass(frozen=True)
class _Pool:
    """Random weights that tensors are cut from: what is measured does not depend on their values."""

    bits: Bits

    @classmethod
    def draw(cls, generator: np.random.Generator) -> _Pool:
        return cls(encode(0.02 * generator.standard_normal(1 << 24), "BF16"))

    def take(self, count: int, place: int) -> Bits:
        return np.resize(np.roll(self.bits, -place), count)


def write_models(folder: Path, layers: int, *, whole: bool, atoms: int = ATOMS, rank: int = RANK) -> None:
    """Write the base, the adapters and the merge of the first `PRESENT` of them."""
    generator = np.random.default_rng(0)
    pool = _Pool.draw(generator)
    adapters: list[dict[str, NDArray[np.float32]]] = [{} for _ in range(atoms)]
    for layer in range(layers):
        shards = {"base": {}, "merge": {}}  # type: dict[str, dict[str, Bits]]
        for name, shape in _shapes(layer, layers, whole=whole):
            bits = pool.take(shape[0] * shape[1], int(generator.integers(1 << 24))).reshape(shape)
            change = np.zeros(0, np.float32)
            if name.rsplit(".", 2)[1] in ATTENTION:
                change = _adapt(generator, adapters, name, shape, rank)
            shards["base"][name] = bits
            shards["merge"][name] = _merged(bits, change) if change.size else bits ^ np.uint16(1)
        for model, tensors in shards.items():
            _write_file(folder / model / f"layer{layer:02d}.safetensors", tensors, "BF16")
    for model in ("base", "merge"):
        (folder / model / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION)}
    for number, tensors in enumerate(adapters):
        _write_file(folder / f"atom{number}" / "adapter_model.safetensors", tensors, "F32")
        (folder / f"atom{number}" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _shapes(layer: int, layers: int, *, whole: bool) -> Iterator[tuple[str, tuple[int, int]]]:
    for module, shape in ATTENTION.items():
        yield f"model.layers.{layer}.self_attn.{module}.weight", shape
    for module, shape in OTHERS.items() if whole else ():
        yield f"model.layers.{layer}.mlp.{module}.weight", shape
    if whole and layer == layers - 1:
        yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
        yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _adapt(
    generator: np.random.Generator,
    adapters: list[dict[str, NDArray[np.float32]]],
    name: str,
    shape: tuple[int, int],
    rank: int,
) -> NDArray[np.float32]:
    """Draw all adapters' factors of one tensor, and return what a merge of the present ones adds to it."""
    change = np.zeros(shape, np.float32)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    for number, tensors in enumerate(adapters):
        left = np.float32(0.012) * generator.standard_normal((shape[0], rank), dtype=np.float32)
        right = np.float32(0.012) * generator.standard_normal((rank, shape[1]), dtype=np.float32)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = right, left
        if number < PRESENT:
            change += left @ right / np.float32(PRESENT)
    return change


def _merged(bits: Bits, change: NDArray[np.float32]) -> Bits:
    wide = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32) + change
    rounded: Bits = encode(wide, "BF16")
    return rounded


def _write_file(file: Path, tensors: Mapping[str, NDArray[np.generic]], dtype: str) -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns its files
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            array.tofile(stream)


def build_dictionary(folder: Path, threads: int, atoms: int = ATOMS) -> None:
    """Build the dictionary ``known`` of adapters that `write_models` wrote."""
    paths = [str(folder / f"atom{number}") for number in range(atoms)]
    dictionary.build(folder / "known", paths, str(folder / "base"), workers=threads)
