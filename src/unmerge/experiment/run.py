"""The paper's experiment from one call: train, merge, compress, decompose; resumable at every step."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from unmerge.errors import UnmergeError
from unmerge.experiment import layout
from unmerge.experiment.decomposition import Row, decompose, failed
from unmerge.experiment.layout import Place, Target, targets, write_json
from unmerge.experiment.paper import settings
from unmerge.experiment.presets import Preset
from unmerge.experiment.reduction import load_reduced
from unmerge.experiment.results import versions, write_results

DECOMPOSITIONS = "decompositions"
"""The phase that is always done whole, in seconds; the others go on where they stopped."""
Job = TypeVar("Job")
Result = TypeVar("Result")
Start = Callable[[str, int], Callable[[], None]]
"""Told what is done and how often; returns what is called after each time (progress bars)."""


def _silent(_description: str, _total: int) -> Callable[[], None]:
    return lambda: None


@dataclass(slots=True)
class Session:
    """One run of the experiment, which may be one of several that were cut short.

    Attributes
    ----------
    preset : Preset
        What to run.
    output : path
        Folder of everything.
    seeds : tuple of int
        The worlds.
    start : callable
        Shows progress.
    pool : ProcessPoolExecutor or None
        Where the work is done; None does it in this process, to the same bytes.
    seconds : dict of str to float
        Wall time of each phase, summed over the sessions that had a part in it.
    """

    preset: Preset
    output: Path
    seeds: tuple[int, ...]
    start: Start
    pool: ProcessPoolExecutor | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The base's checkpoint folder."""
        from unmerge.experiment.parts import base_folder

        return base_folder(self.preset, self.output)

    def each(self, phase: str, work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Do the same work on every job, and return the results in the order of the jobs."""
        if not jobs:
            return []
        began = time.perf_counter()
        advance = self.start(phase, len(jobs))
        found: dict[int, Result] = {}
        for index, result in self._done(work, jobs):
            found[index] = result
            advance()
        earlier = 0.0 if phase == DECOMPOSITIONS else self.seconds.get(phase, 0.0)
        self.seconds[phase] = earlier + time.perf_counter() - began
        write_json(self.output / layout.TIMINGS, {phase: round(spent, 3) for phase, spent in self.seconds.items()})
        return [found[index] for index in range(len(jobs))]

    def _done(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        if self.pool is None:
            yield from ((index, work(job)) for index, job in enumerate(jobs))
            return
        futures: dict[Future[Result], int] = {self.pool.submit(work, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker process is told: one task to train, or one target to make or to decompose."""

    preset: Preset
    base: Path
    place: Place
    name: str
    target: Target | None = None
    reason: str | None = None


def run(
    preset: Preset,
    output: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    workers: int | None = None,
    start: Start = _silent,
) -> Path:
    """Run the experiment, or whatever of it is not done yet.

    Every part is written beside its place and renamed when it is complete. A run that was killed goes on where
    it stopped, and ends in the same bytes. A merge that fails becomes rows that say so; the next run tries it
    again.

    Parameters
    ----------
    preset : Preset
        What to run.
    output : path
        Folder for everything.
    seeds : sequence of int
        A world each: initialisation, data and their order, DARE masks. The base is shared.
    workers : int, optional
        Processes; by default the preset's. Changes no result.
    start : callable
        Shows progress.

    Returns
    -------
    path
        The file of results.

    Raises
    ------
    UnmergeError
        The folder holds an experiment of other settings, there is no seed, or training failed.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UnmergeError(f"the seeds are {list(seeds)}: give at least one, and none twice")
    _claim(preset, output)
    _sweep(output)
    with _pool(workers or preset.workers) as pool:
        session = Session(preset, output, tuple(seeds), start, pool, _earlier(output))
        _train_base(session)
        reasons: dict[tuple[int, str], str] = {}
        for group in _together(session):
            _train(session, group)
            reasons |= _reduce(session, group)
            _discard(session, group, reasons)
        path = _decompose(session, reasons)
        _compare(session)
    return path


def _together(session: Session) -> list[tuple[int, ...]]:
    """Return the seeds to work on at once: one by one where their checkpoints cannot all be kept."""
    return [session.seeds] if session.preset.keep_checkpoints else [(seed,) for seed in session.seeds]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        yield None
        return
    # Spawned, because a forked process inherits torch's threads in a state that can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool


def _claim(preset: Preset, output: Path) -> None:
    """Refuse a folder of another experiment; otherwise write down what this one is."""
    described = json.loads(json.dumps(describe(preset)))  # as it is read back: tuples become lists
    path = output / layout.SETTINGS
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != described:
            message = f"{output} holds an experiment of other settings (see {layout.SETTINGS} in it)"
            raise UnmergeError(f"{message}: delete it or choose another folder")
        return
    output.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(f".{layout.SETTINGS}") for path in output.iterdir()):
        raise UnmergeError(f"{output} is not empty, and not the folder of an experiment: choose another folder")
    write_json(path, described)


def describe(preset: Preset) -> dict[str, Any]:
    """Return the settings that results depend on: all but the number of processes."""
    return {name: value for name, value in asdict(preset).items() if name not in {"workers", "keep_checkpoints"}}


def _sweep(output: Path) -> None:
    """Delete the unfinished parts that a killed run left behind, and nothing that is not an experiment's."""
    folders = [path for seed in output.glob("seed-*") for path in seed.iterdir() if path.is_dir()]
    found = [left for folder in folders for left in folder.glob(".*")]
    for path in [*found, *output.glob(".base-*"), *output.glob(".*.partial")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    for merged in output.glob("seed-*/merged"):
        shutil.rmtree(merged, ignore_errors=True)


def _earlier(output: Path) -> dict[str, float]:
    path = output / layout.TIMINGS
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _train_base(session: Session) -> None:
    from unmerge.experiment.parts import train_base_part

    if session.preset.base is None and not session.base.exists():
        session.each("base", train_base_part, [(session.preset, session.output)])


def _pending(session: Session, seeds: Sequence[int]) -> list[tuple[Place, Target]]:
    """Return the targets of which nothing is kept yet."""
    places = [Place(session.output, seed) for seed in seeds]
    every = [(place, target) for place in places for target in targets(session.preset, place.seed)]
    return [(place, target) for place, target in every if not place.statistics(target.name).exists()]


def _train(session: Session, seeds: Sequence[int]) -> None:
    from unmerge.experiment.parts import write_training

    wanted = [(Place(session.output, seed), task) for seed in seeds for task in session.preset.tasks]
    missing = [_job(session, place, task) for place, task in wanted if not place.adapter(task).exists()]
    session.each("adapters", _train_job, missing)
    write_training(session.output, session.seeds, session.preset.tasks)
    needed = {place for place, _ in _pending(session, seeds)}
    unmerged = [
        _job(session, place, task) for place, task in wanted if place in needed and not place.checkpoint(task).exists()
    ]
    session.each("checkpoints", _checkpoint_job, unmerged)


def _job(session: Session, place: Place, name: str, target: Target | None = None, reason: str | None = None) -> _Job:
    return _Job(session.preset, session.base, place, name, target, reason)


def _train_job(job: _Job) -> None:
    from unmerge.experiment.parts import train_part

    train_part(job.preset, job.base, job.place, job.name)


def _checkpoint_job(job: _Job) -> None:
    from unmerge.experiment.parts import merge_part

    merge_part(job.base, job.place, job.name)


def _reduce(session: Session, seeds: Sequence[int]) -> dict[tuple[int, str], str]:
    """Merge and reduce every target that is missing; return the reasons of those that failed."""
    jobs = [_job(session, place, target.name, target) for place, target in _pending(session, seeds)]
    found = session.each("merges", _reduce_job, jobs)
    return {(job.place.seed, job.name): reason for job, reason in zip(jobs, found, strict=True) if reason is not None}


def _reduce_job(job: _Job) -> str | None:
    from unmerge.experiment.reduction import reduce_target

    if job.target is None:
        return None
    try:
        reduce_target(job.preset, job.base, job.place, job.target)
    except Exception as error:  # noqa: BLE001 - a merge that fails is a result, and the others go on
        # Without the folder's own name: where an experiment was run is no part of its results.
        return f"{type(error).__name__}: {error}".replace(str(job.place.output.resolve()), ".").replace(
            str(job.place.output), "."
        )
    return None


def _discard(session: Session, seeds: Sequence[int], reasons: dict[tuple[int, str], str]) -> None:
    if session.preset.keep_checkpoints or any(seed in seeds for seed, _ in reasons):
        return
    for seed in seeds:
        shutil.rmtree(Place(session.output, seed).folder / "checkpoints", ignore_errors=True)


def _decompose(session: Session, reasons: dict[tuple[int, str], str]) -> Path:
    """Decompose every target and write the file of results."""
    every = [(Place(session.output, seed), one) for seed in session.seeds for one in targets(session.preset, seed)]
    jobs = [_job(session, place, one.name, one, reasons.get((one.seed, one.name))) for place, one in every]
    rows = [row for part in session.each(DECOMPOSITIONS, _decompose_job, jobs) for row in part]
    digests = {
        f"seed {place.seed}, {one.name}": load_reduced(place.statistics(one.name)).digests
        for place, one in every
        if place.statistics(one.name).exists()
    }
    path = session.output / layout.RESULTS
    metadata = {"preset": describe(session.preset), "seeds": session.seeds, "versions": versions(), "digests": digests}
    write_results(path, rows, metadata)
    return path


def _decompose_job(job: _Job) -> list[Row]:
    if job.target is None:
        return []
    if job.reason is not None:
        return failed(job.target, job.preset.dictionary, settings(), job.reason)
    reduced = load_reduced(job.place.statistics(job.name))
    return decompose(job.target, reduced, settings(), split_seed=job.place.seed)


def _compare(session: Session) -> None:
    """Time the original's way on a few of the targets, once."""
    from unmerge.experiment.baseline import baseline_part

    if not (session.output / layout.BASELINE).exists() and session.preset.keep_checkpoints:
        session.each("baseline", baseline_part, [(session.preset, session.base, session.output, session.seeds[0])])
