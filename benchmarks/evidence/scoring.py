"""Counting: pure functions of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from benchmarks.evidence.rows import Answer, Row

Rule = Callable[[Answer], bool]
BINS = ((0.0, 0.02), (0.02, 0.03), (0.03, 0.05), (0.05, 0.1), (0.1, 0.3), (0.3, inf))
"""Of effective weights, the lower bound included."""
CLEAR = 0.05
"""Recall has a limit from this effective weight on."""
LEVELS = (0.05, 0.01, 0.001, 0.0001)
TARGET_RATE = 0.001
"""The stated rate of targets in which an absent atom is accused."""


def claimed(answer: Answer) -> bool:
    """Tell whether an atom is called present by the test."""
    return answer.present is True


def named(answer: Answer) -> bool:
    """Tell whether an atom is called present, itself or as one of a group of versions of one fine-tune."""
    return answer.present is True or answer.one_of_group


@dataclass(frozen=True, slots=True)
class Share:
    """A count out of a total."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def error(self) -> float:
        """Binomial standard error of the share."""
        share = self.value
        return 0.0 if share is None else sqrt(share * (1.0 - share) / self.total)

    def within(self, confidence: float = 1.96) -> tuple[float, float]:
        """Return Wilson's interval of the share, which is honest at 0 and 1 too."""
        if not self.total:
            return 0.0, 1.0
        share, square = self.count / self.total, confidence**2
        centre = (share + square / (2 * self.total)) / (1 + square / self.total)
        spread = sqrt(share * (1 - share) / self.total + square / (4 * self.total**2)) / (1 + square / self.total)
        return max(0.0, centre - confidence * spread), min(1.0, centre + confidence * spread)

    def __str__(self) -> str:
        return f"{self.count}/{self.total}"


@dataclass(frozen=True, slots=True)
class Score:
    """What a rule did on some targets.

    Attributes
    ----------
    precision : Share
        Of the claimed atoms, those that are inside; twins of what is inside do not count.
    recall : Share
        Of the atoms that are inside, the claimed ones.
    accused : Share
        Of the absent atoms without twins, the claimed ones.
    """

    precision: Share
    recall: Share
    accused: Share


def score(rows: Iterable[Row], rule: Rule = claimed) -> Score:
    """Score a rule, all atoms of all targets counted alike."""
    inside, outside = split(rows)
    true = sum(rule(answer) for answer in inside)
    false = sum(rule(answer) for answer in outside)
    return Score(Share(true, true + false), Share(true, len(inside)), Share(false, len(outside)))


def split(rows: Iterable[Row]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers about atoms that are inside, and about those that are not, without twins."""
    every = [(row, answer) for row in rows for answer in row.answers]
    inside = [answer for _, answer in every if answer.truth]
    return inside, [answer for _, answer in every if answer.kind in ("sibling", "other")]


def share(answers: Iterable[Answer], rule: Rule = claimed) -> Share:
    """Return how many of some answers a rule holds for."""
    found = [rule(answer) for answer in answers]
    return Share(sum(found), len(found))


def undecided(answers: Iterable[Answer]) -> int:
    """Count the atoms of which it is said that one cannot tell."""
    return sum(answer.present is None for answer in answers)


def accused_targets(rows: Sequence[Row], rule: Rule = claimed) -> Share:
    """Return in how many targets an absent atom, twins aside, is accused."""
    return Share(sum(any(rule(answer) for answer in row.absent) for row in rows), len(rows))


def bin_of(weight: float) -> int:
    """Return the place of an effective weight in `BINS`."""
    return next(place for place, (low, high) in enumerate(BINS) if low <= weight < high)


def detection(rows: Iterable[Row], rule: Rule = claimed) -> list[Share]:
    """Return the detection rate in each bin of effective weights."""
    inside, _ = split(rows)
    found = Counter(bin_of(answer.truth) for answer in inside if rule(answer))
    total = Counter(bin_of(answer.truth) for answer in inside)
    return [Share(found[place], total[place]) for place in range(len(BINS))]


def exceedance(answers: Iterable[Answer], level: float) -> Share:
    """Return how many p-values are below a level; atoms without one do not count."""
    values = [answer.p_value for answer in answers if answer.p_value is not None]
    return Share(sum(value < level for value in values), len(values))


def contradicted(answers: Iterable[Answer]) -> Share:
    """Return how many atoms that are inside were missed although the test said that it would find their weight."""
    missed = [answer for answer in answers if answer.truth and not claimed(answer) and answer.detectable is not None]
    return Share(sum(answer.truth > (answer.detectable or inf) for answer in missed), len(missed))


def coverage(answers: Iterable[Answer]) -> Share:
    """Return how many intervals of atoms that are inside hold the true weight; atoms without one do not count."""
    bounds = [(answer.low, answer.truth, answer.high) for answer in answers if answer.truth]
    known = [(low, truth, high) for low, truth, high in bounds if low is not None and high is not None]
    return Share(sum(low <= truth <= high for low, truth, high in known), len(known))


def mean_width(answers: Iterable[Answer]) -> float | None:
    """Return the mean width of the intervals of atoms that are inside."""
    widths = [
        answer.high - answer.low
        for answer in answers
        if answer.truth and answer.low is not None and answer.high is not None
    ]
    return sum(widths) / len(widths) if widths else None
