"""The commands ``unmerge experiment run``, ``unmerge experiment invert`` and ``unmerge experiment tables``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from unmerge.errors import UnmergeError

if TYPE_CHECKING:
    from unmerge.experiment.run import Start

app = typer.Typer(help="The paper's experiment, whole.", no_args_is_help=True, rich_markup_mode=None)


@app.command("run")
def run_command(
    output: Annotated[Path, typer.Option("--output", help="Folder for everything; a run that was cut short goes on.")],
    preset: Annotated[str, typer.Option("--preset", help="micro, or qwen2.5-7b for the paper's.")] = "micro",
    seeds: Annotated[str, typer.Option("--seeds", help="Worlds to run, by number.")] = "0,1,2",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; the preset's by default. Changes no result.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train adapters, merge them, and take the merges apart again."""
    # Imported here so that --help answers at once.
    from unmerge.experiment.presets import PRESETS
    from unmerge.experiment.run import run

    if preset not in PRESETS:
        raise UnmergeError(f"no preset is named {preset!r}: the presets are {', '.join(PRESETS)}")
    console = Console(stderr=True, quiet=quiet)
    with _progress(console) as start:
        path = run(PRESETS[preset], output, seeds=_numbers(seeds), workers=workers, start=start)
    console.print(f"results are in {path}", soft_wrap=True)


@app.command("invert")
def invert_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    groups: Annotated[str, typer.Option("--groups", help="Which merges: known, mixed, unknown.")] = "known",
    seeds: Annotated[str | None, typer.Option("--seeds", help="Worlds, by number; all of them by default.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Recover the recipes of a run's merges, and replay them. A call that was cut short goes on where it stopped."""
    from unmerge.experiment.inversion import invert, preset_of

    chosen = _groups(groups)
    worlds = None if seeds is None else _numbers(seeds)
    console = Console(stderr=True, quiet=quiet)
    with _progress(console) as start:
        path = invert(preset_of(folder), folder, groups=chosen, seeds=worlds, start=start)
    console.print(f"inversions are in {path}", soft_wrap=True)


@app.command("tables")
def tables_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
) -> None:
    """Write the paper's tables and figures, its numbers beside ours, into DIR/tables."""
    from unmerge.experiment.figures import write_figures
    from unmerge.experiment.tables import write_tables

    written = write_tables(folder, folder / "tables") + write_figures(folder, folder / "tables")
    Console(stderr=True).print(f"{len(written)} files are in {folder / 'tables'}", soft_wrap=True)


def _groups(text: str) -> tuple[str, ...]:
    from unmerge.experiment.readings import GROUPS

    found = tuple(text.split(","))
    unknown = [name for name in found if name not in GROUPS]
    if unknown:
        raise UnmergeError(f"no group of merges is named {unknown[0]!r}: the groups are {', '.join(GROUPS)}")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UnmergeError(f"seeds are {text!r}, expected numbers such as 0,1,2") from error
    if min(found) < 0:
        raise UnmergeError(f"seeds are {text!r}, expected numbers that are not negative")
    return found


@contextmanager
def _progress(console: Console) -> Iterator[Start]:
    """Show a bar with the remaining time for each phase; a line for each where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def start(phase: str, total: int) -> Callable[[], None]:
            if not console.is_terminal:
                console.print(f"{phase}: {total}")
            task = progress.add_task(phase, total=total)
            return lambda: progress.advance(task)

        yield start
