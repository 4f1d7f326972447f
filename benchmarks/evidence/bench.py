"""Merging a mix and taking it apart: the base and the atoms are opened once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.evidence.material import Material
from benchmarks.evidence.mixes import Mix
from unmerge import Attribution
from unmerge.attribution import Target, open_target
from unmerge.base_share import BaseShare, base_share, without_base
from unmerge.dictionary import Base, Dictionary, combine, open_atom, open_base
from unmerge.experiment.mergekit import merge_in_process, write_recipe
from unmerge.regression import Regression, regress
from unmerge.result import BaseCoefficient
from unmerge.solvers import SOLVERS
from unmerge.summary import summarise


@dataclass(slots=True)
class Bench:
    """What all targets share.

    Attributes
    ----------
    material : Material
        Where the models are.
    base : Base
        Opened.
    """

    material: Material
    base: Base = field(init=False)
    _atoms: dict[float | None, Dictionary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = open_base(str(self.material.base))

    def dictionary(self, names: Sequence[str], change: float | None = None) -> Dictionary:
        """Return a dictionary of adapters; the inner product of two adapters is computed once, and kept."""
        every = self._atoms.get(change, Dictionary((), {}))
        missing = [name for name in names if name not in every.names]
        if missing:
            opened = [
                open_atom(str(self.material.adapter(name, change)), self.base, name=name) for name in sorted(missing)
            ]
            every = self._atoms[change] = combine(self.base, opened, known=every)
        places = np.array([every.names.index(name) for name in names])
        gram = {name: matrix[np.ix_(places, places)] for name, matrix in every.gram.items()}
        return Dictionary(
            tuple(every.atoms[place] for place in places),
            {name: matrix for name, matrix in gram.items() if matrix.any()},
        )

    def open(self, folder: Path) -> Target:
        """Open a merged model."""
        return open_target(str(folder), self.base)

    def regress(self, target: Target, dictionary: Dictionary, *, contacts: bool) -> Regression:
        """Compute the statistics of a target, with or without what the evidence needs."""
        return regress(target.vector, target.rows, dictionary, (), self.base, contacts=contacts)

    def summarise(self, target: Target, regression: Regression, share: BaseShare | None = None) -> Attribution:
        """Solve, judge and describe."""
        described = None
        if share is not None:
            described = BaseCoefficient(coefficient=1.0 + share.coefficient, error=share.error, removed=share.matters)
        solver = SOLVERS["nnls"](signed=False)
        return summarise(
            regression,
            solver,
            target.vector,
            target.reference,
            self.base,
            set(target.rows),
            base_coefficient=described,
        )

    def examine(self, folder: Path, mix: Mix) -> Attribution:
        """Take a merged model apart as `unmerge.attribute` does, but with what is already open."""
        target, dictionary = self.open(folder), self.dictionary(mix.dictionary, mix.change)
        regression = self.regress(target, dictionary, contacts=True)
        share = base_share(regression, self.base)
        if share.matters:
            vector, found = without_base(target.vector, self.base)
            target, share = replace(target, vector=vector), replace(share, coefficient=found)
            regression = self.regress(target, dictionary, contacts=True)
        return self.summarise(target, regression, share)

    @contextmanager
    def merged(self, mix: Mix) -> Iterator[Path]:
        """Yield the folder of a mix merged by mergekit, and delete it."""
        weights = {self.material.checkpoint(name, mix.change): weight for name, weight in mix.weights.items()}
        with tempfile.TemporaryDirectory(prefix="evidence-") as name:
            recipe = write_recipe(
                Path(name) / "recipe.yml",
                method=mix.method,
                weights=weights,
                base=self.material.base,
                **mix.options,
            )
            yield merge_in_process(recipe, Path(name) / "merged", seed=mix.seed)
