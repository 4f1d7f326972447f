"""The file of results: its columns, and what made them, in Parquet."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmerge.errors import MissingExtraError
from unmerge.experiment.decomposition import Row
from unmerge.experiment.layout import whole

METADATA = b"unmerge"
"""Key of the JSON document in the file's metadata."""
PACKAGES = ("unmerge", "numpy", "scipy", "torch", "transformers", "peft", "mergekit", "safetensors")


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
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("results need the package pyarrow: pip install 'unmerge[experiment]'") from error
    document = json.dumps(metadata, sort_keys=True).encode()
    table = pa.Table.from_pylist(list(rows), schema=_schema(pa).with_metadata({METADATA: document}))
    with whole(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the settings, versions and digests in a file of results."""
    from pyarrow import parquet

    found: dict[str, Any] = json.loads(parquet.read_schema(path).metadata[METADATA])
    return found


def _schema(pa: Any) -> Any:
    text, number, integer = pa.string(), pa.float64(), pa.int32()
    columns = {
        "seed": integer,
        "target": text,
        "composition": integer,
        "group": text,
        "method": text,
        "coordinates": text,
        "algorithm": text,
        "setting": text,
        "names": pa.list_(text),
        "coefficients": pa.list_(number),
        "truth": pa.list_(number),
        "error": number,
        "heldout_error": number,
        "precision": number,
        "recall": number,
        "perfect_match": pa.bool_(),
        "sparsity": integer,
        "coefficient_mae": number,
        "unexplained": number,
        "rounding_floor": number,
        "status": text,
        "failure": text,
    }
    return pa.schema(list(columns.items()))
