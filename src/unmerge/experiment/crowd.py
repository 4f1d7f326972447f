"""Many fine-tunes of one base: what a dictionary of a real base model holds, siblings and all.

An experiment's adapters are trained alike. Here every one has its own rank, learning rate, data and length, as
adapters that different people publish do; each task comes back once per world, and some runs leave an earlier
checkpoint of themselves beside the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unmerge.experiment.presets import PRESETS, Training
from unmerge.experiment.tasks import TASKS
from unmerge.experiment.training import TrainingRecord, draw_examples
from unmerge.experiment.world import part_seed, write_part

FIRST_WORLD = 3
"""The experiment's own seeds are below."""
TESTS = 16
"""Examples to measure the loss on."""


@dataclass(frozen=True, slots=True)
class Member:
    """One fine-tune of the crowd.

    Attributes
    ----------
    name : str
        ``TASK-WORLD``.
    task : str
        What it is trained on.
    world : int
        Fine-tunes of one task differ in it.
    training : Training
        Its hyper-parameters.
    examples : int
        Trained on.
    init : int
        Seed of its initial matrices and of the order of its data.
    snapshot : bool
        Whether the checkpoint before the last epoch is kept, as ``NAME-early``.
    """

    name: str
    task: str
    world: int
    training: Training
    examples: int
    init: int
    snapshot: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters that it leaves."""
        return (self.name, f"{self.name}-early") if self.snapshot else (self.name,)


def members(worlds: int) -> Iterator[Member]:
    """Describe the crowd: every task once in each world.

    Parameters
    ----------
    worlds : int
        How often each task is trained.
    """
    for world in range(FIRST_WORLD, FIRST_WORLD + worlds):
        for task in TASKS:
            generator = np.random.default_rng(part_seed(world, f"crowd {task}"))
            rank = int(generator.choice([4, 8, 8, 16]))
            training = replace(
                PRESETS["micro"].training,
                rank=rank,
                alpha=2 * rank,
                learning_rate=float(generator.choice([2e-4, 4e-4])),
                epochs=int(generator.choice([2, 3])),
            )
            # In every other world all start from the same matrices: one script, run once per task.
            init = part_seed(world, "adapters" if world % 2 else f"adapters {task}")
            yield Member(
                f"{task}-{world}",
                task,
                world,
                training,
                examples=int(generator.choice([96, 128, 192])),
                init=init,
                snapshot=world < FIRST_WORLD + 2,
            )


def train_member(member: Member, base: Path, output: Path) -> None:
    """Train one fine-tune, unless it is there: PEFT adapter folders in `output` by its names.

    Parameters
    ----------
    member : Member
        What to train.
    base : path
        Checkpoint folder of the experiment's base.
    output : path
        Folder of the crowd.
    """
    from unmerge.experiment.fine_tuning import fine_tune

    if all((output / name).exists() for name in member.names):
        return
    train, tests = draw_examples(TASKS[member.task], part_seed(member.world, "examples"), member.examples, TESTS)

    def write(folder: Path) -> TrainingRecord:
        early = {member.training.epochs - 1: output / f"{member.name}-early"} if member.snapshot else None
        return fine_tune(base, train, tests, folder, training=member.training, seed=member.init, snapshots=early)

    write_part(output / member.name, write)
