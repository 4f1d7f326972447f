"""The file of results, read back and checked: one `Run` per row."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmerge.errors import MissingExtraError, UnmergeError
from unmerge.experiment.layout import RESULTS, TRAINING

ALGORITHMS = {
    "nnls": "NNLS",
    "omp": "OMP",
    "ridge": "Ridge",
    "elastic_net": "Elastic Net",
    "dot_product": "Dot product",
    "lasso": "Lasso",
}
METHODS = {"task_arithmetic": "Task arithmetic", "linear": "Linear", "ties": "TIES", "dare_linear": "DARE"}
GROUPS = {"known": "Known", "mixed": "Mixed", "unknown": "Unknown"}
COORDINATES = {"top_k": "Top-k", "all": "All parameters"}
MEASURES = ("error", "heldout_error", "precision", "recall", "perfect_match", "sparsity", "coefficient_mae")
"""What every row that did not fail holds."""
OPTIONAL_MEASURES = ("unexplained", "rounding_floor")
TRAINED = ("relative_norm", "loss_before", "loss_after")
IDENTITY = ("seed", "target", "composition", "group", "method", "coordinates", "algorithm", "setting")
LISTS = ("names", "coefficients", "truth")


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the results: one setting of one algorithm on one merge.

    Attributes
    ----------
    numbers : mapping of str to float
        By measure; empty if the run failed.
    coefficients, truth : mapping of str to float
        By atom, dimensionless; coefficients are empty if the run failed.
    failure : str or None
        Why there is no result.
    """

    seed: int
    target: str
    composition: int
    group: str
    method: str
    coordinates: str
    algorithm: str
    setting: str
    numbers: Mapping[str, float]
    coefficients: Mapping[str, float]
    truth: Mapping[str, float]
    failure: str | None


def read_results(results: Path) -> list[Run]:
    """Read the rows of the experiment and check that they are what they should be.

    Parameters
    ----------
    results : path
        Folder with ``results.parquet``, or the file.

    Returns
    -------
    list of Run
        In the file's order.

    Raises
    ------
    UnmergeError
        There is no such file, it is not Parquet, or its rows are not those of this experiment: a column is
        missing, a value unknown, a number missing from a run that did not fail, or a run there twice.
    """
    path = _results_file(results)
    runs = [_run(path, number, row) for number, row in enumerate(_read_rows(path), start=1)]
    _check_distinct(path, runs)
    return runs


def _results_file(results: Path) -> Path:
    return results / RESULTS if results.is_dir() else results


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow is needed to read results: pip install 'unmerge[experiment]'") from error
    if not path.is_file():
        raise UnmergeError(f"{path} is not there: make it with unmerge experiment run --output {path.parent}")
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnmergeError(f"{path} cannot be read as Parquet ({reason}): give an experiment's results") from error
    missing = [name for name in (*IDENTITY, *LISTS, *MEASURES, "failure") if name not in table.column_names]
    if missing:
        message = f"{path} lacks the columns {', '.join(missing)}: give the results of unmerge experiment run"
        raise UnmergeError(message)
    if not table.num_rows:
        raise UnmergeError(f"{path} holds no rows: run the experiment to its end")
    return list(table.to_pylist())


def _run(path: Path, number: int, row: Mapping[str, Any]) -> Run:
    try:
        return _parse(row)
    except (TypeError, ValueError) as error:
        message = f"{path}, row {number} is not of this experiment ({error}): give the results of its run"
        raise UnmergeError(message) from error


def _parse(row: Mapping[str, Any]) -> Run:
    for column, allowed in (
        ("group", GROUPS),
        ("method", METHODS),
        ("coordinates", COORDINATES),
        ("algorithm", ALGORITHMS),
    ):
        if row[column] not in allowed:
            raise ValueError(f"{column} is {row[column]!r}, not one of {', '.join(allowed)}")
    names = tuple(row["names"] or ())
    failure = row["failure"]
    return Run(
        seed=int(row["seed"]),
        target=str(row["target"]),
        composition=int(row["composition"]),
        group=str(row["group"]),
        method=str(row["method"]),
        coordinates=str(row["coordinates"]),
        algorithm=str(row["algorithm"]),
        setting=str(row["setting"]),
        # A failed run has no numbers, whatever the file holds in their place.
        numbers={} if failure is not None else _numbers(row),
        coefficients={} if failure is not None else _by_atom(names, row, "coefficients"),
        truth=_by_atom(names, row, "truth"),
        failure=None if failure is None else str(failure),
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name in (*MEASURES, *OPTIONAL_MEASURES):
        value = row.get(name)
        if value is None and name in OPTIONAL_MEASURES:
            continue
        if value is None or not math.isfinite(value):
            raise ValueError(f"{name} is {value} in a run that did not fail")
        found[name] = float(value)
    return found


def _by_atom(names: Sequence[str], row: Mapping[str, Any], column: str) -> dict[str, float]:
    values = row[column] or ()
    if len(values) != len(names):
        raise ValueError(f"{len(values)} {column} for {len(names)} names")
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _check_distinct(path: Path, runs: Iterable[Run]) -> None:
    counts = Counter((run.seed, run.target, run.coordinates, run.algorithm, run.setting) for run in runs)
    identity, count = counts.most_common(1)[0]
    if count > 1:
        said = ", ".join(str(part) for part in identity)
        raise UnmergeError(f"{path} holds the run {said} {count} times: run the experiment again in an empty folder")


def read_training(results: Path) -> list[dict[str, Any]]:
    """Read the training record beside the results: one entry per seed and task.

    Raises
    ------
    UnmergeError
        It is missing, or not such a record.
    """
    path = _results_file(results).with_name(TRAINING)
    if not path.is_file():
        raise UnmergeError(f"{path} is not there: it belongs beside the results")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"seed": int(one["seed"]), "task": str(one["task"])} | {name: float(one[name]) for name in TRAINED}
            for one in records
        ]
    except (ValueError, TypeError, KeyError) as error:
        message = f"{path} is not a list of trainings ({type(error).__name__}: {error}): give the experiment's own"
        raise UnmergeError(message) from error
