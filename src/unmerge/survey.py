"""Many targets against the same atoms: a document for each, as it is finished, and one table of all.

A folder holds the answers to one question: the same base, atoms, options and version::

    survey.json         what was asked
    NAME.json           of each target, what `unmerge attribute --json` prints
    results.parquet     a row for each target and component, once all targets were looked at

Every file is written under another name and renamed. A run that was stopped goes on where it was: a document of a
target that has not changed is not made again, so the files end in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmerge._version import __version__
from unmerge.attribution import Question, Target, open_question
from unmerge.dictionary import Start
from unmerge.errors import ClusterError, UnmergeError
from unmerge.journal import StateFolder
from unmerge.parquet import require_pyarrow, whole, write_table
from unmerge.result import Attribution, Component

SCHEMA = "unmerge/survey/1"
"""Of `survey.json`, and of the table, in whose metadata it stands too, under ``unmerge``."""
QUESTION = "survey.json"
TABLE = "results.parquet"
COLUMNS = {
    "target": "text",
    "digest": "text",
    "commit": "text",
    "document": "text",
    "error": "text",
    "verdict": "text",
    "unexplained": "number",
    "rounding_floor": "number",
    "unexplained_kind": "text",
    "component": "text",
    "component_digest": "text",
    "present": "truth",
    "coefficient": "number",
    "weight": "number",
    "low": "number",
    "high": "number",
    "p_value": "number",
    "detectable": "number",
    "one_of_group": "truth",
    "reason": "text",
}
"""Columns of the table and their types; all may be null. What they mean: the document's schema."""
_UNSAFE = re.compile(r"[^\w.-]+")
_LONGEST = 80
_EXTRA = "many targets", "parquet"

Tell = Callable[[int, int, str], None]
"""Told which target is next, of how many, and its reference."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one target.

    Attributes
    ----------
    target : str
        As it was given.
    document : Path or None
        Its document; None if it could not be explained.
    verdict : str or None
        The document's answer in words.
    error : str or None
        Why it could not be explained.
    """

    target: str
    document: Path | None = None
    verdict: str | None = None
    error: str | None = None


def attribute_many(
    targets: Sequence[str | Path],
    atoms: Sequence[str | Path],
    *,
    base: str | Path,
    output: str | Path,
    state: str | Path | None = None,
    tell: Tell | None = None,
    start: Start | None = None,
    **options: Any,
) -> tuple[Answer, ...]:
    """Explain many targets by the same atoms; see `unmerge.attribute`.

    The base and the atoms are opened once. A target that cannot be used is recorded with its error, and the others go
    on; it is tried again by the next run.

    Parameters
    ----------
    targets : sequence of str or Path
        The merged models; one that is given twice is answered once.
    atoms : sequence of str or Path
        Known fine-tunes.
    base : str or Path
        The model that all were fine-tuned from.
    output : str or Path
        A folder: for `results.parquet`, with a row for each target and component, and a JSON document for each target.
        Documents in it that answer the same question of the same target are kept.
    state : str or Path, optional
        A folder that keeps what was accumulated of a target until it is answered.
    tell : callable, optional
        Told of each target before it is looked at.
    start : callable, optional
        As `attribute` takes it, for each target.
    **options
        What else `attribute` takes, but for `extract_to` and `extract_rank`.

    Returns
    -------
    tuple of Answer
        In the order of the targets.

    Raises
    ------
    UnmergeError
        If the base, an atom or an option cannot be used, the folder holds answers to another question, or a cluster was
        lost.
    MissingExtraError
        If pyarrow is not installed (extra `parquet`).
    """
    require_pyarrow(*_EXTRA)
    folder = Path(output)
    references = list(dict.fromkeys(str(target) for target in targets))
    if not references:
        raise UnmergeError("no targets were given; name at least one model")
    question = open_question(atoms, base=base, **options)
    question.refuse(extract=False, state=state is not None)
    _ask(folder, question)
    answers, rows = [], []
    for number, reference in enumerate(references):
        place = folder / document_name(reference)
        kept = StateFolder(Path(state) / place.stem) if state is not None else None
        if tell is not None:
            tell(number + 1, len(references), reference)
        try:
            result = _answer(question, reference, place, kept, start)
        except ClusterError:
            raise
        except UnmergeError as error:
            answers.append(Answer(reference, error=str(error)))
            rows.append({"target": reference, "error": str(error)})
        else:
            answers.append(Answer(reference, place, result.verdict))
            rows.extend(_rows(reference, place.name, result))
    write_table(folder / TABLE, rows, COLUMNS, json.dumps(describe(question)), *_EXTRA)
    return tuple(answers)


def read_targets(file: Path) -> list[str]:
    """Read a list of targets: one a line; empty lines, and lines that begin with #, do not count.

    Raises
    ------
    UnmergeError
        If it cannot be read, or is empty.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UnmergeError(f"{file}: cannot be read as a list of targets ({error})") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UnmergeError(f"{file}: names no targets; expected one a line")
    return found


def document_name(reference: str) -> str:
    """Return the name of a target's document: the reference in letters that every file system takes, and its digest."""
    readable = _UNSAFE.sub("_", reference).strip("_.")[-_LONGEST:]
    return f"{readable}-{hashlib.sha256(reference.encode()).hexdigest()[:8]}.json"


def _answer(
    question: Question, reference: str, place: Path, state: StateFolder | None, start: Start | None
) -> Attribution:
    """Return the answer for one target: its document's, if that is of the same weights, or a new one."""
    goal = question.open_target(reference)
    result = _read(place, goal)
    if result is None:
        result = question.explain(goal, state=state, start=start)[0]
        with whole(place) as temporary:
            temporary.write_text(result.to_json() + "\n", encoding="utf-8")
    if state is not None:
        state.clear()
    return result


def _read(place: Path, goal: Target) -> Attribution | None:
    if not place.is_file():
        return None
    try:
        found = Attribution.model_validate_json(place.read_bytes())
    except ValueError:  # not what was written here: made anew
        return None
    return found if found.target == goal.reference else None


def _ask(folder: Path, question: Question) -> None:
    """Write down what is asked, or check that it is what was asked before.

    Raises
    ------
    UnmergeError
        If the folder holds answers to another question, or other files.
    """
    asked = json.dumps(describe(question), indent=1) + "\n"
    place = folder / QUESTION
    if place.is_file():
        if place.read_text(encoding="utf-8") != asked:
            message = (
                f"{folder}: holds answers to another question (another base, other atoms or options, or another "
                f"version: see {QUESTION}); give another folder"
            )
            raise UnmergeError(message)
        return
    if folder.exists() and (not folder.is_dir() or any(not _is_temporary(path) for path in folder.iterdir())):
        raise UnmergeError(f"{folder}: already exists, and has no {QUESTION}; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with whole(place) as temporary:
        temporary.write_text(asked, encoding="utf-8")


def describe(question: Question) -> dict[str, Any]:
    """Return all that a target's document depends on, but for the target."""
    shelf = question.shelf
    known = [(record.name, record.source.reference, record.digest) for record in shelf.records]
    beside = [(atom.name, atom.source.reference, atom.vector.digest) for atom in shelf.extra]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "base": {"reference": question.base.source.reference, "digest": question.base.digest},
        "atoms": [
            {"name": name, "reference": reference, "digest": digest}
            for name, reference, digest in sorted([*known, *beside])
        ],
        "in_dictionary": sorted(record.name for record in shelf.records),
        "solver": repr(question.solver),
        "exact": question.exact,
        "float64": question.float64,
        "device": question.device,
        "decoys": question.decoys,
        "sample": question.bounds and repr(question.bounds),
        "top_k": question.top_k,
        "other_bases": list(question.other_bases),
    }


def _rows(reference: str, document: str, result: Attribution) -> list[dict[str, Any]]:
    common = {
        "target": reference,
        "digest": result.target.digest,
        "commit": result.target.commit,
        "document": document,
        "verdict": result.verdict,
        "unexplained": result.unexplained.share,
        "rounding_floor": result.unexplained.rounding_floor,
        "unexplained_kind": result.unexplained.kind,
    }
    return [common | _component_row(component) for component in result.components]


def _component_row(component: Component) -> dict[str, Any]:
    low, high = component.interval or (None, None)
    return {
        "component": component.name,
        "component_digest": component.source.digest,
        "present": component.present,
        "coefficient": component.coefficient,
        "weight": component.weight,
        "low": low,
        "high": high,
        "p_value": component.evidence.p_value,
        "detectable": component.evidence.detectable,
        "one_of_group": component.evidence.one_of_group,
        "reason": component.evidence.reason,
    }


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".partial"
