"""One setting chosen per merge and algorithm, and means over merges.

Sums are exact (`math.fsum`), so the order of the rows in the file does not reach a single byte.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmerge.experiment.readings import ALGORITHMS, Run


@dataclass(frozen=True, slots=True)
class Way:
    """Which coordinates are looked at, and what a setting is chosen by."""

    coordinates: str
    chosen_by: str
    label: str


WAYS = (
    Way("top_k", "error", "Top-k, by error"),
    Way("top_k", "heldout_error", "Top-k, held out"),
    Way("all", "error", "All, by error"),
    Way("all", "heldout_error", "All, held out"),
)
"""The paper's way first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one algorithm says about one merge.

    Attributes
    ----------
    case : Run
        Any of its runs: it tells seed, target, group, method and algorithm.
    best : Run or None
        The run of the chosen setting; None if all settings failed.
    failed : int
        Settings that failed.
    """

    case: Run
    best: Run | None
    failed: int


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measure of an algorithm, over the merges of a group and a method (None: over all of them)."""

    measure: str
    algorithm: str
    group: str | None = None
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A quantity as measured.

    Attributes
    ----------
    mean, std : float or None
        Over merges; the standard deviation is the population's. None if nothing was measured.
    merges : int
        Merges that count.
    lost : int
        Merges for which all settings failed; they do not count.
    failed : int
        Runs that failed, one per setting.
    """

    mean: float | None
    std: float | None
    merges: int
    lost: int
    failed: int


def choose(runs: Iterable[Run], way: Way) -> list[Choice]:
    """Choose one setting per merge and algorithm.

    Parameters
    ----------
    runs : iterable of Run
        Those of other coordinates are passed over.
    way : Way
        `way.chosen_by` is the measure that is to be smallest. Of equal settings the one with the fewest
        components is taken, then the first by its text.

    Returns
    -------
    list of Choice
        Ordered by algorithm, seed and target.
    """
    cases: dict[tuple[str, int, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.coordinates == way.coordinates:
            cases[run.algorithm, run.seed, run.target].append(run)
    return [_choice(cases[key], way.chosen_by) for key in sorted(cases)]


def _choice(settings: Sequence[Run], chosen_by: str) -> Choice:
    usable = [run for run in settings if run.failure is None]
    best = min(usable, key=lambda run: (run.numbers[chosen_by], run.numbers["sparsity"], run.setting), default=None)
    return Choice(settings[0], best, len(settings) - len(usable))


def summarise(choices: Iterable[Choice], quantity: Quantity) -> Summary:
    """Average a quantity over the merges it speaks of.

    Parameters
    ----------
    choices : iterable of Choice
        Of one way.
    quantity : Quantity
        What of which algorithm, and over which merges.
    """
    cases = [choice for choice in choices if speaks_of(quantity, choice.case)]
    usable = [choice.best for choice in cases if choice.best is not None]
    values = [run.numbers[quantity.measure] for run in usable if quantity.measure in run.numbers]
    mean, std = mean_and_std(values) if values else (None, None)
    return Summary(mean, std, len(values), len(cases) - len(usable), sum(choice.failed for choice in cases))


def speaks_of(quantity: Quantity, run: Run) -> bool:
    """Tell whether a run is one of those that a quantity is the mean over."""
    return (
        run.algorithm == quantity.algorithm
        and quantity.group in (None, run.group)
        and quantity.method in (None, run.method)
    )


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the population's standard deviation; the order of the values does not matter."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def paper_numbers(paper: Mapping[str, Any]) -> dict[Quantity, tuple[float, float | None]]:
    """Return every number of the paper's tables, as (mean, standard deviation or None).

    Parameters
    ----------
    paper : mapping
        What `unmerge.experiment.paper.facts` returns.
    """
    tables = paper["tables"]
    names = {label: name for name, label in ALGORITHMS.items()}
    found: dict[Quantity, tuple[float, float | None]] = {}
    for label, measure, (mean, std) in _cells(tables["1_overall"]):
        found[Quantity(measure, names[label])] = (mean, std)
    for group, measure, (mean, std) in _cells(tables["2_nnls_by_category"]):
        found[Quantity(measure, "nnls", group)] = (mean, std)
    for label, method, (mean, std) in _cells(tables["3_error_known_by_method"]):
        found[Quantity("error", names[label], "known", method)] = (mean, std)
    for label, group, (mean, std) in _cells(tables["4_error_by_category"]):
        found[Quantity("error", names[label], group)] = (mean, std)
    for label, method, (precision, recall) in _cells(tables["5_precision_recall_known"]):
        found[Quantity("precision", names[label], "known", method)] = (precision, None)
        found[Quantity("recall", names[label], "known", method)] = (recall, None)
    for label, method, mean in _cells(tables["6_sparsity_known"]):
        found[Quantity("sparsity", names[label], "known", method)] = (mean, None)
    return found


def _cells(table: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    return ((row, column, value) for row, line in table.items() for column, value in line.items())
