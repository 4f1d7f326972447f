"""Results of joblib are handed on, and dropped without a word."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator

import pytest
from joblib import Parallel, delayed

from unmerge.parallel import finished


def slow(number: int) -> int:
    time.sleep(0.01)
    return number


def results() -> Generator[int, None, None]:
    found: Generator[int, None, None] = Parallel(n_jobs=2, prefer="threads", return_as="generator", batch_size=1)(
        delayed(slow)(number) for number in range(100)
    )
    return found


def test_all_are_handed_on() -> None:
    assert list(finished(results())) == list(range(100))


def test_those_that_nobody_wants_any_more_are_dropped_without_a_warning() -> None:
    warned = results()
    next(warned)
    time.sleep(0.05)  # meanwhile others are ready, not all
    with pytest.warns(UserWarning, match="not used"):
        warned.close()
    found = finished(results())
    assert next(found) == 0
    time.sleep(0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.close()


def test_an_error_of_one_of_them_is_raised() -> None:
    found: Generator[float, None, None] = Parallel(n_jobs=2, prefer="threads", return_as="generator")(
        delayed(lambda number: 1 / number)(number) for number in (1, 0, 2)
    )
    with pytest.raises(ZeroDivisionError):
        list(finished(found))
