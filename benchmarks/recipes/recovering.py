"""Recover a merge, and make it again by what was recovered."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.evidence.material import Material
from benchmarks.recipes.cases import DICTIONARY, SIBLINGS, UNKNOWN, Case, Document, plain_name
from benchmarks.recipes.making import dumped, loaded, path_of, placed, run_mergekit
from benchmarks.recipes.rows import Recovered
from benchmarks.recipes.scoring import Errors, Likeness, changed_tensors, errors, likeness, naming
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.errors import UnmergeError
from unmerge.recipe.document import Recipe, parse_recipe
from unmerge.recipe.mask_seed import HUMAN
from unmerge.recipe.proof import Recovery
from unmerge.recipe.recovery import Search, recover

RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
"""Methods that draw masks."""


def measure(material: Material, case: Case) -> Recovered:
    """Merge, recover, merge again."""
    with tempfile.TemporaryDirectory(prefix="recipes-") as name:
        folder = Path(name)
        document = placed(case.document, material)
        target = run_mergekit(document, folder / "target", seed=case.seed, threads=case.threads)
        start = time.perf_counter()
        atoms = [f"{atom}={_atom(material, case, atom)}" for atom in case.dictionary]
        search = Search(0 if case.group == "no seed" else HUMAN)
        try:
            found = recover(str(target), atoms, base=path_of(material, "base"), search=search)
        except UnmergeError as error:
            return _row(case, None, time.perf_counter() - start, status=f"error: {error}")
        seconds = time.perf_counter() - start
        if found.recipe is None:
            return _row(case, found, seconds)
        return _row(case, found, seconds, _errors(material, document, found), _again(material, found, folder))


def _atom(material: Material, case: Case, name: str) -> str:
    return str((material.adapter(name) if case.adapters else material.checkpoint(name)).resolve())


def _again(material: Material, found: Recovery, folder: Path) -> Likeness | None:
    """Run mergekit on the recovered file; None where it cannot give the same masks."""
    if found.decoded is not None and found.seed is None:
        return None
    document = loaded(found.to_file())
    run_mergekit(document, folder / "again", seed=found.seed or 0, threads=found.threads or 1)
    target, again, base = (open_checkpoint(path) for path in (folder / "target", folder / "again", material.base))
    return likeness(target, again, base)


def _errors(material: Material, document: Document, found: Recovery) -> Errors:
    recipes = [_parsed(document), parse_recipe(found.recipe or "")]
    if any(recipe.slices for recipe in recipes):
        return Errors(None, None)
    base = open_checkpoint(material.base)
    paths = _names(material)
    members = {paths[str(reference)] for reference in recipes[0].references} - {"base"}
    changed = changed_tensors(base, [open_checkpoint(material.checkpoint(name)) for name in sorted(members)])
    return errors(*recipes, base.tensors.keys(), changed, naming(paths))


def _parsed(document: Document) -> Recipe:
    return parse_recipe(dumped(document))


def _names(material: Material) -> dict[str, str]:
    """Return the names of all models by what recipes call them."""
    fine_tunes = (*DICTIONARY, *SIBLINGS, UNKNOWN)
    names = ["base", *fine_tunes, *(f"base+{name}" for name in fine_tunes)]
    return {path_of(material, name): plain_name(name) for name in names}


def _row(
    case: Case,
    found: Recovery | None,
    seconds: float,
    numbers: Errors | None = None,
    again: Likeness | None = None,
    status: str = "",
) -> Recovered:
    members = () if found is None else tuple(sorted({one.name for one in found.members} - {"base"}))
    proof = None if found is None else found.proof
    decoded = None if found is None else found.decoded
    return Recovered(
        name=case.name,
        group=case.group,
        method=case.method,
        status=status or (found.status if found else ""),
        found_method=(found.method if found else None) or "",
        alike=() if found is None else tuple(loaded(one.recipe)["merge_method"] for one in found.alike),
        members_right=set(members) == case.known,
        members=members,
        weight_cells=numbers and numbers.weight_cells,
        other_error=numbers and numbers.other,
        equal=again and again.equal,
        unequal=again and again.unequal,
        proved=proof and proof.share,
        wrong=proof and proof.wrong,
        at_ties=proof and proof.free / max(1, proof.looked_at),
        paper_error=again and again.paper_error,
        decoded_error=decoded and decoded.error,
        decoy_error=decoded and decoded.decoy_error,
        seed=case.seed if case.method in RANDOM else None,
        found_seed=found.seed if found else None,
        threads=found.threads if found else None,
        seconds=seconds,
        recipe="" if found is None else found.to_file(),
    )
