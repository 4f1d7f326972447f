"""Progress on stderr while files are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from unmerge.accumulate import Plan


@contextmanager
def progress_bar(console: Console, *, enabled: bool) -> Iterator[Callable[[Plan], Callable[[int], None]]]:
    """Show a bar for the pass over the files; on a terminal only.

    Yields
    ------
    callable
        To be given as `start`: told the plan, it returns what is called with finished parameters.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:

        def start(plan: Plan) -> Callable[[int], None]:
            memory = f"{plan.memory / 2**20:,.0f} MiB of blocks"
            task = progress.add_task(f"reading {plan.count:,} parameters ({memory} at most)", total=plan.count)
            return lambda count: progress.advance(task, count)

        yield start


@contextmanager
def step_bars(console: Console, *, enabled: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Show a bar for each stage of work that names itself; on a terminal only.

    Yields
    ------
    callable
        Told what is done and in how many steps, it returns what is called with the number of steps that were finished.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:

        def start(what: str, steps: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=steps)
            return lambda count: progress.advance(task, count)

        yield start
