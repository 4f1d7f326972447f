"""Peak memory is bounded by the plan, whatever the model's size.

Models of 1, 2, 4 and 8 layers of 1,024 columns (up to 0.1 G parameters) are attributed to four adapters and one full
fine-tune; the growth of the process's peak is compared with what the plan said beforehand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge.testing import tiny_model, write_adapter, write_checkpoint

ADAPTERS = 4
LAYERS = (1, 2, 4, 8)
WORKERS = 2
_PROBE = """
import re, sys
from pathlib import Path
import numpy as np
import unmerge
from unmerge.fused import subtract_bf16

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def attribute(folder):
    atoms = [f"{folder}/atom{i}" for i in range(4)] + [f"{folder}/full"]
    plans = []
    unmerge.attribute(f"{folder}/merge", atoms, base=f"{folder}/base", exact=True, workers=int(sys.argv[3]),
                      start=lambda plan: plans.append(plan.memory) or (lambda count: None))
    return plans[0]

attribute(sys.argv[1])
# The small model is computed in float64; the compiler, like the interpreter, is not the plan's.
bits = np.zeros(8, "<u2")
subtract_bf16(bits, bits, np.zeros((1, 8), np.float32))
before = status("VmRSS")
bound = attribute(sys.argv[2])
print(status("VmHWM") - before, bound, sum(f.stat().st_size for f in Path(sys.argv[2]).rglob("*.safetensors")))
"""


def _write(folder: Path, layers: int, hidden: int) -> Path:
    rng = np.random.default_rng(0)
    base = tiny_model(rng, layers=layers, hidden=hidden, vocabulary=2048)
    write_checkpoint(folder / "base", base)
    merged = dict(base)
    for index in range(ADAPTERS):
        change = write_adapter(folder / f"atom{index}", rng, base, rank=16)
        merged = {name: value + 0.25 * change[name] if name in change else value for name, value in merged.items()}
    write_checkpoint(folder / "merge", merged)
    write_checkpoint(folder / "full", {name: value * 1.001 for name, value in base.items()})
    return folder


def measure(layers: int, hidden: int = 1024) -> tuple[int, int, int]:
    """Return the growth of peak memory, the planned bound and the size of the files, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        _write(small, 1, 64)
        _write(large, layers, hidden)
        command = [sys.executable, "-c", _PROBE, str(small), str(large), str(WORKERS)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, bound, size = (int(number) for number in re.findall(r"\d+", output))
    return grown, bound, size


def run() -> bool:
    """Print the growth of peak memory against the planned bound."""
    print_heading(f"Peak memory, {ADAPTERS} adapters and a full fine-tune, {WORKERS} threads")
    found = {layers: measure(layers) for layers in LAYERS}
    mebi = 2**20
    rows = [
        [str(layers), f"{size / mebi:,.0f}", f"{grown / mebi:,.1f}", f"{bound / mebi:,.1f}", f"{grown / bound:.2f}"]
        for layers, (grown, bound, size) in found.items()
    ]
    print_rows(["layers", "files, MiB", "growth of peak, MiB", "planned bound, MiB", "ratio"], rows)
    worst = max(grown / bound for grown, bound, _ in found.values())
    return print_ratio("largest growth over its planned bound", worst, 1.0, "of the bound")
