"""Where the parts of an experiment are, and how they come to be there whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmerge.experiment.paper import Group
from unmerge.experiment.presets import Preset
from unmerge.parquet import whole

RESULTS = "results.parquet"
INVERSIONS = "inversions.parquet"
TRAINING = "training.json"
TIMINGS = "timings.json"
BASELINE = "baseline.json"
SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Target:
    """One merge: a composition by one method, in the world of one seed.

    Attributes
    ----------
    seed : int
        The world it belongs to.
    composition : int
        Its number, from 0.
    group : str
        ``known``, ``mixed`` or ``unknown``.
    tasks : tuple of str
        What is merged.
    method : str
        mergekit's name of the method.
    """

    seed: int
    composition: int
    group: Group
    tasks: tuple[str, ...]
    method: str

    @property
    def name(self) -> str:
        """Unique within its seed."""
        return f"{self.composition:02d}-{self.group}-{self.method}"

    def truth(self, atoms: tuple[str, ...]) -> list[float]:
        """Return the weight of each atom, 0 where it was not merged."""
        return [1.0 / len(self.tasks) if atom in self.tasks else 0.0 for atom in atoms]


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of one seed in the folder of an experiment."""

    output: Path
    seed: int

    @property
    def folder(self) -> Path:
        """Holds all of the seed."""
        return self.output / f"seed-{self.seed}"

    def adapter(self, task: str) -> Path:
        """Return the PEFT adapter folder of a task."""
        return self.folder / "adapters" / task

    def checkpoint(self, task: str) -> Path:
        """Return the folder of the full checkpoint of a task."""
        return self.folder / "checkpoints" / task

    def recipe(self, target: str) -> Path:
        """Return the mergekit YAML of a target."""
        return self.folder / "recipes" / f"{target}.yml"

    def merged(self, target: str) -> Path:
        """Return the checkpoint folder of a target, which exists only while it is read."""
        return self.folder / "merged" / target

    def statistics(self, target: str) -> Path:
        """Return the file that is kept of a target."""
        return self.folder / "statistics" / f"{target}.npz"


def targets(preset: Preset, seed: int) -> list[Target]:
    """Return what is merged in the world of a seed: every composition by every method."""
    return [
        Target(seed, number, composition.group, composition.tasks, method)
        for number, composition in enumerate(preset.compositions)
        for method in preset.methods
    ]


def write_json(path: Path, document: Any) -> None:
    """Write a document whole."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
