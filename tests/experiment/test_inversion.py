"""Inverted merges: the error against mergekit's own merges, and the experiment's file and lines of inversions."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.experiment.test_run import TINY
from tests.experiment.test_tables import make_rows, make_training, save
from tests.recipe.worlds import World
from unmerge.errors import RecipeError, UnmergeError
from unmerge.experiment import inversion
from unmerge.experiment.command import app
from unmerge.experiment.inversion import found_weights, invert, preset_of, weight_error
from unmerge.experiment.layout import INVERSIONS, Place, targets
from unmerge.experiment.mergekit import merge_in_process
from unmerge.experiment.paper import facts
from unmerge.experiment.readings import METHODS, read_results
from unmerge.experiment.results import Inversion, read_inversions, write_inversions
from unmerge.experiment.run import run
from unmerge.experiment.sheets import to_csv
from unmerge.experiment.tables import INVERTED, make_sheets, write_tables
from unmerge.recipe.inversion import inversion_error
from unmerge.recipe.proof import Member, Recovery

DICTIONARY = ("xsum", "reason_math", "python_instructions_alpaca", "latin_translation")
SMALL = replace(
    TINY,
    name="small",
    tasks=DICTIONARY,
    dictionary=DICTIONARY,
    compositions=TINY.compositions[:1],
    methods={name: TINY.methods[name] for name in ("linear", "ties", "dare_linear")},
)


def recovery(target, base, recipe, *, seed=None, names=None):
    """What would be said of a target if its recipe were found to be this one."""
    document = None if recipe is None else yaml.safe_load(recipe)
    listed = [] if document is None else [item["model"] for item in document["models"]]
    names = names or {}
    return Recovery(
        target=str(target),
        base=str(base),
        status="nothing known" if recipe is None else "proven",
        method=None if document is None else document["merge_method"],
        members=tuple(
            Member(name=names.get(model, Path(model).name), reference=model, parameters={}, coefficient=None)
            for model in listed
            if model != str(base)
        ),
        recipe=recipe,
        tool=None,
        seed=seed,
        threads=None,
        proof=None,
        decoded=None,
        alike=(),
        unexplained=None,
        notices=(),
    )


# The error


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("models"))


def merge(world, name, method, weights, *, seed=None, parameters=None, **of_models):
    models = [{"model": tune, "parameters": {"weight": weight, **of_models}} for tune, weight in weights.items()]
    document = {"merge_method": method, "base_model": "base", "models": models, "dtype": "bfloat16"}
    document |= {"parameters": parameters} if parameters else {}
    recipe = world.folder / f"{name}.yml"
    recipe.write_text(yaml.safe_dump(world.recipe(document)), encoding="utf-8")
    folder = merge_in_process(recipe, world.folder / name, seed=0 if seed is None else seed)
    return folder, recipe.read_text(encoding="utf-8")


def error_by_torch(world, target, made):
    base, *others = (load_file(Path(folder) / "model.safetensors") for folder in (world.path("base"), target, made))
    changes = [np.concatenate([(one[n].double() - base[n].double()).numpy().ravel() for n in base]) for one in others]
    cosine = changes[0] @ changes[1] / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1])
    return 1.0 - max(0.0, cosine) ** 2


@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_the_error_is_that_of_mergekits_own_merge_by_the_recipe(world, method, options):
    target, right = merge(world, f"{method}-target", method, {"math": 0.6, "code": 0.4}, **options)
    other, wrong = merge(world, f"{method}-other", method, {"math": 0.3, "chat": 0.5}, **options)
    assert inversion_error(recovery(target, world.path("base"), right)) == 0.0
    expected = error_by_torch(world, target, other)
    assert expected > 0.1
    assert inversion_error(recovery(target, world.path("base"), wrong)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.7}),
        ("della_linear", {"density": 0.6, "epsilon": 0.15}),
    ],
)
def test_decoded_masks_leave_next_to_nothing_and_those_of_a_stranger_do_not(world, method, options):
    weights = {"math": 0.6, "code": 0.5}
    parameters = {"normalize": False}
    target, recipe = merge(world, f"{method}-masks", method, weights, seed=12345, parameters=parameters, **options)
    base = world.path("base")
    assert inversion_error(recovery(target, base, recipe, seed=12345)) == 0.0
    decoded = inversion_error(recovery(target, base, recipe))
    another_draw = inversion_error(recovery(target, base, recipe, seed=1))
    decoy = inversion_error(recovery(target, base, recipe.replace("/math", "/chat")))
    assert decoded < 1e-3
    assert another_draw > 0.1
    assert decoy > 100 * decoded


def test_a_negated_model_and_no_model_leave_everything(world):
    target, recipe = merge(world, "positive", "task_arithmetic", {"math": 0.5})
    assert inversion_error(recovery(target, world.path("base"), recipe.replace("0.5", "-0.5"))) == 1.0
    assert inversion_error(recovery(target, world.path("base"), recipe.replace("0.5", "0.0"))) == 1.0
    assert inversion_error(recovery(target, world.path("base"), None)) == 1.0


def test_the_length_of_the_inverted_change_does_not_count(world):
    target, recipe = merge(world, "longer", "task_arithmetic", {"math": 1.0})
    found = inversion_error(recovery(target, world.path("base"), recipe.replace("weight: 1.0", "weight: 2.0")))
    assert found < 0.02


def test_a_target_of_another_depth_has_no_error(world):
    stack = world.write("stack", {name: value for name, value in world.base.items() if ".2." not in name})
    with pytest.raises(RecipeError, match="no task vector to compare"):
        inversion_error(recovery(stack, world.path("base"), None))


# Weights


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("linear", {}, {"math": 0.75, "code": 0.25}),
        ("task_arithmetic", {"lambda": 0.5}, {"math": 0.75, "code": 0.25}),
        ("ties", {"normalize": False}, {"math": 1.5, "code": 0.5}),
    ],
)
def test_weights_are_those_that_the_merge_applies(world, method, parameters, expected):
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("math", 1.5), ("code", 0.5))]
    document = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "bfloat16"}
    document |= {} if method == "linear" else {"base_model": "base"}
    found = found_weights(recovery(world.path("math"), world.path("base"), yaml.safe_dump(world.recipe(document))))
    assert {name: set(weights) for name, weights in found.items()} == {n: {w} for n, w in expected.items()}


def test_the_weight_error_is_the_largest_over_tensors_and_over_atoms_that_are_missing():
    assert weight_error({"a": (0.5, 0.4)}, {"a": 0.5}) == pytest.approx(0.1)
    assert weight_error({"a": (0.5,)}, {"a": 0.5, "b": 0.25, "c": 0.0}) == 0.25
    assert weight_error({"a": (None,)}, {"a": 0.5}) is None
    assert weight_error({}, {"a": 0.0}) == 0.0


# The experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patched:
        # The timing against scikit-learn, which wants as many atoms as the paper has.
        patched.setattr("unmerge.experiment.run._compare", lambda _: None)
        run(SMALL, output, seeds=(0,))
    return output


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def silent(phase, total):
    return lambda: None


@pytest.fixture
def told(monkeypatch):
    """Recoveries that say what the kept recipe says, and what they were told."""
    asked = []

    def recover(target, atoms, *, base, search):
        asked.append((Path(target).name, atoms, search.count))
        place = Place(Path(base).parent, 0)
        document = yaml.safe_load(place.recipe(Path(target).name).read_text(encoding="utf-8"))
        folder = place.folder / "recipes"
        for item in document["models"]:
            item["model"] = str((folder / item["model"]).resolve())
        if "base_model" in document:
            document["base_model"] = base
        return recovery(target, base, yaml.safe_dump(document))

    monkeypatch.setattr(inversion, "recover", recover)
    return asked


def test_a_recovery_that_finds_the_recipe_scores_in_full(copy, told):
    found = read_inversions(invert(SMALL, copy, start=silent))
    names = [target.name for target in targets(SMALL, 0)]
    assert sorted(one.target for one in found) == sorted(names)
    for one in found:
        assert (one.method_right, one.found_method, one.failure) == (True, one.method, None)
        assert (one.precision, one.recall) == (1.0, 1.0)
        assert set(one.members) == {"latin_translation", "python_instructions_alpaca", "reason_math"}
        assert one.weight_error < 1e-15
        assert one.error <= (1e-3 if one.method == "dare_linear" else 0.0)
        assert str(copy) not in one.recipe
    assert {count for _, _, count in told} == {0}
    assert all([atom.partition("=")[0] for atom in atoms] == list(SMALL.dictionary) for _, atoms, _ in told)
    assert not list((copy / "seed-0" / "merged").iterdir())


def test_what_was_done_before_a_kill_is_kept(copy, told, monkeypatch):
    recover = inversion.recover

    def killed(target, *arguments, **options):
        if len(told) == 2:
            raise KeyboardInterrupt
        return recover(target, *arguments, **options)

    monkeypatch.setattr(inversion, "recover", killed)
    with pytest.raises(KeyboardInterrupt):
        invert(SMALL, copy, start=silent)
    assert len(read_inversions(copy / INVERSIONS)) == 2
    assert not list((copy / "seed-0" / "merged").iterdir())
    monkeypatch.setattr(inversion, "recover", recover)
    before = [name for name, _, _ in told]
    assert len(read_inversions(invert(SMALL, copy, start=silent))) == 3
    assert sorted(name for name, _, _ in told) == sorted(target.name for target in targets(SMALL, 0))
    assert [name for name, _, _ in told][:2] == before


def test_checkpoints_that_were_not_kept_are_made_again_and_dropped(copy, told):
    shutil.rmtree(copy / "seed-0" / "checkpoints")
    found = read_inversions(invert(SMALL, copy, start=silent))
    assert {one.failure for one in found} == {None}
    assert not list((copy / "seed-0" / "checkpoints").iterdir())


def test_a_merge_that_is_not_the_one_of_the_results_is_a_failure_and_is_tried_again(copy, told):
    recipe = Place(copy, 0).recipe("00-known-linear")
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("0.3333333333333333", "0.4", 1), encoding="utf-8")
    found = {one.target: one for one in read_inversions(invert(SMALL, copy, start=silent))}
    assert "is not the one of the results" in found["00-known-linear"].failure
    assert found["00-known-linear"].error is None
    assert found["00-known-ties"].failure is None
    recipe.write_text(text, encoding="utf-8")
    invert(SMALL, copy, start=silent)
    assert [name for name, _, _ in told].count("00-known-linear") == 1
    assert {one.failure for one in read_inversions(copy / INVERSIONS)} == {None}


def test_the_recovery_itself_is_told_nothing_else(copy):
    linear = replace(SMALL, methods={"linear": SMALL.methods["linear"]})
    (one,) = read_inversions(invert(linear, copy, start=silent))
    assert one.failure is None
    assert one.seconds > 0.0
    assert one.status in {"proven", "partial"}
    assert one.error < 0.1
    assert (one.precision, one.recall) == (1.0, 1.0)


def test_groups_and_seeds_choose_what_is_inverted(copy, told):
    assert not invert(SMALL, copy, groups=("mixed",), start=silent).exists()
    with pytest.raises(UnmergeError, match=r"seed 1 was not run: the seeds of .* are 0"):
        invert(SMALL, copy, seeds=(1,), start=silent)
    (copy / "results.parquet").unlink()
    with pytest.raises(UnmergeError, match=r"results\.parquet is not there"):
        invert(SMALL, copy, start=silent)


# The command


def test_a_folder_of_another_experiment_is_refused(copy, tmp_path):
    with pytest.raises(UnmergeError, match="is of other settings than the presets micro"):
        preset_of(copy)
    with pytest.raises(UnmergeError, match="is not the folder of an experiment"):
        preset_of(tmp_path)


def test_bad_groups_are_one_clear_line(tmp_path):
    result = CliRunner().invoke(app, ["invert", str(tmp_path), "--groups", "known,other"])
    assert isinstance(result.exception, UnmergeError)
    assert str(result.exception) == "no group of merges is named 'other': the groups are known, mixed, unknown"


# The tables


def some_inversions(seed=4, groups=("known", "mixed")):
    rng = np.random.default_rng(seed)
    found = []
    for number, composition in enumerate(facts()["merging"]["compositions"]):
        for method in METHODS:
            labels = Inversion(0, f"{number:02d}-{method}", number, composition["group"], method)
            if composition["group"] not in groups:
                continue
            if rng.random() < 0.2:
                found.append(replace(labels, failure="it broke"))
                continue
            names = ("error", "precision", "recall", "weight_error", "equal_share", "seconds")
            numbers = dict(zip(names, rng.random(len(names)).tolist(), strict=True))
            right = bool(rng.random() < 0.5)
            found.append(replace(labels, status="proven", found_method=method, method_right=right, **numbers))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return save(tmp_path_factory.mktemp("results"), make_rows(seeds=(0,)))


def records(folder, name):
    found = pd.read_csv(folder / f"{name}.csv")
    return found[found.iloc[:, 0] == INVERTED]


def test_tables_3_to_5_have_lines_of_inversions_where_there_are_some(results, tmp_path):
    before = {path.name: path.read_bytes() for path in write_tables(results, tmp_path / "before")}
    inversions = some_inversions()
    write_inversions(results / INVERSIONS, inversions, {})
    after = {path.name: path.read_bytes() for path in write_tables(results, tmp_path / "after")}
    (results / INVERSIONS).unlink()
    changed = {name.partition(".")[0] for name in before if before[name] != after[name]}
    assert changed == {"table-3-error-by-method", "table-4-error-by-category", "table-5-precision-recall", "tables"}
    assert {name.partition(".")[0] for name in after.keys() - before.keys()} == {"inversions"}
    table = pd.DataFrame([asdict(one) for one in inversions])
    table["failed"] = table.failure.notna()
    for _, row in records(tmp_path / "after", "table-4-error-by-category").iterrows():
        own = table[table.group == row.category.lower()]
        assert row["mean"] == pytest.approx(own.error.mean())
        assert row["std"] == pytest.approx(own.error.std(ddof=0))
        assert (row.merges, row.merges_failed) == ((~own.failed).sum(), own.failed.sum())
    known = table[table.group == "known"]
    labels = {label: name for name, label in METHODS.items()}
    for _, row in records(tmp_path / "after", "table-5-precision-recall").iterrows():
        own = known[known.method == labels[row.merging]]
        assert row["mean"] == pytest.approx(own[row.quantity].mean())
    assert set(records(tmp_path / "after", "table-4-error-by-category").category) == {"Known", "Mixed"}
    assert set(records(tmp_path / "after", "table-3-error-by-method").coordinates) == {"all"}


def test_the_lines_of_known_merges_need_known_merges(results):
    mixed = some_inversions(groups=("mixed",))
    sheets = {sheet.name: sheet for sheet in make_sheets(read_results(results), make_training(), facts(), mixed)}
    assert not any(INVERTED in row for row in sheets["table-3-error-by-method"].body)
    assert [row[1] for row in sheets["table-4-error-by-category"].body if row[0] == INVERTED] == ["Mixed"]


def test_the_table_of_inversions_counts_and_takes_the_largest_weight_error(results):
    inversions = some_inversions()
    sheets = {sheet.name: sheet for sheet in make_sheets(read_results(results), make_training(), facts(), inversions)}
    sheet = sheets["inversions"]
    own = [one for one in inversions if (one.group, one.method) == ("known", "ties")]
    (row,) = [dict(zip(sheet.head, row, strict=True)) for row in sheet.body if row[:2] == ("Known", "TIES")]
    right = sum(one.method_right is True for one in own)
    assert row["Method right"] == f"{right} of {len(own)}"
    assert row["Largest weight error"] == f"{max(one.weight_error or 0.0 for one in own):.4f}"
    listed = list(csv.DictReader(io.StringIO(to_csv(sheet))))
    assert len(listed) == len(inversions)
    assert {one["target"] for one in listed} == {one.target for one in inversions}


def test_inversions_come_back_as_they_were_written(tmp_path):
    inversions = [*some_inversions(), replace(some_inversions()[0], seed=1, members=("a", "b"), recipe="x: 1\n")]
    write_inversions(tmp_path / INVERSIONS, inversions, {})
    assert read_inversions(tmp_path / INVERSIONS) == inversions
    assert read_inversions(tmp_path / "absent.parquet") == []
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UnmergeError, match="is not a file of inversions"):
        read_inversions(tmp_path / "broken.parquet")
