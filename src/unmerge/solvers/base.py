"""What a solver is, what it answers, and how it says that something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol, runtime_checkable

from unmerge.statistics import FloatArray, Statistics


class Status(Enum):
    """How a solve ended. The value is the advice for the user, empty if all is well."""

    CONVERGED = ""
    ZERO_ATOM = "An atom equals the base model: its coefficient is set to zero. Leave it out."
    COLLINEAR = (
        "Some atoms are combinations of others, so only a sum of their coefficients is determined: it is "
        "shared in a fixed way. Keep fewer atoms of each group."
    )
    NOT_CONVERGED = "The solver ran out of iterations: take the coefficients as approximate. Try another solver."
    ZERO_TARGET = "The target equals the base model: there is nothing to explain. Check which model was given."
    NOT_FINITE = "The statistics hold NaN or infinity: the coefficients are zeros, not results. Check the checkpoints."


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """The answer of a solver.

    Attributes
    ----------
    coefficients : array, shape (K,)
        One number per atom, dimensionless: the target is about the sum of coefficient times atom. Always
        finite; check `status` before using them.
    status : Status
        The most serious thing that happened.
    groups : tuple of tuples of int
        Atoms (numbered from 0) that cannot be told apart: one tuple per collinear group, and one tuple of
        length 1 per atom that is zero.
    iterations : int
        Steps of the algorithm; 0 for a closed form, or if the library that did the work does not count them.
    """

    coefficients: FloatArray
    status: Status = Status.CONVERGED
    groups: tuple[tuple[int, ...], ...] = ()
    iterations: int = 0

    @property
    def message(self) -> str:
        """One line of advice, empty if the solver converged."""
        named = "; ".join(", ".join(str(atom) for atom in group) for group in self.groups)
        return f"{self.status.value} Atoms: {named}." if named else self.status.value


@runtime_checkable
class Solver(Protocol):
    """Statistics in, coefficients out: a frozen dataclass of hyper-parameters with one method.

    A solver sees nothing but the statistics. Invalid hyper-parameters raise ValueError when it is made;
    degenerate statistics never raise, they end in a `Status`.
    """

    name: ClassVar[str]

    @property
    def signed(self) -> bool:
        """Whether coefficients may be negative."""
        ...

    def solve(self, statistics: Statistics) -> Solution:
        """Return the coefficients that explain the target of `statistics`."""
        ...


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value`, the hyper-parameter called `name`, is finite and at least zero."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a finite number that is not negative")
