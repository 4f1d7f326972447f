"""Coefficients of merges that the real mergekit makes of really trained adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.merges import CASES, LIMIT, TASKS, Case, measure

from unmerge.experiment.world import World, build_world


@pytest.fixture(scope="module")
def world(demo: Path) -> World:
    return build_world(demo, tasks=TASKS, seed=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.linear], ids=lambda case: case.name)
def test_coefficients_of_linear_merges_are_the_yaml_s(world: World, case: Case, tmp_path: Path) -> None:
    result, error = measure(world, case, tmp_path)
    assert error < LIMIT
    assert {item.name for item in result.components if item.present} == {
        name for name, weight in case.truth.items() if weight
    }
    # What is left is rounding: of the target (the floor), of the sources and inside mergekit.
    assert result.unexplained.share < 0.03
    if case.options.get("dtype") != "float32":
        assert 0.9 < result.unexplained.share / result.unexplained.rounding_floor < 3.0
