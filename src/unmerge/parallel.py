"""Results of joblib, handed on as they are finished."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from itertools import chain
from typing import TypeVar

Result = TypeVar("Result")


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
