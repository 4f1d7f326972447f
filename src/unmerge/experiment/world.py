"""A small world to take apart: one base, adapters on it, and the full checkpoints that merges are made of."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from unmerge.errors import UnmergeError
from unmerge.experiment.tasks import TASKS
from unmerge.experiment.training import TrainingRecord, merge_adapter, train_adapter, train_base

RECORD = "training.json"
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class World:
    """Where the parts of a world are and how they were trained.

    Attributes
    ----------
    folder : path
        Holds ``base``, ``adapters``, ``checkpoints`` and ``world.json``.
    tasks : tuple of str
        The tasks of its adapters.
    records : mapping of str to TrainingRecord
        One for ``base`` and one per task.
    """

    folder: Path
    tasks: tuple[str, ...]
    records: Mapping[str, TrainingRecord]

    @property
    def base(self) -> Path:
        """The base's checkpoint folder."""
        return self.folder / "base"

    def adapter(self, task: str) -> Path:
        """Return the PEFT adapter folder of a task."""
        return self.folder / "adapters" / task

    def checkpoint(self, task: str) -> Path:
        """Return the folder of the full checkpoint of a task: the base with its adapter merged in."""
        return self.folder / "checkpoints" / task


def _silent(message: str) -> None:
    """Report nothing."""


def build_world(
    folder: Path,
    *,
    tasks: Sequence[str],
    seed: int,
    progress: Callable[[str], None] = _silent,
    workers: int = 2,
    base: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> World:
    """Train whatever parts of a world are not there yet.

    Each part is written beside its place and renamed when it is complete, so an interrupted build goes on
    where it stopped. No adapter depends on which others there are: more tasks may be added later, and a part
    that was deleted comes back byte for byte.

    Parameters
    ----------
    folder : path
        Where the world is, or shall be.
    tasks : sequence of str
        Names out of `unmerge.experiment.tasks.TASKS`.
    seed : int
        Seeds everything.
    progress : callable
        Called with one line per finished part.
    workers : int
        Processes that train adapters, each with one thread; 1 trains them in this process, to the same bytes.
    base, adapters : mapping, optional
        Options of `train_base` and `train_adapter` that differ from their defaults.

    Raises
    ------
    UnmergeError
        A task is unknown, or the folder holds a world of other settings.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise UnmergeError(f"no task is named {', '.join(unknown)}: the tasks are {', '.join(TASKS)}")
    options = {
        "seed": seed,
        "base": _defaults(train_base) | dict(base or {}),
        "adapters": _defaults(train_adapter) | dict(adapters or {}),
    }
    settings = json.loads(json.dumps(options))  # as they are read back: tuples become lists
    _check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder, tuple(tasks), {})
    _write_summary(world, settings)
    if not world.base.exists():
        _build_base(world, settings)
        progress(_line("base", read_record(world.base)))
    _build_adapters(world, settings, workers, progress)
    records = {"base": read_record(world.base)} | {task: read_record(world.adapter(task)) for task in tasks}
    world = World(folder, tuple(tasks), records)
    _write_summary(world, settings)
    return world


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's default arguments: recorded, so that a later default does not pass for an old one."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    summary = folder / "world.json"
    if not summary.exists():
        return
    found = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    if found != settings:
        message = f"{folder} holds a world of {found}, not of {settings}: delete it or choose another folder"
        raise UnmergeError(message)


def _write_summary(world: World, settings: Mapping[str, Any]) -> None:
    summary = {
        "settings": settings,
        "tasks": world.tasks,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "records": {name: asdict(record) for name, record in world.records.items()},
    }
    path = world.folder / "world.json"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_record(part: Path) -> TrainingRecord:
    """Return the record that `write_part` left in an adapter or a base."""
    return TrainingRecord(**json.loads((part / RECORD).read_text(encoding="utf-8")))


def write_part(part: Path, write: Callable[[Path], TrainingRecord | None]) -> None:
    """Have `write` fill a temporary folder beside `part`, add its record, and rename it into place."""
    part.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{part.name}-", dir=part.parent))
    try:
        record = write(temporary)
        if record is not None:
            (temporary / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders only their owner can read
        temporary.rename(part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def part_seed(seed: int, name: str) -> int:
    """Return a seed of its own for each kind of part."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


def _build_base(world: World, settings: Mapping[str, Any]) -> None:
    seed = part_seed(settings["seed"], "base")
    write_part(world.base, lambda output: train_base(output, seed=seed, **settings["base"]))


def _build_adapter(world: World, settings: Mapping[str, Any], name: str) -> str:
    """Train and merge one adapter where they are missing; runs in a worker process."""
    adapter, checkpoint = world.adapter(name), world.checkpoint(name)
    # One seed for all adapters, as when one script is run once per task: they start from the same matrices,
    # so the changes of related tasks overlap instead of being orthogonal by chance.
    seed = part_seed(settings["seed"], "adapters")
    if not adapter.exists():
        write_part(
            adapter,
            lambda output: train_adapter(world.base, TASKS[name], output, seed=seed, **settings["adapters"]),
        )
    if not checkpoint.exists():
        write_part(checkpoint, lambda output: merge_adapter(world.base, adapter, output))
    return name


def _build_adapters(world: World, settings: Mapping[str, Any], workers: int, progress: Callable[[str], None]) -> None:
    missing = [name for name in world.tasks if not (world.adapter(name).exists() and world.checkpoint(name).exists())]
    if min(workers, len(missing)) <= 1:
        for name in missing:
            _build_adapter(world, settings, name)
            progress(_line(name, read_record(world.adapter(name))))
        return
    # Spawned, because a forked process inherits torch's threads in a state that can deadlock.
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_build_adapter, world, settings, name) for name in missing]):
            progress(_line(done.result(), read_record(world.adapter(done.result()))))


def _line(name: str, record: TrainingRecord) -> str:
    change = "" if record.relative_norm is None else f", {record.relative_norm:.2%} of the weights"
    return f"{name}: loss {record.loss_before:.2f} -> {record.loss_after:.2f}{change}, {record.seconds:.0f} s"
