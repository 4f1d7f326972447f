"""What is kept of a recovery or a verification: one line of JSON, appended whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind", "Recovered", "Verified")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was recovered of a merge, beside the truth.

    Attributes
    ----------
    name, group, method : str
        As in its `benchmarks.recipes.cases.Case`.
    status : str
        The document's.
    found_method : str
        Empty if there is none.
    alike : tuple of str
        Methods of other recipes that are said not to be told apart.
    members_right : bool
        Whether the members are those of the dictionary that are in the merge, no more and no fewer.
    members : tuple of str
        Those found.
    weight_cells : float or None
        The largest error of a weight, in spacings of bfloat16 at the true one.
    other_error : float or None
        The largest error of another number.
    equal : float or None
        Share of the values that the merge changed which mergekit makes again, to the bit, by the recovered recipe.
    unequal : int or None
        How many it does not.
    proved : float or None
        The share that the recovery says it proved: of values, or of masks.
    wrong : int or None
        Values that the recovery says the recipe does not make.
    at_ties : float or None
        Share of values at a trim threshold, which the order of a sort decides.
    paper_error : float or None
        The paper's error between the changes of the target and of the merge made again.
    decoded_error, decoy_error : float or None
        Of random masks: of the members, and of changes that are not in the merge.
    seed, found_seed : int or None
        mergekit's.
    threads : int or None
        As found.
    seconds : float
        Of the recovery.
    recipe : str
        The file.
    """

    name: str
    group: str
    method: str
    status: str
    found_method: str
    alike: tuple[str, ...]
    members_right: bool
    members: tuple[str, ...]
    weight_cells: float | None
    other_error: float | None
    equal: float | None
    unequal: int | None
    proved: float | None
    wrong: int | None
    at_ties: float | None
    paper_error: float | None
    decoded_error: float | None
    decoy_error: float | None
    seed: int | None
    found_seed: int | None
    threads: int | None
    seconds: float
    recipe: str

    @property
    def method_right(self) -> bool:
        """Whether the method is the one that was used."""
        return self.found_method == self.method


@dataclass(frozen=True, slots=True)
class Verified:
    """What was said of a true or lying recipe.

    Attributes
    ----------
    name : str
    kind : str
        ``true``, or what the lie is about: ``weight``, ``member``, ``density``.
    method : str
    seeded : bool
        Whether the seed of random masks was given.
    lie : str
        What the recipe says, and what is true.
    verdict, reason : str
        The answer.
    claims : tuple of str
        What kinds of claims are said to be wrong.
    right : bool
        Whether it is the right verdict, for the right reason.
    seconds : float
    """

    name: str
    kind: str
    method: str
    seeded: bool
    lie: str
    verdict: str
    reason: str
    claims: tuple[str, ...]
    right: bool
    seconds: float


class Store(Generic[Kind]):
    """A file of rows, one JSON document to a line.

    Parameters
    ----------
    path : path
        The file; it need not exist.
    kind : type
        Of the rows.
    """

    def __init__(self, path: Path, kind: type[Kind]) -> None:
        self.path = path
        self.kind = kind

    def read(self) -> dict[str, Kind]:
        """Return the rows by name; a line that was cut short by a kill is not one."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [self.kind(**_with_tuples(json.loads(line))) for line in lines]
        return {row.name: row for row in rows}

    def append(self, row: Kind) -> None:
        """Add a row behind the last whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        line = json.dumps(asdict(row), separators=(",", ":")).encode() + b"\n"
        with self.path.open("r+b" if content else "wb") as file:
            file.seek(content.rfind(b"\n") + 1)
            file.truncate()
            file.write(line)


def _with_tuples(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
