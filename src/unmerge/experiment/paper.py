"""The paper's experiment as data: its tasks, compositions, settings and printed numbers (``paper.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import Any, Literal

Group = Literal["known", "mixed", "unknown"]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set and where in its rows the prompt and the answer are.

    Attributes
    ----------
    dataset : str
        Hub id, or a local folder or file.
    config : str or None
        The data set's configuration.
    prompt_fields : tuple of str
        Fields whose texts are joined to the prompt: ``question``, ``passages.passage_text``.
    answer_field : str
        Field of the answer: ``output``, ``answers.text[0]``.
    """

    dataset: str
    config: str | None
    prompt_fields: tuple[str, ...]
    answer_field: str


@dataclass(frozen=True, slots=True)
class Composition:
    """Tasks that are merged with equal weights.

    Attributes
    ----------
    group : str
        ``known``: all of them are in the dictionary; ``unknown``: none is; ``mixed``: some are.
    tasks : tuple of str
        Names of the tasks, in the order in which they are merged.
    """

    group: Group
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One algorithm with one choice of its hyper-parameters.

    Attributes
    ----------
    algorithm : str
        ``nnls``, ``omp``, ``ridge``, ``elastic_net``, ``dot_product`` or ``lasso``.
    values : tuple of (str, float)
        The hyper-parameters under the paper's names, sorted.
    """

    algorithm: str
    values: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        """The hyper-parameters as compact JSON."""
        return json.dumps(dict(self.values), separators=(",", ":"), sort_keys=True)


@cache
def facts() -> dict[str, Any]:
    """Return everything in ``paper.json``; do not change it."""
    text = resources.files("unmerge.experiment").joinpath("paper.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def tasks() -> tuple[str, ...]:
    """Return the names of the 15 tasks, those of the dictionary first."""
    return tuple(task["name"] for task in facts()["tasks"])


def dictionary() -> tuple[str, ...]:
    """Return the names of the 8 tasks in the dictionary."""
    return tuple(task["name"] for task in facts()["tasks"] if task["in_dictionary"])


def sources() -> dict[str, Source]:
    """Return the data set of every task."""
    return {
        task["name"]: Source(task["dataset"], task["config"], tuple(task["prompt_fields"]), task["answer_field"])
        for task in facts()["tasks"]
    }


def compositions() -> tuple[Composition, ...]:
    """Return the 18 compositions as they were run."""
    return tuple(Composition(one["group"], tuple(one["tasks"])) for one in facts()["merging"]["compositions"])


def settings() -> tuple[Setting, ...]:
    """Return the 42 settings of the six algorithms.

    OMP has 24 of them. The paper's call takes its number of atoms and ignores its tolerance, so they give 8
    different answers; they are kept as rows because the paper counts them as runs.
    """
    found: list[Setting] = []
    for algorithm, grid in facts()["grid"].items():
        if algorithm == "count":
            continue
        axes: dict[str, list[float]] = {} if isinstance(grid, list) else grid
        names = sorted(axes)
        found += [
            Setting(algorithm, tuple(zip(names, values, strict=True)))
            for values in product(*(axes[name] for name in names))
        ]
    return tuple(found)
