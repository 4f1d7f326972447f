"""The whole flow: references in, one result out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unmerge.accumulate import State
from unmerge.alignment import align
from unmerge.base_share import BaseShare, base_share, nearer_bases, without_base
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.source import resolve
from unmerge.decoys import make_decoys
from unmerge.dictionary import Atom, Base, Dictionary, Start, open_base, read_task_vector
from unmerge.errors import UnmergeError
from unmerge.extraction import extract
from unmerge.fingerprint import check_same_base, remote_digest
from unmerge.journal import StateFolder
from unmerge.regression import Regression, Unopened, regress
from unmerge.result import Attribution, BaseCoefficient, ModelReference
from unmerge.shortlist import Chosen, Shelf
from unmerge.solvers import SOLVERS, Nnls, Solver
from unmerge.summary import model_reference, summarise
from unmerge.task_vector import TaskVector, checkpoint_deltas
from unmerge.torch_blocks import check_device

REMOTE_MATRICES = 4
"""Matrices of a remote model that are looked at to see whether it is of the base: eight requests each."""


if TYPE_CHECKING:
    from unmerge.anytime import Limits  # with what few answers need, at their first use: start-up is for all


def attribute(
    target: str | Path,
    atoms: Sequence[str | Path],
    *,
    base: str | Path,
    solver: str = "nnls",
    signed: bool = False,
    exact: bool = False,
    float64: bool = False,
    device: str | None = None,
    precision: float | None = None,
    budget: str | None = None,
    top_k: int | None = None,
    decoys: int = 0,
    other_bases: Sequence[str | Path] = (),
    extract_to: str | Path | None = None,
    extract_rank: int | None = None,
    allow_pickle: bool = False,
    workers: int | None = None,
    state: str | Path | None = None,
    start: Start | None = None,
) -> Attribution:
    """Say which known fine-tunes are inside a merged model, and with what coefficients.

    Parameters
    ----------
    target : str or Path
        The merged model: a folder, a ``.safetensors`` file, a Hub id (``org/name@revision``), or a PEFT adapter.
    atoms : sequence of str or Path
        Known fine-tunes: PEFT adapters, full checkpoints, built dictionaries, Hub ids. ``NAME=PATH`` names one.
    base : str or Path
        The model that target and atoms were fine-tuned from.
    solver : str
        A name in ``unmerge.SOLVERS``.
    signed : bool
        Allow negative coefficients (task negation).
    exact : bool
        Read every tensor whole, and compare every atom on all parameters; by default large tensors that no atom
        changes are sampled, of large dictionaries only the atoms that show in sketches are opened, full checkpoints in
        dictionaries are compared in their leading directions, and all that is said.
    float64 : bool
        Compute large tensors in float64 too; by default their one large GEMM is in float32.
    device : str, optional
        Compute large tensors by torch on ``cuda``, ``cuda:1``, ``mps`` or ``cpu``; equal to 1e-8 of the norms.
    precision : float, optional
        Read blocks of rows at random, only until every coefficient's 95 % interval is at most this wide to either
        side; presence is then not tested. For the ``nnls`` solver.
    budget : str, optional
        Read no more than this, in bytes or seconds (``"200MB"``, ``"5s"``), in the same way.
    top_k : int, optional
        Compare only the paper's top-k coordinates instead of all parameters; presence is then not tested.
    decoys : int
        Add this many atoms that cannot be present, and report how many of them were accused.
    other_bases : sequence of str or Path
        Other models that the target may have been made from; if one is nearer than `base`, the result says so.
    extract_to : str or Path, optional
        A new folder to write what no present component explains to, as a PEFT adapter.
    extract_rank : int, optional
        Its rank; by default what the evidence says, if that is low.
    allow_pickle : bool
        Allow ``.bin`` weights, read by torch with ``weights_only=True``.
    workers : int, optional
        Threads; all cores by default. The result does not depend on it.
    state : str or Path, optional
        A folder that keeps what was accumulated until the run is done: one that was stopped goes on from it.
    start : callable, optional
        Told the plan before the pass starts; returns what is called as parameters are read.

    Returns
    -------
    Attribution
        The same inputs give the same document, to the byte, whatever the shards and the order of atoms.

    Raises
    ------
    UnmergeError
        If anything given cannot be used; the message says what was given, expected, and to do.
    """
    if extract_to is not None and Path(extract_to).exists():
        raise UnmergeError(f"{extract_to}: already exists; choose another folder for what is extracted")
    question = open_question(
        atoms, base=base, solver=solver, signed=signed, exact=exact, float64=float64, device=device,
        precision=precision, budget=budget, top_k=top_k, decoys=decoys, other_bases=other_bases,
        elements=extract_to is not None, allow_pickle=allow_pickle, workers=workers,
    )  # fmt: skip
    question.refuse(extract=extract_to is not None, state=state is not None)
    goal = question.open_target(str(target))
    folder = StateFolder(Path(state)) if state is not None else None
    result, vector, regression = question.explain(goal, state=folder, start=start)
    if extract_to is not None and regression is not None:
        _extract(result, vector, regression, question.base, Path(extract_to), extract_rank, question.workers)
    if folder is not None:
        folder.clear()
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What targets are to be explained by, and how; opened once for many targets.

    Attributes
    ----------
    base : Base
    shelf : Shelf
        What was named as atoms.
    known : Chosen or None
        The opened atoms; None if they are chosen for each target.
    solver : Solver
    exact, float64, device, top_k, decoys, other_bases, allow_pickle, workers
        As `attribute` takes them.
    bounds : Limits or None
        Of the sample, if one is to be read.
    """

    base: Base
    shelf: Shelf
    known: Chosen | None
    solver: Solver
    exact: bool
    float64: bool
    device: str | None
    bounds: Limits | None
    top_k: int | None
    decoys: int
    other_bases: tuple[str, ...]
    allow_pickle: bool
    workers: int

    def refuse(self, *, extract: bool, state: bool) -> None:
        """Refuse options that do not go together.

        Raises
        ------
        UnmergeError
            If two of them do not.
        """
        if self.bounds is not None:
            given = {"--exact": self.exact, "--top-k": self.top_k is not None, "--extract": extract}
            for name in (name for name, is_given in given.items() if is_given):
                raise UnmergeError(f"{name} reads what --precision and --budget leave out; give one or the other")
            if not isinstance(self.solver, Nnls):
                raise UnmergeError(f"--precision and --budget work with the nnls solver, not with {self.solver.name}")
        if state and (self.bounds is not None or self.top_k is not None):
            raise UnmergeError("--state keeps sums over all parameters; leave out --precision, --budget and --top-k")

    def open_target(self, reference: str) -> Target:
        """Find a target; if a sample of it is enough, a model on the Hub is not downloaded.

        Raises
        ------
        UnmergeError
            If it cannot be found or read, or is not of the base's architecture.
        """
        remote = open_remote_target(reference, self.base) if self.bounds is not None else None
        return remote or open_target(reference, self.base, allow_pickle=self.allow_pickle)

    def explain(
        self, goal: Target, *, state: State | None = None, start: Start | None = None
    ) -> tuple[Attribution, TaskVector, Regression | None]:
        """Explain one target; the task vector is without what it holds of the base, and a sample has no regression.

        Raises
        ------
        UnmergeError
            If it cannot be explained.
        """
        notices = nearer_bases(goal.vector, self.base, self.other_bases, allow_pickle=self.allow_pickle)
        if self.device is not None:
            notices = (
                *notices,
                f"large tensors were computed by torch on {self.device}: equal to 1e-8, not to the bit",
            )
        known = self.known or self.shelf.choose(goal.vector, goal.rows, signed=self.solver.signed)
        extra = known.extra
        if self.decoys:
            extra = (*extra, *make_decoys(known.atoms, self.decoys, np.random.default_rng(0)))
        if self.bounds is not None:
            every = (*known.dictionary.atoms, *extra)
            result = _sampled(goal, every, self.base, self.solver, self.bounds, notices, self.workers, start)
            return result, goal.vector, None
        return explain(
            goal, known.dictionary, extra, self.base, self.solver, unopened=known.unopened, exact=self.exact,
            float64=self.float64, device=self.device, top_k=self.top_k, notices=(*known.notices, *notices),
            workers=self.workers, state=state, start=start,
        )  # fmt: skip


def open_question(
    atoms: Sequence[str | Path],
    *,
    base: str | Path,
    solver: str = "nnls",
    signed: bool = False,
    exact: bool = False,
    float64: bool = False,
    device: str | None = None,
    precision: float | None = None,
    budget: str | None = None,
    top_k: int | None = None,
    decoys: int = 0,
    other_bases: Sequence[str | Path] = (),
    elements: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
) -> Question:
    """Open the base and the atoms that targets are to be explained by; the options are those of `attribute`.

    Parameters
    ----------
    elements : bool
        Open full checkpoints in dictionaries to be read, as `exact`, `top_k`, `precision` and `budget` do.

    Raises
    ------
    UnmergeError
        If one of them cannot be used.
    """
    chosen = _solver(solver, signed=signed)
    bounds: Limits | None = None
    if precision is not None or budget is not None:
        from unmerge.anytime import limits

        bounds = limits(precision, budget)
    if device is not None:
        _refuse_with_device(float64=float64, sampled=bounds is not None, top_k=top_k)
        check_device(device)
    origin = open_base(str(base), allow_pickle=allow_pickle)
    whole = exact or bounds is not None or top_k is not None
    sampled = bounds is not None
    shelf = Shelf.of(
        [str(atom) for atom in atoms], origin, whole=whole, elements=whole or elements, sampled=sampled,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    known = shelf.open_all() if shelf.large is None else None
    others = tuple(str(other) for other in other_bases)
    threads = workers or os.cpu_count() or 1
    return Question(
        origin, shelf, known, chosen, exact, float64, device, bounds, top_k, decoys, others, allow_pickle, threads
    )


def _refuse_with_device(*, float64: bool, sampled: bool, top_k: int | None) -> None:
    given = {"--float64": float64, "--precision and --budget": sampled, "--top-k": top_k is not None}
    for name in (name for name, is_given in given.items() if is_given):
        raise UnmergeError(f"--device computes large tensors whole, in float32; leave it out, or {name}")


def explain(
    goal: Target,
    dictionary: Dictionary,
    extra: Sequence[Atom],
    base: Base,
    solver: Solver,
    *,
    unopened: Sequence[Unopened] = (),
    exact: bool = False,
    float64: bool = False,
    device: str | None = None,
    top_k: int | None = None,
    refined: bool = True,
    notices: Sequence[str] = (),
    workers: int = 1,
    state: State | None = None,
    start: Start | None = None,
) -> tuple[Attribution, TaskVector, Regression]:
    """Attribute a target that was opened, to atoms that were opened; see `attribute`.

    Parameters
    ----------
    unopened : sequence of Unopened
        Atoms that were compared by their sketches alone.
    refined : bool
        Whether weights are estimated with what rounding did to them, and the rest looked at; without it they are the
        test's own, which costs a fraction and says as well who is present.
    notices : sequence of str
        Further things to tell the user.
    state : State, optional
        Where finished units are kept.

    Returns
    -------
    Attribution
    TaskVector
        The target's, without what it holds of the base.
    Regression
        Of it.
    """
    from threadpoolctl import threadpool_limits

    def solve(vector: TaskVector) -> Regression:
        found = regress(
            vector,
            goal.rows,
            dictionary,
            extra,
            base,
            exact=exact,
            top_k=top_k,
            contacts=top_k is None,
            float64=float64,
            device=device,
            workers=workers,
            start=start,
            state=state,
        )
        return replace(found, unopened=tuple(unopened))

    # Threaded sums would depend on the number of cores, and threads that wait for small products cost time.
    with threadpool_limits(limits=1, user_api="blas"):
        vector, regression = goal.vector, solve(goal.vector)
        share = base_share(regression, base, workers=workers) if regression.contacts else None
        if share and share.matters:
            vector, found = without_base(vector, base)
            share, regression = replace(share, coefficient=found), solve(vector)
        result = summarise(
            regression,
            solver,
            vector,
            goal.reference,
            base,
            set(goal.rows),
            base_coefficient=_base_coefficient(share),
            notices=notices,
            refined=refined,
            workers=workers,
        )
    return result, vector, regression


def _sampled(
    goal: Target,
    atoms: Sequence[Atom],
    base: Base,
    solver: Solver,
    bounds: Limits,
    notices: Sequence[str],
    workers: int,
    start: Start | None,
) -> Attribution:
    """Answer from a sample of row blocks."""
    from unmerge.anytime import sample

    found = sample(
        goal.vector,
        goal.rows,
        atoms,
        base,
        bounds,
        np.random.default_rng(0),
        signed=solver.signed,
        workers=workers,
        start=start,
    )
    notices = [f"{found.size:,} bytes of weights were read; tensors that no atom changes were not", *notices]
    if not found.precise:
        notices.append("the budget was used up before the intervals were as narrow as wanted")
    result = summarise(
        found.regression, solver, goal.vector, goal.reference, base, set(goal.rows), notices=notices, workers=workers
    )
    by_name = {atom.name: bounds for atom, bounds in zip(found.regression.atoms, found.intervals, strict=True)}
    components = tuple(
        item.model_copy(update={"interval": _interval(by_name[item.name])}) for item in result.components
    )
    return result.model_copy(update={"components": components})


def _interval(bounds: FloatArray) -> tuple[float, float] | None:
    return (float(bounds[0]), float(bounds[1])) if np.isfinite(bounds).all() else None


def _extract(
    result: Attribution,
    target: TaskVector,
    regression: Regression,
    base: Base,
    output: Path,
    rank: int | None,
    workers: int,
) -> None:
    """Write what the present components leave as an adapter."""
    chosen = rank or result.unexplained.rank
    if not chosen:
        kind = result.unexplained.kind or "not looked at"
        message = f"{output}: what is unexplained is not of low rank ({kind}), so an adapter holds only a part of it"
        raise UnmergeError(f"{message}; give a rank to write that part all the same")
    weights = {item.name: item.weight for item in result.components if item.present and item.weight is not None}
    present = [(atom.vector, weights[atom.name]) for atom in regression.atoms if atom.name in weights]
    extract(target, present, base, output, rank=chosen, tensors=list(target.deltas), workers=workers)


def _base_coefficient(share: BaseShare | None) -> BaseCoefficient | None:
    if share is None:
        return None
    return BaseCoefficient(coefficient=1.0 + share.coefficient, error=share.error, removed=share.matters)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What is to be explained.

    Attributes
    ----------
    vector : TaskVector
        Its change against the base.
    rows : dict
        Rows to compare of each tensor that can be compared.
    reference : ModelReference
        Where it was found.
    """

    vector: TaskVector
    rows: dict[str, int]
    reference: ModelReference


def open_target(reference: str, base: Base, *, allow_pickle: bool = False) -> Target:
    """Find a merged model, or an adapter, and align it with the base.

    Raises
    ------
    UnmergeError
        If it cannot be found or read, or is not of the base's architecture.
    """
    source = resolve(reference, allow_pickle=allow_pickle)
    vector, kind = read_task_vector(source.path, base, "target", allow_pickle=allow_pickle)
    # What an adapter does not change is equal to the base; what a model does not have cannot be compared.
    shapes = base.shapes if kind == "adapter" else {name: delta.shape for name, delta in vector.deltas.items()}
    rows = {name: shape[0] for name, shape in shapes.items()}
    return Target(vector, rows, model_reference(source, vector.digest, kind))


def open_remote_target(reference: str, base: Base) -> Target | None:
    """Find a merged model on the Hub and align it with the base, without downloading its weights.

    Returns
    -------
    Target or None
        None for what is better read as usual; see `unmerge.checkpoint.remote.open_remote`.

    Raises
    ------
    UnmergeError
        If it cannot be read, or is not of the base's architecture.
    """
    from unmerge.checkpoint.remote import open_remote

    found = open_remote(reference)
    if found is None:
        return None
    checkpoint, source = found
    alignment = align(base.checkpoint, checkpoint, "target")
    check_same_base(alignment, "target", most=REMOTE_MATRICES)
    digest = remote_digest(checkpoint, source.commit or "")
    notices = (*checkpoint.notices, *alignment.notices)
    vector = TaskVector("target", digest, checkpoint_deltas(alignment), alignment.skipped, notices)
    rows = {name: delta.shape[0] for name, delta in vector.deltas.items()}
    return Target(vector, rows, model_reference(source, digest, "checkpoint"))


def _solver(name: str, *, signed: bool) -> Solver:
    if name not in SOLVERS:
        raise UnmergeError(f"unknown solver {name!r}; expected one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name](signed=signed)
