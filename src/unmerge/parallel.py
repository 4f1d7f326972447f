"""Work on threads of this machine, and results of joblib, handed on as they are finished."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_threads(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> list[Result]:
    """Return what `work` makes of each item, in their order, on so many threads."""
    if workers == 1:
        return [work(item) for item in items]
    with _pool(workers) as pool:
        return list(pool.map(work, items))


def as_finished(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield what `work` makes of each item, in the order in which so many threads finish them.

    As many items again wait to be worked on; no more of them are taken before one is finished.
    """
    if workers == 1:
        yield from map(work, items)
        return
    left = iter(items)
    with _pool(workers) as pool:
        pending: set[Future[Result]] = {pool.submit(work, item) for item in islice(left, 2 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(work, item) for item in islice(left, len(done))}
            for future in done:
                yield future.result()


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Lend threads; who leaves early waits for what runs, and not for what has not begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def finished(results: Generator[Result, None, None]) -> Generator[Result, None, None]:
    """Yield what a `joblib.Parallel` that returns a generator yields.

    Whoever stops early does not want what was computed ahead; joblib would warn that it is lost.
    """
    try:
        # A chain has nothing to be closed: with the generator itself, `yield from` would close that, with the warning.
        yield from chain(results)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.close()
