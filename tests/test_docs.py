"""The documentation cannot lie: its examples run, and what is generated is current."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import unmerge
from unmerge.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "attribution.schema.json", "recovery.schema.json", "verification.schema.json"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "console"):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line[2:]) for line in joined.splitlines() if line.startswith("$ unmerge")]
    return found


@pytest.fixture(scope="module")
def workplace(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it after `make demo`."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "demo-output").symlink_to(demo, target_is_directory=True)
    return folder


def test_there_are_examples() -> None:
    assert len(commands()) >= 5
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 1


def test_commands_run_in_the_order_of_the_pages(workplace: Path) -> None:
    for page, command in commands():
        words = shlex.split(command.split(" > ")[0])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        found = subprocess.run(
            [sys.executable, "-m", *words], cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, f"{page}: {command}\n{found.stderr}"


def test_python_examples_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for page in PAGES:
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), {})  # noqa: S102 - our own documentation


def test_generated_pages_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--output", tmp_path], check=True)
    assert {path.name for path in tmp_path.iterdir()} == GENERATED
    for name in GENERATED:
        assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), f"run `make docs` ({name})"


def test_the_schema_accepts_a_result_and_names_every_field() -> None:
    schema = json.loads((ROOT / "docs" / "attribution.schema.json").read_text())
    assert schema["properties"]["schema"]["const"] == "unmerge/attribution/1"
    assert set(schema["required"]) <= set(schema["properties"])


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_public_names_are_sorted_and_documented() -> None:
    assert sorted(unmerge.__all__) == sorted(set(unmerge.__all__))
    for name in unmerge.__all__:
        assert getattr(unmerge, name) is not None
        if not name.isupper() and not name.startswith("_"):
            assert getattr(unmerge, name).__doc__


def test_every_command_and_option_has_help() -> None:
    import typer

    def check(command: object) -> None:
        assert command.help, command.name  # type: ignore[attr-defined]
        for parameter in command.params:  # type: ignore[attr-defined]
            assert parameter.name == "help" or parameter.help, parameter.name
        for child in getattr(command, "commands", {}).values():
            check(child)

    check(typer.main.get_command(app))


def test_the_changelog_and_the_citation_name_this_version() -> None:
    assert f"## {unmerge.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {unmerge.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f'version = "{unmerge.__version__}"' in (ROOT / "pyproject.toml").read_text()
