"""What was recovered, by method and by merge, and against the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from benchmarks.evidence.report import Check, Report, Table, number
from benchmarks.recipes.recovering import RANDOM
from benchmarks.recipes.rows import Recovered

ABOUT = """\
mergekit merges fine-tunes of one small base, and `recover` is given the merge, the base and a dictionary of 8
fine-tunes: neither members nor weights, nor the method. What it finds is compared with the recipe, and mergekit runs
the recovered file again. `equal`: of the values in which the merge or the one made again differs from the base, those
that are equal to the last bit. `at ties`: the share of values at a trim threshold, which the order of a sort decides.
`paper's error`: 1 - max(0, cos)^2 between the changes of the merge and of the merge made again. Weights are compared
as they act (divided by their sum where the merge divides, times lambda), in spacings of bfloat16 at the true weight,
in every tensor that any member changes. `no seed`: random masks were decoded, and their seed was not looked for.
`unknown member`: the dictionary lacks one of three. `strangers`: it lacks all, and has a sibling of each."""
DENSE = ("linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough")
TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion")
WEIGHTLESS = ("karcher", "model_stock", "passthrough", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion")
"""Methods that leave no weights to choose."""
EQUAL, TRIMMED_EQUAL = 0.999, 0.99
MASK_ERROR = 0.001
DECOY_ERROR = 0.02
"""What decoys leave must be over this."""
TIES_ERROR, DARE_ERROR = 0.005, 0.001
"""Limits of the paper's error."""
Read = Callable[[Recovered], float | None]


def report(rows: Sequence[Recovered]) -> Report:
    """Report what was recovered: by method, by case, and against the limits."""
    return Report("Recovery", ABOUT, [_by_method(rows), _by_case(rows), _partial(rows)], _checks(rows))


def _by_method(rows: Sequence[Recovered]) -> Table:
    cells = []
    for method in sorted({row.method for row in rows}):
        own = [row for row in rows if row.method == method and row.group == "method"]
        cells.append(
            (
                method,
                str(len(own)),
                _count(own, lambda row: row.method_right),
                _count(own, lambda row: row.members_right),
                _count(own, lambda row: row.weight_cells is None or row.weight_cells <= 1.0),
                number(max((row.weight_cells for row in own if row.weight_cells is not None), default=None), 2),
                _percent(_least(own, lambda row: row.equal)),
                _percent(_most(own, lambda row: row.at_ties)),
                _scientific(_most(own, lambda row: row.paper_error)),
                number(_most(own, lambda row: row.seconds), 0),
            )
        )
    header = (
        "method", "merges", "method right", "members right", "weights within a cell", "largest error, cells",
        "equal, least", "at ties, most", "paper's error, most", "seconds, most",
    )  # fmt: skip
    return Table("By method, where the dictionary has all members and the seed is looked for.", header, cells)


def _by_case(rows: Sequence[Recovered]) -> Table:
    cells = [
        (
            row.name,
            row.status,
            row.found_method + (f" (or {', '.join(dict.fromkeys(row.alike))})" if row.alike else ""),
            "right" if row.members_right else ", ".join(row.members) or "none",
            number(row.weight_cells, 2),
            number(row.other_error, 4),
            _percent(row.equal),
            "" if row.unequal is None else str(row.unequal),
            _seed(row),
            number(row.seconds, 0),
        )
        for row in rows
        if row.group == "method"
    ]
    header = (
        "merge", "status", "method", "members", "weights, cells", "other numbers", "equal", "unequal values", "seed",
        "seconds",
    )  # fmt: skip
    return Table("Every merge whose members are all known.", header, cells)


def _partial(rows: Sequence[Recovered]) -> Table:
    cells = [
        (
            row.name,
            row.status,
            row.found_method,
            "right" if row.members_right else ", ".join(row.members) or "none",
            number(row.weight_cells, 2),
            _percent(row.proved),
            _scientific(row.decoded_error),
            number(row.decoy_error, 3),
            number(row.seconds, 0),
        )
        for row in rows
        if row.group != "method"
    ]
    header = ("merge", "status", "method", "members", "weights, cells", "proved", "error", "decoys' error", "seconds")
    return Table("No seed, an unknown member, none but strangers.", header, cells)


def _count(rows: Sequence[Recovered], holds: Callable[[Recovered], bool]) -> str:
    return f"{sum(map(holds, rows))}/{len(rows)}"


def _least(rows: Sequence[Recovered], read: Read) -> float | None:
    return min((value for value in map(read, rows) if value is not None), default=None)


def _most(rows: Sequence[Recovered], read: Read) -> float | None:
    return max((value for value in map(read, rows) if value is not None), default=None)


def _seed(row: Recovered) -> str:
    if row.seed is None:
        return ""
    if row.found_seed is None:
        return "not found"
    return f"{row.found_seed} ({'right' if row.found_seed == row.seed else f'WRONG, it is {row.seed}'})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100.0 * share:.6g} %"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _cells(row: Recovered) -> float | None:
    """Return the error of the weights: none where there are no weights, endless where they cannot be compared."""
    return None if row.method in WEIGHTLESS else inf if row.weight_cells is None else row.weight_cells


def _equal(row: Recovered) -> float:
    return row.equal or 0.0


def _error(row: Recovered) -> float:
    return 1.0 if row.paper_error is None else row.paper_error


def _decoded(row: Recovered) -> float:
    return 1.0 if row.decoded_error is None else row.decoded_error


def _decoy(row: Recovered) -> float | None:
    return row.decoy_error


def _of(rows: Sequence[Recovered], *methods: str) -> list[Recovered]:
    return [row for row in rows if row.method in methods]


def _share(rows: Sequence[Recovered], holds: Callable[[Recovered], bool]) -> float | None:
    return sum(map(holds, rows)) / len(rows) if rows else None


def _checks(rows: Sequence[Recovered]) -> list[Check]:
    known, unseeded, unknown, strangers = (
        [row for row in rows if row.group == group] for group in ("method", "no seed", "unknown member", "strangers")
    )
    known_or_unseeded = [*known, *unseeded]
    return [
        Check("method right", _share(known_or_unseeded, lambda row: row.method_right), low=1.0),
        Check("members right", _share(known_or_unseeded, lambda row: row.members_right), low=1.0),
        Check("largest error of a weight, cells", _most(known_or_unseeded, _cells), high=1.0),
        Check("dense methods: equal, least", _least(_of(known, *DENSE), _equal), low=EQUAL),
        Check("trimmed methods: equal, least", _least(_of(known, *TRIMMED), _equal), low=TRIMMED_EQUAL),
        Check("DARE and DELLA with the seed: equal, least", _least(_of(known, *RANDOM), _equal), low=1.0),
        Check("DARE and DELLA without it: error, most", _most(unseeded, _decoded), high=MASK_ERROR),
        Check("decoys: error, least", _least(_of(known_or_unseeded, *RANDOM), _decoy), low=DECOY_ERROR),
        Check("TIES: paper's error, most", _most(_of(known, "ties"), _error), high=TIES_ERROR),
        Check("DARE: paper's error, most", _most(_of(known, "dare_linear"), _error), high=DARE_ERROR),
        Check("unknown member: partial, and members right", _share(unknown, _is_partial), low=1.0),
        Check("strangers: neither proven nor decoded", _share(strangers, _is_nothing), low=1.0),
    ]


def _is_partial(row: Recovered) -> bool:
    return row.status == "partial" and row.members_right


def _is_nothing(row: Recovered) -> bool:
    return row.status in {"partial", "nothing known"}
