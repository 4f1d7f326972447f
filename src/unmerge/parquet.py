"""Tables in Parquet with a JSON document in their metadata; files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmerge.errors import MissingExtraError

METADATA = b"unmerge"
"""Key of the JSON document in a file's metadata."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield another name to write a file under, and rename it once it is on the disk: half of one is never seen."""
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def require_pyarrow(what: str, extra: str) -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet.

    Raises
    ------
    MissingExtraError
        If it is not installed: `what` needs it, and the extra `extra` has it.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(f"{what} need the package pyarrow: pip install 'unmerge[{extra}]'") from error
    return pa, parquet


def write_table(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], document: str, what: str, extra: str
) -> None:
    """Write rows whole.

    Parameters
    ----------
    columns : mapping of str to str
        Their types: ``text``, ``texts``, ``number``, ``numbers``, ``integer`` or ``truth``.
    document : str
        JSON, for the metadata.
    what, extra : str
        As in `require_pyarrow`.

    Raises
    ------
    MissingExtraError
        If pyarrow is not installed.
    """
    pa, parquet = require_pyarrow(what, extra)
    types = {
        "text": pa.string(), "texts": pa.list_(pa.string()), "number": pa.float64(), "numbers": pa.list_(pa.float64()),
        "integer": pa.int32(), "truth": pa.bool_(),
    }  # fmt: skip
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    schema = schema.with_metadata({METADATA: document.encode()})
    with whole(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary, compression="zstd")
