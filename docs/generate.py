"""Writes the pages that are generated from the code: ``cli.md`` and the schemas of the JSON documents."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from unmerge.cli import app
from unmerge.recipe.proof import Recovery
from unmerge.recipe.verification import Verification
from unmerge.result import Attribution

DOCUMENTS: dict[str, type[BaseModel]] = {
    "attribution": Attribution,
    "recovery": Recovery,
    "verification": Verification,
}
"""What ``--json`` prints, by command."""
_INTRODUCTION = """# Command line

This page is generated from the help texts (`make docs`). Exit codes: 0 done; 1 a verification that failed; 2 bad usage
or bad input, with one line on stderr and nothing written. Progress and warnings go to stderr, results to stdout.
"""


def help_texts(command: Any, path: str) -> Iterator[str]:
    """Yield a Markdown section for a command and its children."""
    context = command.make_context(path, [], resilient_parsing=True, max_content_width=100, terminal_width=100)
    yield f"## `{path}`\n\n```text\n{command.get_help(context).strip()}\n```\n"
    for name, child in getattr(command, "commands", {}).items():
        yield from help_texts(child, f"{path} {name}")


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    output = parser.parse_args().output
    sections = [_INTRODUCTION, *help_texts(typer.main.get_command(app), "unmerge")]
    (output / "cli.md").write_text("\n".join(sections), encoding="utf-8")
    for name, document in DOCUMENTS.items():
        schema = document.model_json_schema(by_alias=True, mode="serialization")
        (output / f"{name}.schema.json").write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
