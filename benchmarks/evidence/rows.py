"""What is kept of a target: one line of JSON, appended whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.evidence.mixes import Kind, Mix
from unmerge import Attribution


@dataclass(frozen=True, slots=True)
class Answer:
    """What is true of an atom, and what was said of it.

    Attributes
    ----------
    name : str
        The atom.
    truth : float
        Its effective weight; 0 if it is absent.
    kind : str
        ``present``, or how the absent atom is related to the ingredients.
    has_twin : bool
        Whether another checkpoint of its run is in the dictionary or in the merge.
    coefficient : float
        The solver's.
    weight, low, high : float or None
        Estimate of the true weight and its 95 % interval.
    present : bool or None
        The claim; None: cannot tell.
    p_value, detectable : float or None
        Of the test.
    reason : str
        Of the claim.
    group : tuple of str
        Atoms that are versions of it.
    one_of_group : bool
        Whether it or one of them is called present.
    other_tool : float or None
        modelDNA's weight.
    """

    name: str
    truth: float
    kind: Kind
    has_twin: bool
    coefficient: float
    weight: float | None
    low: float | None
    high: float | None
    present: bool | None
    p_value: float | None
    detectable: float | None
    reason: str
    group: tuple[str, ...] = ()
    one_of_group: bool = False
    other_tool: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A target that was taken apart.

    Attributes
    ----------
    target : str
        Its name, unique within its part.
    group, method : str
        As in its `Mix`.
    ingredients : mapping of str to float
        Effective weights, strangers included.
    answers : tuple of Answer
        One for each atom.
    numbers : mapping of str to float
        Of the whole target.
    words : mapping of str to str
        Of the whole target.
    """

    target: str
    group: str
    method: str
    ingredients: Mapping[str, float]
    answers: tuple[Answer, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Atoms in the dictionary."""
        return len(self.answers)

    @property
    def absent(self) -> list[Answer]:
        """The atoms that are not in the merge, without twins of what is."""
        return [answer for answer in self.answers if answer.kind in ("sibling", "other")]


def describe(
    mix: Mix,
    result: Attribution,
    *,
    other_tool: Mapping[str, float] | None = None,
    numbers: Mapping[str, float] | None = None,
    words: Mapping[str, str] | None = None,
) -> Row:
    """Return what is kept of a result, beside the truth.

    Parameters
    ----------
    mix : Mix
        The truth.
    result : Attribution
        What was found.
    other_tool : mapping of str to float, optional
        modelDNA's weights.
    numbers, words : mapping, optional
        What else is kept.
    """
    found = {component.name: component for component in result.components}
    answers = []
    for name in mix.dictionary:
        one = found[name]
        low, high = one.interval or (None, None)
        answers.append(
            Answer(
                name=name,
                truth=mix.effective.get(name, 0.0),
                kind=mix.kind(name),
                has_twin=mix.has_twin(name),
                coefficient=one.coefficient,
                weight=one.weight,
                low=low,
                high=high,
                present=one.present,
                p_value=one.evidence.p_value,
                detectable=one.evidence.detectable,
                reason=one.evidence.reason,
                group=tuple(one.evidence.group),
                one_of_group=one.evidence.one_of_group,
                other_tool=(other_tool or {}).get(name),
            )
        )
    return Row(
        mix.name,
        mix.group,
        mix.method,
        mix.effective,
        tuple(answers),
        _numbers(result) | dict(numbers or {}),
        {"unexplained": result.unexplained.kind or "", "verdict": result.verdict, **(words or {})},
    )


def _numbers(result: Attribution) -> dict[str, float]:
    base = result.base_coefficient
    return {
        "unexplained": result.unexplained.share,
        "rounding_floor": result.unexplained.rounding_floor,
        **({} if base is None else {"base_coefficient": base.coefficient}),
    }


class Store:
    """A file of rows, one JSON document to a line.

    Parameters
    ----------
    path : path
        The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Row]:
        """Return the rows by target; a line that was cut short by a kill is not one."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [_row(json.loads(line)) for line in lines]
        return {row.target: row for row in rows}

    def append(self, row: Row) -> None:
        """Add a row behind the last whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(row), separators=(",", ":")).encode() + b"\n"
        self._drop_partial_line()
        with self.path.open("ab") as file:
            file.write(line)

    def _drop_partial_line(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)


def _row(document: dict[str, object]) -> Row:
    answers = document.pop("answers")
    assert isinstance(answers, list)
    read = tuple(Answer(**{**answer, "group": tuple(answer["group"])}) for answer in answers)
    return Row(answers=read, **document)  # type: ignore[arg-type]  # what `append` wrote


def chosen(stored: Mapping[str, Row], plan: Sequence[Mix]) -> list[Row]:
    """Return the rows of planned targets, in the order of the plan."""
    return [stored[mix.name] for mix in plan if mix.name in stored]
