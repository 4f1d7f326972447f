from __future__ import annotations

import pytest

from unmerge.experiment.world import build_world

TINY = {
    "tasks": ("gsm8k_math", "xsum"),
    "seed": 3,
    "workers": 1,
    "base": {"steps": 2, "batch": 2, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 24, "threads": 1},
    "adapters": {"steps": 2, "batch": 2, "examples": 8, "rank": 2, "alpha": 4},
}


@pytest.fixture(scope="session")
def tiny_options():
    """Settings of a world that takes a second: it has every part, and knows nothing."""
    return TINY


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("tiny"), **TINY)
