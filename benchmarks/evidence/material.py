"""What the merges are made of: the micro experiment's adapters, the crowd's, and full checkpoints of both."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from unmerge.experiment import layout
from unmerge.experiment.crowd import FIRST_WORLD, members, train_member
from unmerge.experiment.layout import Place
from unmerge.experiment.presets import PRESETS
from unmerge.experiment.run import run as run_experiment
from unmerge.experiment.world import write_part

PRESET = PRESETS["micro"]
SEEDS = tuple(range(FIRST_WORLD))
"""The experiment's; the worlds of the crowd follow."""
WORLDS = 13
EARLY = "-early"
WEIGHTS = "adapter_model.safetensors"


def task_of(name: str) -> str:
    """Return the task of an adapter ``TASK-WORLD`` or ``TASK-WORLD-early``."""
    return name.removesuffix(EARLY).rpartition("-")[0]


def world_of(name: str) -> int:
    """Return the world of an adapter."""
    return int(name.removesuffix(EARLY).rpartition("-")[2])


def twin_of(name: str) -> str:
    """Return the name of the other checkpoint of the same run, whether it was kept or not."""
    return name.removesuffix(EARLY) if name.endswith(EARLY) else name + EARLY


def dictionary_of(seed: int) -> tuple[str, ...]:
    """Return the paper's dictionary in the world of a seed."""
    return tuple(f"{task}-{seed}" for task in PRESET.dictionary)


def strangers_of(seed: int) -> tuple[str, ...]:
    """Return the adapters of a seed that are not in the paper's dictionary."""
    return tuple(f"{task}-{seed}" for task in PRESET.tasks if task not in PRESET.dictionary)


def every_name() -> tuple[str, ...]:
    """Return the names of all adapters, the experiment's first."""
    own = [f"{task}-{seed}" for seed in SEEDS for task in PRESET.tasks]
    return (*own, *(name for member in members(WORLDS) for name in member.names))


@dataclass(frozen=True, slots=True)
class Material:
    """The folder of the benchmark.

    Attributes
    ----------
    folder : path
        Holds ``experiment``, ``crowd``, and what is made of them on demand and kept.
    """

    folder: Path

    @property
    def base(self) -> Path:
        """The base's checkpoint folder."""
        return self.folder / "experiment" / "base"

    def adapter(self, name: str, change: float | None = None) -> Path:
        """Return a PEFT adapter folder, rescaled on demand so that its change is a share of the weights' norm."""
        if change is not None:
            return self._rescaled(name, change)
        if world_of(name) < FIRST_WORLD:
            return Place(self.folder / "experiment", world_of(name)).adapter(task_of(name))
        return self.folder / "crowd" / name

    def checkpoint(self, name: str, change: float | None = None) -> Path:
        """Return the full bf16 checkpoint of an adapter; made on demand."""
        from unmerge.experiment.training import merge_adapter

        if change is None and world_of(name) < FIRST_WORLD:
            kept = Place(self.folder / "experiment", world_of(name)).checkpoint(task_of(name))
            if kept.exists():
                return kept
        path = self.folder / "checkpoints" / _size(change) / name
        if not path.exists():
            write_part(path, lambda output: merge_adapter(self.base, self.adapter(name, change), output))
        return path

    def _rescaled(self, name: str, change: float) -> Path:
        path = self.folder / "rescaled" / _size(change) / name
        if not path.exists():
            write_part(path, lambda output: rescale(self.adapter(name), self.base, change, output))
        return path


def _size(change: float | None) -> str:
    return "trained" if change is None else f"{change:.1%}"


def rescale(adapter: Path, base: Path, change: float, output: Path) -> None:
    """Copy an adapter with its change scaled to a share of the norm of the weights that it touches."""
    from safetensors.numpy import load_file, save_file

    from unmerge.experiment.training import relative_delta_norm

    factor = change / relative_delta_norm(adapter, base)
    tensors = load_file(adapter / WEIGHTS)
    scaled = {name: value * factor if ".lora_B." in name else value for name, value in tensors.items()}
    # Multiplying by a Python float keeps float32; a wider type would change what PEFT reads.
    save_file({name: value.astype(tensors[name].dtype) for name, value in scaled.items()}, output / WEIGHTS)
    shutil.copyfile(adapter / "adapter_config.json", output / "adapter_config.json")


def lora_scale(adapter: Path) -> float:
    """Return what an adapter multiplies ``B @ A`` by."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return float(settings["lora_alpha"]) / float(settings["r"])


def prepare(folder: Path) -> Material:
    """Run the experiment, if that was not done (ten minutes on 2 cores)."""
    material = Material(folder.resolve())
    experiment = folder / "experiment"
    if not (experiment / layout.RESULTS).exists():
        run_experiment(PRESET, experiment, seeds=SEEDS)
    return material


def train_crowd(material: Material) -> None:
    """Train what is missing of the crowd (25 minutes on 2 cores)."""
    for member in members(WORLDS):
        if not all(material.adapter(name).exists() for name in member.names):
            train_member(member, material.base, material.folder / "crowd")
