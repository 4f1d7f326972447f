"""The benchmark of memory, at a size at which it takes seconds."""

from __future__ import annotations

from benchmarks.memory import measure


def test_what_a_process_grows_by_is_less_than_its_plan_said() -> None:
    grown, bound, size = measure(1, hidden=512)
    assert 0 < grown < bound
    assert size > 512 * 2048
