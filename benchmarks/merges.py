"""Coefficients of real mergekit merges against their YAML: at most 0.005 apart for linear and task_arithmetic.

The base and adapters are the demo's, really trained; mergekit merges full bf16 checkpoints, as people do.
TIES and DARE are not linear, so no limit is set for them; their coefficients are printed for the record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge import Attribution, attribute
from unmerge.experiment.mergekit import run_mergekit, write_recipe
from unmerge.experiment.world import World, build_world

LIMIT = 0.005
TASKS = ("gsm8k_math", "reason_math", "latin_translation", "ms_marco_qa", "xsum", "style_transfer")
WORLD = Path(".cache") / "demo"
A, B, C, D = TASKS[:4]


@dataclass(frozen=True)
class Case:
    """A merge to make."""

    name: str
    method: str
    weights: Mapping[str, float]
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether the weights are coefficients."""
        return self.method in {"linear", "task_arithmetic"}

    @property
    def truth(self) -> dict[str, float]:
        """Coefficients that the YAML amounts to; `linear` and `ties` divide by the sum of weights."""
        total = sum(self.weights.values()) if self.method in {"linear", "ties"} else 1.0
        return {task: self.weights.get(task, 0.0) / total for task in TASKS[:5]}


CASES = (
    Case("linear, equal", "linear", {A: 0.25, B: 0.25, C: 0.25, D: 0.25}),
    Case("linear, unequal", "linear", {A: 0.55, B: 0.25, C: 0.15, D: 0.05}),
    Case("linear, unnormalised weights", "linear", {A: 1.0, C: 2.0, D: 0.5}),
    Case("linear, one negative", "linear", {A: 0.8, C: 0.5, D: -0.3}),
    Case("linear, fp32", "linear", {A: 0.5, B: 0.2, C: 0.3}, {"dtype": "float32"}),
    Case("task_arithmetic, equal", "task_arithmetic", {A: 0.25, B: 0.25, C: 0.25, D: 0.25}),
    Case("task_arithmetic, unequal", "task_arithmetic", {A: 0.9, C: 0.4, D: 0.1}),
    Case("task_arithmetic, one negative", "task_arithmetic", {A: 0.8, C: 0.6, D: -0.5}),
    Case("task_arithmetic, fp32", "task_arithmetic", {A: 0.7, B: -0.2, C: 0.4}, {"dtype": "float32"}),
    Case("ties, density 0.5", "ties", {A: 0.5, C: 0.3, D: 0.2}, {"density": 0.5}),
    Case("dare_linear, density 0.5", "dare_linear", {A: 0.5, C: 0.3, D: 0.2}, {"density": 0.5}),
)


def measure(world: World, case: Case, folder: Path) -> tuple[Attribution, float]:
    """Merge with mergekit, attribute to five adapters, and return the result and the largest coefficient error."""
    weights = {world.checkpoint(task): weight for task, weight in case.weights.items()}
    recipe = write_recipe(
        folder / "recipe.yml",
        method=case.method,
        weights=weights,
        base=world.base,
        **case.options,  # type: ignore[arg-type]
    )
    merged = run_mergekit(recipe, folder / "merge", seed=0)
    signed = min(case.weights.values()) < 0.0
    result = attribute(merged, [world.adapter(task) for task in TASKS[:5]], base=world.base, signed=signed)
    truth = case.truth
    return result, max(abs(item.coefficient - truth[item.name]) for item in result.components)


def run() -> bool:
    """Print the largest coefficient error of each merge."""
    print_heading("Coefficients of mergekit merges")
    world = build_world(WORLD, tasks=TASKS, seed=0)
    worst = 0.0
    rows: list[list[str]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            result, error = measure(world, case, Path(name))
        worst = max(worst, error) if case.linear else worst
        share, floor = result.unexplained.share, result.unexplained.rounding_floor
        rows.append(
            [case.name, f"{error:.4f}", f"{error / LIMIT:.2f}" if case.linear else "", f"{share:.3f}", f"{floor:.3f}"]
        )
    print_rows(["merge", "largest error", "of the limit", "unexplained", "rounding floor"], rows)
    return print_ratio("largest error of a linear merge", worst, LIMIT, "")
