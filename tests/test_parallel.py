"""Work on threads, and results of joblib that are handed on, and dropped without a word."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Generator, Iterator

import pytest
from joblib import Parallel, delayed

from unmerge.parallel import as_finished, finished, on_threads


def slow(number: int) -> int:
    time.sleep(0.01)
    return number


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_return_everything_in_order(workers: int) -> None:
    assert on_threads(slow, range(20), workers) == list(range(20))
    assert sorted(as_finished(slow, range(20), workers)) == list(range(20))
    assert on_threads(slow, [], workers) == list(as_finished(slow, [], workers)) == []


def test_threads_work_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)
    assert len(on_threads(lambda _: meeting.wait(), range(2), 2)) == 2
    assert len(list(as_finished(lambda _: meeting.wait(), range(2), 2))) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_taken_than_can_be_worked_on_soon(workers: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    found = as_finished(slow, items(), workers)
    assert next(found) in range(2 * workers)
    assert len(taken) <= 4 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_on_threads_is_raised_and_what_has_not_begun_is_left(workers: int) -> None:
    begun = []

    def fails(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ZeroDivisionError
        return slow(number)

    with pytest.raises(ZeroDivisionError):
        on_threads(fails, range(1000), workers)
    with pytest.raises(ZeroDivisionError):
        list(as_finished(fails, range(1000), workers))
    assert len(begun) < 100


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
