"""`attribute`, `dictionary build` and `add` with `--state`, killed by SIGKILL at random moments and run again.

Each is run once in peace; then, at 20 moments spread over the time that this takes, it is killed, what readers could
see is compared with the bytes before and after, and it is run again to its end: every file must be equal, in every
byte, to the one made in peace. Takes some minutes, so it is not among the benchmarks that run by default.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import seven_b
from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge.dictionary import MANIFEST
from unmerge.journal import SUFFIX, WRITTEN

KILLS = 20
_UNMERGE = (sys.executable, "-m", "unmerge")
Contents = Mapping[str, bytes]


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes
    ----------
    name : str
    prepare : callable
        Lays what the command starts from into an empty folder.
    command : callable
        Of that folder, what to run.
    is_done : callable
        Whether there is nothing left to run: a command that was killed after its last step.
    visible : callable
        What a reader may look at, at any moment.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], Sequence[str]]
    is_done: Callable[[Path], bool]
    visible: Callable[[Path], Contents]


def run(arguments: list[str] | None = None) -> bool:
    """Print how many files differ after kills; the limit is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kills", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of 28")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each command")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        models = Path(name) / "models"
        seven_b.write_models(models, options.layers, whole=False)
        found = [_measure(case, Path(name) / "work", options.kills) for case in _cases(models)]
    print_heading(f"SIGKILL at {options.kills} random moments, {options.layers} layers of Qwen2.5-7B's attention")
    header = ["command", "seconds in peace", "hit it running", "had to go on", "torn files seen", "files that differ"]
    print_rows(header, [row for row, _ in found])
    return print_ratio("files torn or different", sum(wrong for _, wrong in found), 0.5, "files")


def _cases(models: Path) -> list[Case]:
    base = ["--base", str(models / "base"), "--workers", "2", "--quiet"]
    adapters = [str(models / f"atom{number}") for number in range(seven_b.ATOMS)]
    (models / "again").symlink_to(models / "merge")  # a second target
    build = ["dictionary", "build"]
    tuned = f"tuned={models / 'merge'}"  # a full checkpoint, of which directions are kept

    def empty(folder: Path) -> None:
        assert not any(folder.iterdir())

    def built(folder: Path) -> None:
        _finish([*build, str(folder / "known"), *adapters[:4], *base])

    def state(folder: Path) -> list[str]:
        return ["--state", str(folder / "state")]

    return [
        Case(
            "attribute",
            empty,
            lambda folder: [
                "attribute", str(models / "merge"), *adapters, *base, "--target", str(models / "again"),
                "--output", str(folder / "answers"), *state(folder),
            ],
            lambda folder: not folder.exists(),  # never: it keeps what is done
            lambda folder: _contents(folder, "answers/[!.]*"),
        ),
        Case(
            "dictionary build",
            empty,
            lambda folder: [*build, str(folder / "known"), *adapters[:2], tuned, *base, *state(folder)],
            lambda folder: (folder / "known").exists(),
            lambda folder: _contents(folder, "known/**/*"),
        ),
        Case(
            "dictionary add",
            built,
            lambda folder: ["dictionary", "add", str(folder / "known"), *adapters[4:6], tuned, *base, *state(folder)],
            lambda folder: b'"tuned"' in (folder / "known" / MANIFEST).read_bytes(),
            lambda folder: _contents(folder, f"known/{MANIFEST}"),
        ),
    ]  # fmt: skip


def _measure(case: Case, folder: Path, kills: int) -> tuple[list[str], int]:
    """Return a row of the table, and how many files were torn or differ."""
    before, after, seconds = _in_peace(case, folder)
    landed = resumed = torn = different = 0
    for wait in np.random.default_rng(0).uniform(0.0, seconds, kills):
        _fresh(case, folder)
        landed += _kill(case.command(folder), float(wait))
        resumed += any(path.suffix in {SUFFIX, WRITTEN} for path in (folder / "state").rglob("*"))
        seen = case.visible(folder)
        torn += sum(content not in {before.get(name), after.get(name)} for name, content in seen.items())
        if not case.is_done(folder):
            _finish(case.command(folder))
        found = _contents(folder, "**/*")
        # Of a command that was killed after its last step the state is left.
        names = {name for name in found.keys() | after.keys() if not name.startswith("state/")}
        different += sum(found.get(name) != after.get(name) for name in names)
    shutil.rmtree(folder)
    return [case.name, f"{seconds:.1f}", str(landed), str(resumed), str(torn), str(different)], torn + different


def _in_peace(case: Case, folder: Path) -> tuple[Contents, Contents, float]:
    _fresh(case, folder)
    before = _contents(folder, "**/*")
    began = time.perf_counter()
    _finish(case.command(folder))
    return before, _contents(folder, "**/*"), time.perf_counter() - began


def _fresh(case: Case, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case.prepare(folder)


def _kill(command: Sequence[str], wait: float) -> bool:
    """Run a command and kill it after some seconds; tell whether it was running still."""
    process = subprocess.Popen([*_UNMERGE, *command], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(timeout=wait)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _finish(command: Sequence[str]) -> None:
    subprocess.run([*_UNMERGE, *command], check=True, stdout=subprocess.DEVNULL)


def _contents(folder: Path, pattern: str) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}
