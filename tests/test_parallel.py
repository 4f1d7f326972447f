"""Results of joblib are handed on, and dropped without a word."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator

import pytest
from joblib import Parallel, delayed

from unmerge.parallel import finished


def squares() -> Generator[int, None, None]:
    results: Generator[int, None, None] = Parallel(n_jobs=2, prefer="threads", return_as="generator")(
        delayed(pow)(number, 2) for number in range(20)
    )
    return results


def test_all_are_handed_on() -> None:
    assert list(finished(squares())) == [number**2 for number in range(20)]


def test_those_that_nobody_wants_any_more_are_dropped_without_a_warning() -> None:
    warned = squares()
    next(warned)
    time.sleep(0.3)  # meanwhile others are ready
    with pytest.warns(UserWarning, match="not used"):
        warned.close()
    found = finished(squares())
    assert next(found) == 0
    time.sleep(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.close()


def test_an_error_of_one_of_them_is_raised() -> None:
    results: Generator[float, None, None] = Parallel(n_jobs=2, prefer="threads", return_as="generator")(
        delayed(lambda number: 1 / number)(number) for number in (1, 0, 2)
    )
    with pytest.raises(ZeroDivisionError):
        list(finished(results))
