"""An experiment that is killed with SIGKILL at ten random moments and resumed ends in the same bytes.

One seed of the `micro` preset, run once in peace and once with kills; takes some ten minutes on 2 cores, so it is not
among the benchmarks that run by default.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import print_heading, print_ratio

KILLS = 10
_COMMAND = (sys.executable, "-m", "unmerge", "experiment")


def _run(folder: Path) -> subprocess.Popen[bytes]:
    command = [*_COMMAND, "run", "--preset", "micro", "--seeds", "0", "--output", str(folder), "--quiet"]
    # A session of its own, so that a kill reaches the worker processes too.
    return subprocess.Popen(command, start_new_session=True)


def _finish(folder: Path) -> None:
    process = _run(folder)
    if process.wait() != 0:
        raise SystemExit(f"the run in {folder} ended with exit code {process.returncode}")
    subprocess.run([*_COMMAND, "tables", str(folder)], check=True)


def _contents(folder: Path) -> dict[str, bytes]:
    files = [folder / "results.parquet", *sorted((folder / "tables").iterdir())]
    return {path.name: path.read_bytes() for path in files}


def run() -> bool:
    """Print the number of files that differ after ten kills; the limit is none."""
    print_heading(f"{KILLS} kills at random moments")
    with tempfile.TemporaryDirectory() as name:
        peace, killed = Path(name) / "peace", Path(name) / "killed"
        began = time.perf_counter()
        _finish(peace)
        whole = time.perf_counter() - began
        # The trained base is shared, so that the kills fall into the phases that differ.
        killed.mkdir()
        for part in ("base", "settings.json"):
            source = peace / part
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, killed / part)
        generator = np.random.default_rng(0)
        landed = 0
        for wait in generator.uniform(5.0, whole / KILLS * 1.5, KILLS):
            process = _run(killed)
            try:
                process.wait(timeout=float(wait))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                landed += 1
        _finish(killed)
        first, second = _contents(peace), _contents(killed)
    different = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    sys.stdout.write(f"{landed} of {KILLS} kills hit a running process; {len(first)} files compared\n")
    sys.stdout.write(f"different: {', '.join(different) or 'none'}\n")
    return print_ratio("files that differ", len(different), 0.5, "files")
