"""Verify true recipes and lying ones, and report who was believed."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.material import Material
from benchmarks.evidence.report import Check, Report, Table
from benchmarks.recipes.cases import DICTIONARY
from benchmarks.recipes.lies import COUNT, LIES, Claim
from benchmarks.recipes.making import dumped, placed, run_mergekit
from benchmarks.recipes.rows import Verified
from unmerge.recipe.verification import Verification
from unmerge.recipe.verify import verify

ABOUT = """\
Merges of two to four fine-tunes are drawn, made by mergekit, and verified by their own recipe, and by the same recipe
with one lie: a weight (or a slerp's t) that is off by 0.02, a member that is exchanged for the fine-tune of another
world on the same task, or one model's density of 0.5 where it was 0.6. The candidates for a member are the dictionary
of 8. `seed told`: random masks are compared bit by bit; else it is asked whether any masks of the claimed densities
make the weights. A reason is right if it names the claim that is a lie, the model that it is of, and what is true."""
NEAR = 0.005
"""A number that is named as the true one may be off by so much."""
_NUMBERS = re.compile(r"(\w+)(?: of (\S+?))?: the recipe says \S+, the weights say ([\d.e-]+)")
_MEMBERS = re.compile(r"member (\S+): the weights hold (\S+) in its place")


def measure(material: Material, claim: Claim) -> Verified:
    """Merge, and verify what is claimed."""
    with tempfile.TemporaryDirectory(prefix="recipes-") as name:
        folder = Path(name)
        target = run_mergekit(placed(claim.made, material), folder / "target", seed=claim.seed, threads=1)
        recipe = folder / "claimed.yml"
        recipe.write_text(dumped(placed(claim.claimed, material)), encoding="utf-8")
        candidates = [f"{atom}={material.checkpoint(atom)}" for atom in DICTIONARY]
        start = time.perf_counter()
        found = verify(str(target), recipe, seed=claim.seed if claim.seeded else None, candidates=candidates)
        return _row(claim, found, time.perf_counter() - start)


def _row(claim: Claim, found: Verification, seconds: float) -> Verified:
    return Verified(
        name=claim.name,
        kind=claim.kind,
        method=claim.method,
        seeded=claim.seeded,
        lie="" if claim.kind == "true" else f"{claim.kind} {claim.says} for {claim.truth}",
        verdict=found.verdict,
        reason=found.reason,
        claims=tuple(one.claim for one in found.wrong_claims),
        right=_is_right(claim, found),
        seconds=seconds,
    )


def _is_right(claim: Claim, found: Verification) -> bool:
    if claim.kind == "true":
        return found.verdict == "pass"
    return found.verdict == "fail" and names_lie(claim, found.reason)


def names_lie(claim: Claim, reason: str) -> bool:
    """Tell whether a reason names the claim that is a lie, and what is true."""
    subject = claim.subject.rpartition("-")[0]
    if claim.kind == "member":
        return (subject, claim.truth) in _MEMBERS.findall(reason)
    parameter = "t" if claim.method == "slerp" else claim.kind
    return any(
        what == parameter and model == subject and abs(float(value) - float(claim.truth)) <= NEAR
        for what, model, value in _NUMBERS.findall(reason)
    )


def report(rows: Sequence[Verified]) -> Report:
    """Report verdicts by kind of recipe."""
    true = [row for row in rows if row.kind == "true"]
    lying = [row for row in rows if row.kind != "true"]
    checks = [
        Check("true recipes that pass", float(sum(row.right for row in true)), low=float(COUNT)),
        Check("lies that fail for the right reason", float(sum(row.right for row in lying)), low=float(COUNT)),
    ]
    return Report("True recipes and lies", ABOUT, [_verdicts(rows), _methods(rows), _faults(rows)], checks)


def _verdicts(rows: Sequence[Verified]) -> Table:
    cells = []
    for kind in ("true", *LIES):
        own = [row for row in rows if row.kind == kind]
        counts = [sum(row.verdict == verdict for row in own) for verdict in ("pass", "fail", "cannot tell")]
        right = sum(row.right for row in own)
        seconds = f"{sum(row.seconds for row in own) / len(own):.0f}" if own else ""
        cells.append((kind, str(len(own)), *(str(count) for count in counts), str(right), seconds))
    header = ("recipe", "verified", "pass", "fail", "cannot tell", "right, for the right reason", "seconds, mean")
    return Table("Verdicts.", header, cells)


def _methods(rows: Sequence[Verified]) -> Table:
    cells = []
    for method, seeded in sorted({(row.method, row.seeded) for row in rows}):
        own = [row for row in rows if (row.method, row.seeded) == (method, seeded)]
        counts = []
        for kind in ("true", *LIES):
            of_kind = [row for row in own if row.kind == kind]
            counts.append(f"{sum(row.right for row in of_kind)}/{len(of_kind)}" if of_kind else "")
        cells.append((f"{method}{', seed told' if seeded else ''}", *counts))
    return Table("Right answers by method.", ("method", "true", *LIES), cells)


def _faults(rows: Sequence[Verified]) -> Table:
    cells = [(row.name, row.lie, row.verdict, row.reason) for row in rows if not row.right]
    return Table("Answers that are not right.", ("recipe", "lie", "verdict", "reason"), cells or [("none", "", "", "")])
