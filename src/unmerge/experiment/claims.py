"""What the paper claims of its numbers, as checks of ours and of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from unmerge.experiment.aggregation import Quantity
from unmerge.experiment.readings import ALGORITHMS, GROUPS, METHODS


@dataclass(frozen=True, slots=True)
class Claim:
    """An ordering that the paper states, in words and as a check of numbers rounded to two decimals."""

    text: str
    terms: tuple[tuple[str, Quantity], ...]
    holds: Callable[[Sequence[float]], bool]


def claims() -> list[Claim]:
    """Return the orderings that the paper states in its text or shows in its tables."""
    return [*_claims_on_known(), *_claims_on_categories(), *_claims_on_algorithms()]


def _claims_on_known() -> list[Claim]:
    exact = [
        (f"{label} {measure}", Quantity(measure, "nnls", "known", method))
        for method, label in METHODS.items()
        for measure in ("precision", "recall")
    ]
    ladders = [
        Claim(
            f"{label}, known: error of task arithmetic ≤ linear < TIES < DARE",
            _terms_by_method("error", name),
            _rises_from_the_second,
        )
        for name, label in ALGORITHMS.items()
    ]
    least = [
        Claim(
            f"{label}, known: DARE has the largest error",
            _terms_by_method("error", name),
            _last_is_largest,
        )
        for name, label in ALGORITHMS.items()
    ]
    perfect = (("perfect match rate", Quantity("perfect_match", "nnls", "known")),)
    counts = _terms_by_method("sparsity", "nnls")
    return [
        *ladders,
        *least,
        Claim("NNLS, known: precision and recall 1.00 for each of the four methods", tuple(exact), _all_one),
        Claim("NNLS, known: perfect match rate 1.00", perfect, _all_one),
        Claim("NNLS, known: 4.33 components for all four methods, as many as are inside", counts, _all_true_count),
    ]


def _claims_on_categories() -> list[Claim]:
    ladders = [
        Claim(
            f"{label}: error on known < mixed < unknown",
            _terms_by_group("error", name),
            _rises,
        )
        for name, label in ALGORITHMS.items()
    ]
    recall = (("recall", Quantity("recall", "nnls", "mixed")),)
    fall = (
        ("mixed", Quantity("precision", "nnls", "mixed")),
        ("known", Quantity("precision", "nnls", "known")),
    )
    nothing = (
        ("precision", Quantity("precision", "nnls", "unknown")),
        ("recall", Quantity("recall", "nnls", "unknown")),
    )
    return [
        *ladders,
        Claim("NNLS, mixed: recall 1.00", recall, _all_one),
        Claim("NNLS: precision on mixed < known", fall, _rises),
        Claim("NNLS, unknown: precision and recall 0 (true by definition)", nothing, lambda x: set(x) == {0.0}),
    ]


def _claims_on_algorithms() -> list[Claim]:
    def overall(measure: str, *names: str) -> tuple[tuple[str, Quantity], ...]:
        return tuple((ALGORITHMS[name], Quantity(measure, name)) for name in names)

    others = [name for name in ALGORITHMS if name not in ("lasso", "ridge")]
    return [
        Claim(
            "Overall: NNLS, OMP and Ridge have the same error",
            overall("error", "nnls", "omp", "ridge"),
            lambda x: len(set(x)) == 1,
        ),
        Claim(
            "Overall: error of NNLS < Elastic Net < dot product < Lasso",
            overall("error", "nnls", "elastic_net", "dot_product", "lasso"),
            _rises,
        ),
        Claim(
            "Overall: Lasso has the fewest components, Ridge the most (Lasso, the others, Ridge)",
            overall("sparsity", "lasso", *others, "ridge"),
            lambda x: x[0] < min(x[1:]) and x[-1] > max(x[:-1]),
        ),
        Claim(
            "Overall: Lasso has the highest precision (the others, Lasso)",
            overall("precision", *others, "ridge", "lasso"),
            _last_is_largest,
        ),
    ]


def _terms_by_method(measure: str, name: str) -> tuple[tuple[str, Quantity], ...]:
    return tuple((label, Quantity(measure, name, "known", method)) for method, label in METHODS.items())


def _terms_by_group(measure: str, name: str) -> tuple[tuple[str, Quantity], ...]:
    return tuple((label, Quantity(measure, name, group)) for group, label in GROUPS.items())


def _rises(values: Sequence[float]) -> bool:
    return all(low < high for low, high in pairwise(values))


def _rises_from_the_second(values: Sequence[float]) -> bool:
    return values[0] <= values[1] and _rises(values[1:])


def _last_is_largest(values: Sequence[float]) -> bool:
    return values[-1] > max(values[:-1])


def _all_one(values: Sequence[float]) -> bool:
    return set(values) == {1.0}


def _all_true_count(values: Sequence[float]) -> bool:
    # (3 + 5 + 4 + 4 + 5 + 5) / 6 components in the paper's six known compositions.
    return set(values) == {4.33}
