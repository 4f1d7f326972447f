"""The files of results: their columns, and what made them, in Parquet."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmerge.errors import UnmergeError
from unmerge.experiment.decomposition import Row
from unmerge.parquet import METADATA, require_pyarrow, write_table

PACKAGES = ("unmerge", "numpy", "scipy", "torch", "transformers", "peft", "mergekit", "safetensors")
_EXTRA = "results", "experiment"

_RESULTS = {
    "seed": "integer",
    "target": "text",
    "composition": "integer",
    "group": "text",
    "method": "text",
    "coordinates": "text",
    "algorithm": "text",
    "setting": "text",
    "names": "texts",
    "coefficients": "numbers",
    "truth": "numbers",
    "error": "number",
    "heldout_error": "number",
    "precision": "number",
    "recall": "number",
    "perfect_match": "truth",
    "sparsity": "integer",
    "coefficient_mae": "number",
    "unexplained": "number",
    "rounding_floor": "number",
    "status": "text",
    "failure": "text",
}
_INVERSIONS = {
    "seed": "integer",
    "target": "text",
    "composition": "integer",
    "group": "text",
    "method": "text",
    "status": "text",
    "found_method": "text",
    "method_right": "truth",
    "members": "texts",
    "precision": "number",
    "recall": "number",
    "weight_error": "number",
    "equal_share": "number",
    "error": "number",
    "decoy_error": "number",
    "seconds": "number",
    "recipe": "text",
    "failure": "text",
}


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write_results(path: Path, rows: Sequence[Row], metadata: Mapping[str, Any]) -> None:
    """Write rows and what made them; the same rows give the same bytes, and no half of a file is ever seen.

    Parameters
    ----------
    path : path
        File to write.
    rows : sequence of dict
        From `unmerge.experiment.decomposition`.
    metadata : mapping
        Settings, versions, digests: anything that JSON can hold.

    Raises
    ------
    MissingExtraError
        pyarrow is not installed.
    """
    _write(path, rows, _RESULTS, metadata)


@dataclass(frozen=True, slots=True)
class Inversion:
    """What came of inverting one merge: one row of the file of inversions.

    Attributes
    ----------
    seed : int
    target : str
    composition : int
    group, method : str
        What the merge is, as in the results.
    status : str or None
        `unmerge.recipe.proof.Recovery.status`; like all that follows, None if the inversion failed.
    found_method : str or None
        The method that was found; None also where it cannot be told.
    method_right : bool or None
        Whether it is the merge's.
    members : tuple of str
        The atoms that the recipe gives a weight.
    precision, recall : float or None
        Of the members, by the paper's conventions.
    weight_error : float or None
        The largest difference of a weight from the true one, over atoms and tensors; weights that a method divides by
        their sum are compared after that. None also where a recipe has no weights.
    equal_share : float or None
        Share of the elements looked at that the recipe makes: to the bit, or with some masks of its densities.
    error : float or None
        The paper's reconstruction error, see `unmerge.recipe.inversion`.
    decoy_error : float or None
        Where masks were decoded: the share of the change's energy that decoding leaves if the members are exchanged
        for decoys. None elsewhere.
    seconds : float or None
        Wall time of the recovery, without the merge and the error.
    recipe : str or None
        mergekit's YAML, the experiment's folder written as ``.``.
    failure : str or None
        Why there is no inversion.
    """

    seed: int
    target: str
    composition: int
    group: str
    method: str
    status: str | None = None
    found_method: str | None = None
    method_right: bool | None = None
    members: tuple[str, ...] = ()
    precision: float | None = None
    recall: float | None = None
    weight_error: float | None = None
    equal_share: float | None = None
    error: float | None = None
    decoy_error: float | None = None
    seconds: float | None = None
    recipe: str | None = None
    failure: str | None = None


def write_inversions(path: Path, inversions: Sequence[Inversion], metadata: Mapping[str, Any]) -> None:
    """Write inversions and what made them, whole or not at all.

    Raises
    ------
    MissingExtraError
        pyarrow is not installed.
    """
    _write(path, [asdict(one) for one in inversions], _INVERSIONS, metadata)


def read_inversions(path: Path) -> list[Inversion]:
    """Read what `write_inversions` wrote; empty if there is no such file.

    Raises
    ------
    UnmergeError
        It cannot be read, or has other columns.
    MissingExtraError
        pyarrow is not installed.
    """
    if not path.is_file():
        return []
    pa, parquet = require_pyarrow(*_EXTRA)
    try:
        rows = parquet.read_table(path).to_pylist()
        return [Inversion(**{**row, "members": tuple(row["members"] or ())}) for row in rows]
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        message = f"{path} is not a file of inversions ({reason}): delete it and run unmerge experiment invert again"
        raise UnmergeError(message) from error


def _write(path: Path, rows: Sequence[Row], columns: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    write_table(path, rows, columns, json.dumps(metadata, sort_keys=True), *_EXTRA)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the settings, versions and digests in a file of results."""
    from pyarrow import parquet

    found: dict[str, Any] = json.loads(parquet.read_schema(path).metadata[METADATA])
    return found
