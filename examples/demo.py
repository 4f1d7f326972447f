"""Train a base and six LoRA adapters, merge them with the real mergekit, and take the merges apart again.

Run it with ``python examples/demo.py --output demo-output``. It needs ``pip install 'unmerge[experiment]'``
and no network. What is already in the folder is used again: a second run only repeats the attributions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from unmerge import Attribution, attribute
from unmerge.experiment.mergekit import run_mergekit, write_recipe
from unmerge.experiment.world import World, build_world

# The first two are siblings: the same sums, worked out in different words. xsum is in no merge.
DICTIONARY = ("gsm8k_math", "reason_math", "latin_translation", "ms_marco_qa", "xsum")
OUTSIDE = "style_transfer"
SEED = 0


@dataclass(frozen=True)
class Merge:
    """One merge to make: its folder name, mergekit's method, weights per task, and what mergekit needs."""

    name: str
    method: str
    weights: Mapping[str, float]
    density: float | None = None
    signed: bool = False
    note: str = ""

    @property
    def coefficients(self) -> dict[str, float]:
        """What the weights amount to: linear and ties merges divide them by their sum."""
        total = sum(self.weights.values()) if self.method in {"linear", "ties"} else 1.0
        return {task: weight / total for task, weight in self.weights.items()}


MERGES = (
    Merge(
        "linear",
        "linear",
        {"gsm8k_math": 0.4, "reason_math": 0.3, "latin_translation": 0.2, "ms_marco_qa": 0.1},
    ),
    Merge(
        "task_arithmetic",
        "task_arithmetic",
        {"gsm8k_math": 0.8, "latin_translation": 0.6, "ms_marco_qa": -0.5},
        signed=True,
        note="mergekit rounds weights to bfloat16: 0.8 is 0.8008 there, and 0.6 is 0.6016.",
    ),
    Merge(
        "ties",
        "ties",
        {"gsm8k_math": 0.5, "latin_translation": 0.3, "ms_marco_qa": 0.2},
        density=0.5,
        note="TIES drops small changes and outvoted signs, so its weights are not coefficients.",
    ),
    Merge(
        "dare_linear",
        "dare_linear",
        {"reason_math": 0.5, "latin_translation": 0.3, "ms_marco_qa": 0.4},
        density=0.5,
        note="DARE drops half of every change at random: that half of the energy cannot be explained.",
    ),
    Merge(
        "outside",
        "linear",
        {"gsm8k_math": 0.35, "latin_translation": 0.25, OUTSIDE: 0.4},
        note=f"{OUTSIDE} is not in the dictionary: its share stays unexplained.",
    ),
)


def merged(world: World, merge: Merge) -> Path:
    """Return the folder of a merge, made by mergekit unless this very recipe has been merged before."""
    folder = world.folder / "merges" / merge.name
    recipe, fresh = folder / "recipe.yml", folder / "recipe.new.yml"
    write_recipe(
        fresh,
        method=merge.method,
        weights={world.checkpoint(task): weight for task, weight in merge.weights.items()},
        base=world.base,
        density=merge.density,
    )
    if not recipe.exists() or recipe.read_bytes() != fresh.read_bytes():
        run_mergekit(fresh, folder / "model", seed=SEED)
    # Renamed only now, so a recipe without ".new" is always that of the model beside it.
    fresh.replace(recipe)
    return folder / "model"


def comparison(merge: Merge, found: Attribution) -> Table:
    """Set what was found beside what was true."""
    table = Table("component", title=f"{merge.name} ({merge.method})", title_justify="left")
    for heading in ("true", "present", "weight", "95 % interval", "fit"):
        table.add_column(heading, justify="right")
    for component in found.components:
        low_high = component.interval
        table.add_row(
            component.name,
            f"{merge.coefficients.get(component.name, 0.0):.4f}",
            {True: "yes", False: "no", None: "cannot tell"}[component.present],
            "" if component.weight is None else f"{component.weight:.4f}",
            "none" if low_high is None else f"{low_high[0]:.4f} to {low_high[1]:.4f}",
            f"{component.coefficient:.4f}",
        )
    return table


def mean_error(merge: Merge, found: Attribution) -> float:
    """Return the mean absolute difference between true and found weights over the dictionary."""
    true = merge.coefficients
    return fmean(abs((one.weight or 0.0) - true.get(one.name, 0.0)) for one in found.components)


def take_apart(world: World, merge: Merge, console: Console) -> None:
    """Attribute one merge and print the answer beside the truth."""
    target = merged(world, merge)
    atoms = [world.adapter(task) for task in DICTIONARY]
    start = time.perf_counter()
    found = attribute(target, atoms, base=world.base, signed=merge.signed)
    seconds = time.perf_counter() - start
    console.print(comparison(merge, found))
    console.print(found.verdict)
    console.print(f"mean absolute error of the weights: {mean_error(merge, found):.4f}; time: {seconds:.2f} s")
    console.print(f"{merge.note}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make merges and take them apart.")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything the demo makes")
    folder = parser.parse_args().output
    console = Console()
    start = time.perf_counter()
    world = build_world(folder, tasks=(*DICTIONARY, OUTSIDE), seed=SEED, progress=console.print)
    for merge in MERGES:
        take_apart(world, merge, console)
    console.print(f"{time.perf_counter() - start:.0f} s in all; everything is in {folder}")


# Worker processes import this file again, so nothing may run on import.
if __name__ == "__main__":
    main()
