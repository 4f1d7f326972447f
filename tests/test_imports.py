"""Imports go one way, and importing unmerge is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.start_up import LIMIT_SECONDS, LIMIT_TIMES, measure

SOURCE = Path(__file__).resolve().parent.parent / "src" / "unmerge"
# From the bottom to the top; a module imports from rooms below its own, and from its own.
ROOMS = [
    {"errors", "_version"},
    {"parquet"},
    {"parallel"},
    {"checkpoint"},
    {"alignment"},
    {"task_vector"},
    {"fingerprint"},
    {"fused"},
    {"float32"},
    {"cholesky"},
    {"directions"},
    {"torch_blocks"},
    {"accumulate"},
    {"journal", "cluster"},
    {"statistics"},
    {"solvers"},
    {"completion"},
    {"compress"},
    {"sketch"},
    {"dictionary"},
    {"regression"},
    {"extraction", "decoys"},
    {"evidence", "metrics"},
    {"screening"},
    {"cores"},
    {"corners"},
    {"base_share"},
    {"merging"},
    {"anytime"},
    {"findings"},
    {"shortlist"},
    {"result"},
    {"verdict"},
    {"summary"},
    {"attribution"},
    {"survey"},
    {"recipe"},
    {"report"},
    {"__init__"},
    {"testing", "experiment"},
    {"cli"},
    {"__main__"},
]
# Rooms that see less than everything below them.
ONLY = {
    "solvers": {"statistics", "solvers"},
    "evidence": {"statistics", "solvers", "evidence"},
    "completion": {"statistics", "solvers"},
    "metrics": {"statistics"},
    "screening": {"statistics", "solvers"},
    "statistics": set(),
    "result": set(),
    "report": {"result", "report", "dictionary", "accumulate", "evidence", "recipe"},
    "merging": {"merging", "errors"},
    "testing": {"checkpoint", "statistics"},
}
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unmerge":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name == "unmerge"}
    return {room if room in LEVEL else "__init__" for room in found}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    own = room_of(path)
    for room in imported_rooms(path):
        assert LEVEL[room] < LEVEL[own] or room == own, f"{own} imports {room}"
        assert room in ONLY.get(own, {room}), f"{own} imports {room}"


def test_import_is_fast_and_light() -> None:
    found = measure()
    assert found.heavy == ()
    assert found.seconds < LIMIT_SECONDS
    assert found.times < LIMIT_TIMES


def test_help_and_an_attribution_of_nothing_import_no_torch() -> None:
    code = "import sys, unmerge.cli, unmerge.attribution; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_never_imports_torch_but_in_two_modules() -> None:
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names)
    }
    assert {name for name in users if not name.startswith("experiment/")} == {
        "checkpoint/pickled.py",
        "torch_blocks.py",
    }
