"""The document of a recovery: what is written is what was found, and mergekit reads the recipe in it."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console

from tests.recipe.tunes import MERGES, Tunes
from tests.recipe.worlds import quiet_mergekit
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.errors import RecipeError
from unmerge.recipe.comparison import compare_all, lay_out
from unmerge.recipe.document import parse_recipe
from unmerge.recipe.probes import Hypothesis
from unmerge.recipe.proof import Proof, Range, Recovery, proof_of, summary
from unmerge.recipe.recovery import best_of_each
from unmerge.recipe.trial import CONVENTIONS, CURRENT, Tried
from unmerge.report.recovery import print_recovery

RECIPE = "merge_method: linear\nmodels:\n- model: a/b\n  parameters:\n    weight: 0.5\ndtype: bfloat16\n"
PROOF: dict[str, Any] = {
    "kind": "bits",
    "tensors": 3,
    "elements": 4000,
    "looked_at": 2000,
    "wrong": 0,
    "free": 0,
    "share": 1.0,
    "unlikely": (),
}


def recovery(**more: Any) -> Recovery:
    told: dict[str, Any] = {
        "target": "t",
        "base": "b",
        "status": "proven",
        "method": "linear",
        "members": (),
        "recipe": RECIPE,
        "tool": CURRENT,
        "seed": None,
        "threads": 1,
        "proof": Proof(**PROOF),
        "decoded": None,
        "alike": (),
        "unexplained": 0.01,
        "notices": (),
    }
    return Recovery(**{**told, **more})


@pytest.mark.parametrize(("status", "code"), [("proven", 0), ("decoded", 0), ("partial", 1), ("nothing known", 1)])
def test_the_exit_code_tells_whether_the_recipe_makes_the_target(status: str, code: int) -> None:
    assert recovery(status=status).exit_code == code


def test_a_document_is_read_back() -> None:
    text = recovery(seed=42, status="decoded").to_json()
    assert Recovery.model_validate_json(text).to_json() == text
    assert json.loads(text)["schema"] == "unmerge/recovery/1"


@pytest.mark.parametrize("wrong", [{"status": "perhaps"}, {"more": 1}, {"unexplained": float("nan")}])
def test_what_is_not_of_the_document_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        recovery(**wrong)


@pytest.mark.parametrize("status", ["proven", "partial", "decoded"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_is_comments_and_the_recipe(status: str, threads: int) -> None:
    from mergekit.config import MergeConfiguration

    text = recovery(status=status, seed=7, threads=threads).to_file()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert text == "\n".join([*comments, RECIPE])
    assert parse_recipe(text) == parse_recipe(RECIPE)
    assert MergeConfiguration.model_validate(yaml.safe_load(text)).merge_method == "linear"
    assert any("--random-seed 7" in line and f"{threads} thread" in line for line in comments)
    assert any("not listed" in line for line in comments) == (status == "partial")


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    recovery(recipe=None).write(file)
    assert not list(tmp_path.iterdir())
    recovery().write(file)
    assert file.read_text(encoding="utf-8") == recovery().to_file()
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(RecipeError, match="cannot be written"):
        recovery().write(tmp_path / "nowhere" / "recipe.yml")


def test_a_summary_says_what_was_compared() -> None:
    assert summary(Proof(**PROOF)) == "100 % of 2,000 elements are equal, bit for bit (3 tensors)"
    some = Proof(**{**PROOF, "kind": "masks", "share": 0.98765, "free": 12})
    assert summary(some).startswith("98.76 % of 2,000 elements are what masks of these densities make")
    assert "12 elements at a trim threshold" in summary(some)
    nearly = Proof(**{**PROOF, "looked_at": 10**9, "wrong": 1, "share": 1.0 - 1e-9})
    assert not summary(nearly).startswith("100 %")


def test_what_makes_the_same_is_said_in_a_line_below_the_table() -> None:
    ranges = [("a", "weight", 0.499, 0.501), ("a", "density", 0.5, None), ("b", "density", None, 0.5)]
    ranges += [("b", "gamma", 0.5, 0.5), (None, "lambda", None, None)]
    found = [Range(model=model, parameter=name, value=0.5, low=low, high=high) for model, name, low, high in ranges]
    result = recovery(ranges=found, free=("Only the ratios matter.", "And nothing else."))
    said = [line.strip() for line in _printed(result)]
    first = said.index(
        "The same bits: weight of a 0.499 to 0.501, density of a from 0.5, density of b up to 0.5, gamma of b "
        "0.5 only, lambda any."
    )
    assert said[first + 1 : first + 3] == ["Only the ratios matter.", "And nothing else."]
    assert not any("The same bits" in line for line in _printed(recovery()))


def test_of_each_method_the_best_recipe_is_alike() -> None:
    recipe = parse_recipe(RECIPE)
    shares = [(0.9997, "ties"), (0.9999, "ties"), (0.9998, "sce"), (0.9996, "sce")]
    tried = [Tried(share, 1.0, replace(recipe, merge_method=method)) for share, method in shares]
    assert [(one.share, one.recipe.merge_method) for one in best_of_each(tried)] == [(0.9999, "ties"), (0.9998, "sce")]


def _printed(result: Recovery) -> list[str]:
    written = StringIO()
    print_recovery(result, Console(width=200, file=written))
    return written.getvalue().splitlines()


def compared(tunes: Tunes, name: str, *, seed: int | None) -> Proof:
    recipe = tunes.truth(name)
    target = open_checkpoint(tunes.merged(name))
    models = tunes.models(tunes.members(*(reference.path.rpartition("/")[2] for reference in recipe.references)))
    hypothesis = Hypothesis(recipe, models, CONVENTIONS[CURRENT][recipe.merge_method], 1)
    return proof_of(compare_all(hypothesis, lay_out(hypothesis, target), seed, lambda _: None))


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.config  # noqa: F401 - its first import warns


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_true_recipe_is_proved_bit_by_bit(tunes: Tunes, name: str) -> None:
    found = compared(tunes, name, seed=MERGES[name].seed)
    assert (found.kind, found.wrong, found.share, found.unlikely) == ("bits", 0, 1.0, ())
    assert found.tensors == len(tunes.base)
    assert found.elements == sum(value.size for value in tunes.base.values())
    assert 0 < found.looked_at < found.elements


def test_another_seed_is_no_proof_and_no_seed_proves_masks(tunes: Tunes) -> None:
    seed = MERGES["dare_ties"].seed
    assert seed is not None
    wrong = compared(tunes, "dare_ties", seed=seed + 1)
    assert wrong.kind == "bits"
    assert wrong.share < 0.8
    assert wrong.wrong == pytest.approx((1.0 - wrong.share) * wrong.looked_at)
    masks = compared(tunes, "dare_ties", seed=None)
    assert (masks.kind, masks.unlikely) == ("masks", ())
    assert masks.share > 0.99
