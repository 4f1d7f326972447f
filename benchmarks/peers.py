"""Beside the field's tools on the same files: modelDNA's ``decompose``, and mergekit making the merge itself.

A base of 156 M parameters, four fine-tunes of it (two per cent of the weights' norm) as full checkpoints in BF16, and
the same changes as adapters. mergekit merges them; modelDNA and unmerge take the merges apart, all four fine-tunes as
candidates. Wall time of whole commands, as users run them, start of the process included; medians, the commands take
turns, and one turn before warms the page cache. modelDNA 0.1.0 is installed into an environment of its own.

The limit is less time than either tool. modelDNA reads a sample, as ours do with ``--precision``; the others read
everything and test who is present, with the same limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.peer_files import ADAPTERS, ATOMS, MERGES, Merge, write_models
from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge import dictionary
from unmerge.experiment.mergekit import find_mergekit

MODEL_DNA = Path(".cache") / "modeldna"
"""Where modelDNA's environment is kept."""
VERSION = "0.1.0"
PRECISION = "0.01"
THEIRS = ("modelDNA", "mergekit")
OURS = {
    "unmerge, checkpoints": [*ATOMS],
    "unmerge, dictionary of checkpoints": ["known-checkpoints"],
    "unmerge, dictionary of adapters": ["known-adapters"],
    f"unmerge, checkpoints, --precision {PRECISION}": [*ATOMS, "--precision", PRECISION],
    f"unmerge, dictionary of checkpoints, --precision {PRECISION}": ["known-checkpoints", "--precision", PRECISION],
    f"unmerge, dictionary of adapters, --precision {PRECISION}": ["known-adapters", "--precision", PRECISION],
}
_UNMERGE = (sys.executable, "-m", "unmerge")


def run(arguments: list[str] | None = None) -> bool:
    """Print times and errors of each tool, and ours over theirs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the models; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    model_dna = _install_model_dna()
    print_heading(f"Beside modelDNA {VERSION} and mergekit: {options.layers} layers of {options.hidden} columns")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_models(folder, options.layers, options.hidden)
        _build(folder)
        _print_starts(folder, model_dna, options.repeats)
        met = [_compare(folder, case, MERGES[case], model_dna, options.repeats) for case in MERGES]
    return all(met)


def _install_model_dna() -> Path:
    """Return modelDNA's environment, made if it is not there: its requirements are not ours."""
    if not (MODEL_DNA / "bin" / "modeldna").exists():
        subprocess.run([sys.executable, "-m", "venv", str(MODEL_DNA)], check=True)
        program = MODEL_DNA.resolve() / "bin" / "python"
        subprocess.run([program, "-m", "pip", "install", "--quiet", f"modeldna=={VERSION}"], check=True)
    return MODEL_DNA.resolve() / "bin"


def _build(folder: Path) -> None:
    """Build the dictionaries that users would have."""
    for name, atoms in (("known-checkpoints", ATOMS), ("known-adapters", ADAPTERS)):
        paths = [str(folder / atom) for atom in atoms]
        began = time.perf_counter()
        dictionary.build(folder / name, paths, str(folder / "base"), workers=os.cpu_count() or 1)
        sys.stdout.write(f"{name}: built in {time.perf_counter() - began:.1f} s, once, not counted below\n")


@dataclass(frozen=True)
class Ended:
    """A command that ended well: wall and CPU seconds, and what it wrote to stdout."""

    seconds: float
    spent: float
    output: str


def _execute(command: Sequence[str | Path], folder: Path) -> Ended:
    """Run a command offline, with a home of its own; what it imports is compiled once, as where it was installed."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=environment, stdout=output, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} ended with exit code {process.returncode}")
        output.seek(0)
        return Ended(seconds, usage.ru_utime + usage.ru_stime, output.read())


def _print_starts(folder: Path, model_dna: Path, repeats: int) -> None:
    """Print how long each tool takes to load what its command needs, which the times below include."""
    imports = {
        "modelDNA": (model_dna / "python", "import modeldna.cli, modeldna.merge"),
        "mergekit": (sys.executable, "import mergekit.scripts.run_yaml, mergekit.merge"),
        "unmerge": (sys.executable, "import unmerge.cli, unmerge"),
    }
    for name, (python, code) in imports.items():
        seconds = median(_execute([python, "-c", code], folder).seconds for _ in range(repeats))
        sys.stdout.write(f"{name}: {seconds:.2f} s to start, counted below\n")


def _compare(folder: Path, case: str, merge: Merge, model_dna: Path, repeats: int) -> bool:
    """Time all tools on one merge, in turns; those that are not linear once, for their errors."""
    recipe = merge.write(folder, "recipe")
    commands = {
        "modelDNA": [model_dna / "modeldna", "decompose", "merged", *ATOMS, "--base", "base", "--json"],
        "mergekit": [find_mergekit(), recipe.name, "again", "--quiet", "--no-write-model-card", "--random-seed", "0"],
        **{name: [*_UNMERGE, "attribute", "merged", *given, "--base", "base", "--json", "--quiet"]
           for name, given in OURS.items()},
    }  # fmt: skip
    _execute(commands["mergekit"], folder)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    (folder / "again").rename(folder / "merged")
    turns = [_turn(folder, commands) for _ in range(repeats + 1 if merge.linear else 1)]
    times = {name: median(turn[name].seconds for turn in turns[1:] or turns) for name in commands}
    sys.stdout.write(f"\n{case}\n")
    rows = []
    for name in commands:
        errors = [abs(value - merge.truth[atom]) for atom, value in _coefficients(name, turns[-1][name]).items()]
        told = [f"{max(errors):.4f}", f"{mean(errors):.4f}"] if errors else ["", ""]
        spent = median(turn[name].spent for turn in turns)
        over = [f"{times[name] / times[peer]:.2f}" for peer in THEIRS]
        rows.append([name, f"{times[name]:.2f}", *over, f"{spent:.1f}", *told])
    header = ["command", "seconds", *(f"over {peer}" for peer in THEIRS), "CPU seconds"]
    print_rows([*header, "largest error", "mean error"], rows)
    met = [_print_limits(name, times) for name in OURS] if merge.linear else []
    return all(met)


def _turn(folder: Path, commands: Mapping[str, Sequence[str | Path]]) -> dict[str, Ended]:
    ended = {}
    for name, command in commands.items():
        shutil.rmtree(folder / "again", ignore_errors=True)
        ended[name] = _execute(command, folder)
    return ended


def _coefficients(name: str, ended: Ended) -> dict[str, float]:
    """Return what a tool says of each atom; mergekit says nothing."""
    if name == "mergekit":
        return {}
    found = json.loads(ended.output)
    if name == "modelDNA":
        return {atom: found["alphas"][atom] for atom in ATOMS}
    return {item["name"].replace("adapter", "full"): item["coefficient"] for item in found["components"]}


def _print_limits(name: str, times: Mapping[str, float]) -> bool:
    met = [print_ratio(f"{name} over {peer}", times[name] / times[peer], 1.0, "times") for peer in THEIRS]
    return all(met)
