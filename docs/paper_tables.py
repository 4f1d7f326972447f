"""Pastes the tables of a finished experiment into ``paper.md``: ``python docs/paper_tables.py DIR``.

DIR is the folder of ``unmerge experiment run --preset micro``, after ``unmerge experiment invert`` and ``unmerge
experiment tables``.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

_PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
_FIGURES = ("error.png", "coefficients.png", "precision-recall.png")


def main() -> None:
    """Paste every table and copy the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    tables = parser.parse_args().folder / "tables"
    page = Path(__file__).parent / "paper.md"

    def paste(match: re.Match[str]) -> str:
        _, _, body = (tables / f"{match['name']}.md").read_text(encoding="utf-8").partition("\n")
        return f"{match[1]}{body.strip()}\n{match[3]}"

    page.write_text(_PLACE.sub(paste, page.read_text(encoding="utf-8")), encoding="utf-8")
    figures = page.parent / "figures"
    figures.mkdir(exist_ok=True)
    for name in _FIGURES:
        shutil.copyfile(tables / name, figures / name)


if __name__ == "__main__":
    main()
