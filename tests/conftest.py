"""Fixtures that several test files share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from filelock import FileLock

from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint

# The same examples in every run: a test that fails once fails again.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("test_docs.py", "test_findings.py", "test_mergekit.py", "test_beside.py")
"""Files that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, or at the end all but one of the processes wait for one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo's folder: a really trained base, adapters, and mergekit's merges; made once, then used again."""
    folder = ROOT / ".cache" / "demo"
    command = [sys.executable, ROOT / "examples" / "demo.py", "--output", folder]
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # tests run in several processes
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return folder


class Shelf:
    """A base, four adapters, a full fine-tune and a merge, as files of random weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(11)
        self.model = {name: quantise(value, "BF16") for name, value in tiny_model(rng).items()}
        self.base = str(write_checkpoint(folder / "base", self.model))
        self.changes = {name: write_adapter(folder / name, rng, self.model) for name in ("add", "sub", "json", "xml")}
        tuned = {name: value + 0.002 * rng.standard_normal(value.shape) for name, value in self.model.items()}
        write_checkpoint(folder / "full", tuned, "F32")
        self.merge("merge", add=0.6, json=0.3)

    def merge(self, name: str, dtype: str = "F32", **weights: float) -> str:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        return str(write_checkpoint(self.folder / name, merged, dtype))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def paths(self, *names: str) -> list[str]:
        return [self.path(name) for name in names]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")
