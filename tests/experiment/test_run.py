"""The experiment in miniature, from training to the file of results."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
import yaml
from pyarrow import parquet
from safetensors.torch import load_file

from unmerge.errors import UnmergeError
from unmerge.experiment import decomposition, paper
from unmerge.experiment.layout import Place, targets
from unmerge.experiment.presets import PRESETS
from unmerge.experiment.reduction import load_reduced
from unmerge.experiment.results import read_metadata
from unmerge.experiment.run import run

MICRO = PRESETS["micro"]
TINY = replace(
    MICRO,
    name="tiny",
    base_options={"steps": 4, "batch": 2, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 48},
    training=replace(MICRO.training, rank=2, alpha=4, epochs=1, learning_rate=1e-2),
    examples=72,
    tasks=(*paper.dictionary(), "imdb_sentiment", "style_transfer", "arxiv_summarization"),
    compositions=tuple(MICRO.compositions[number] for number in (0, 4, 14)),
    top_k=1024,
    workers=1,
)
CELLS = 3 * 4 * 2 * 42
KILLS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("experiment")
    run(TINY, output, seeds=(0,))
    return output


@pytest.fixture(scope="module")
def rows(finished):
    return parquet.read_table(finished / "results.parquet").to_pylist()


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def results(folder):
    return (folder / "results.parquet").read_bytes()


def test_every_cell_has_one_row_and_none_failed(rows):
    keys = {(row["seed"], row["target"], row["coordinates"], row["algorithm"], row["setting"]) for row in rows}
    assert len(rows) == len(keys) == CELLS
    assert {row["failure"] for row in rows} == {None}
    assert {row["status"] for row in rows} == {"converged"}
    assert {row["group"] for row in rows} == {"known", "mixed"}


def test_known_linear_merges_come_apart_into_their_weights(rows):
    chosen = [
        row
        for row in rows
        if row["algorithm"] == "nnls" and row["group"] == "known" and row["method"] in {"linear", "task_arithmetic"}
    ]
    assert len(chosen) == 2 * 2 * 2
    for row in chosen:
        np.testing.assert_allclose(row["coefficients"], row["truth"], atol=0.05)
        assert row["recall"] == 1.0
        assert row["coefficient_mae"] < 0.02


def test_a_row_names_its_atoms_and_their_true_weights(rows):
    row = next(row for row in rows if row["composition"] == 2)
    assert tuple(row["names"]) == paper.dictionary()
    assert [name for name, weight in zip(row["names"], row["truth"], strict=True) if weight] == ["xsum"]
    assert sum(row["truth"]) == 0.25


def test_half_of_the_tensors_are_held_out():
    chosen = decomposition.split(16, seed=0)
    assert chosen.sum() == 8
    np.testing.assert_array_equal(chosen, decomposition.split(16, seed=0))
    assert not np.array_equal(chosen, decomposition.split(16, seed=1))


def test_the_settings_versions_and_digests_travel_with_the_results(finished):
    metadata = read_metadata(finished / "results.parquet")
    assert metadata["preset"]["training"]["rank"] == 2
    assert metadata["versions"].keys() >= {"unmerge", "mergekit", "peft", "torch"}
    digests = metadata["digests"]["seed 0, 00-known-linear"]
    assert digests.keys() == {"target", "selection", *(f"atom {task}" for task in paper.dictionary())}


def test_how_the_training_went_is_written_down(finished):
    records = json.loads((finished / "training.json").read_text(encoding="utf-8"))
    assert [record["task"] for record in records] == list(TINY.tasks)
    assert records[0].keys() == {"seed", "task", "loss_before", "loss_after", "relative_norm"}
    assert all(record["loss_after"] < record["loss_before"] for record in records)


def test_recipes_are_kept_and_merges_are_not(finished):
    place = Place(finished, 0)
    names = [target.name for target in targets(TINY, 0)]
    assert sorted(path.stem for path in (place.folder / "recipes").iterdir()) == sorted(names)
    recipe = yaml.safe_load(place.recipe("00-known-ties").read_text(encoding="utf-8"))
    assert recipe["parameters"] == {"normalize": True, "int8_mask": True}
    assert recipe["dtype"] == "bfloat16"
    assert [model["parameters"] for model in recipe["models"]] == [{"weight": 1 / 3, "density": 0.5}] * 3
    assert not list((place.folder / "merged").iterdir())


def test_statistics_are_those_of_dense_vectors(finished):
    place = Place(finished, 0)
    reduced = load_reduced(place.statistics("00-known-linear"))
    folders = [finished / "base", *(place.checkpoint(task) for task in paper.dictionary())]
    base, *tuned = (load_file(folder / "model.safetensors") for folder in folders)
    assert len(reduced.tensors) == 2 * 4
    for name, small, whole in zip(reduced.tensors, reduced.top_k, reduced.all, strict=True):
        D = np.stack([(one[name].double() - base[name].double()).numpy().ravel() for one in tuned], axis=1)
        np.testing.assert_allclose(whole.gram, D.T @ D, rtol=1e-9, atol=1e-15)
        chosen = np.argsort(-np.abs(D).max(axis=1), kind="stable")[: TINY.top_k // 8]
        np.testing.assert_allclose(small.gram, D[chosen].T @ D[chosen], rtol=1e-9, atol=1e-15)
        assert (small.count, whole.count) == (TINY.top_k // 8, len(D))


def test_the_dense_way_gives_the_same_coefficients(finished):
    found = json.loads((finished / "baseline.json").read_text(encoding="utf-8"))
    assert found["cells"] == 4 * 42
    assert found["coordinates"] == 1024
    assert found["largest_coefficient_difference"] < 1e-6
    assert found["ratio"] > 1


def test_a_finished_run_does_nothing_and_gives_the_same_bytes(copy, finished):
    phases = []
    run(TINY, copy, seeds=(0,), start=lambda phase, _: phases.append(phase) or (lambda: None))
    assert phases == ["decompositions"]
    assert results(copy) == results(finished)


@pytest.mark.parametrize(
    "part",
    ["results.parquet", "seed-0/statistics/00-known-dare_linear.npz", "seed-0/checkpoints/xsum", "seed-0"],
)
def test_a_deleted_part_comes_back_and_the_results_are_the_same_bytes(copy, finished, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(TINY, copy, seeds=(0,))
    assert results(copy) == results(finished)


def test_worker_processes_give_the_same_bytes(copy, finished):
    shutil.rmtree(copy / "seed-0" / "statistics")
    run(TINY, copy, seeds=(0,), workers=2)
    assert results(copy) == results(finished)


SCRIPT = """
import sys
from pathlib import Path
from tests.experiment.test_run import TINY
from unmerge.experiment.run import run
run(TINY, Path(sys.argv[1]), seeds=(0,))
"""


def parts(folder):
    return sum(1 for _ in folder.glob("seed-0/*/*")) + (folder / "base").exists()


def kill_after(folder, wanted, rng):
    """Start a run and kill it a random moment after it has finished some more parts."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)])
    deadline = time.monotonic() + 60
    while parts(folder) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.05))
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(finished, tmp_path):
    rng = random.Random(0)  # noqa: S311 - moments, not secrets
    folder = tmp_path / "killed"
    moments = sorted(rng.sample(range(1, 45), KILLS))
    killed = [kill_after(folder, wanted, rng) for wanted in moments]
    assert killed == [-signal.SIGKILL] * KILLS
    run(TINY, folder, seeds=(0,))
    assert results(folder) == results(finished)
    assert not list(folder.rglob(".*"))


def test_a_solver_that_raises_gives_a_failed_row_and_no_zeros(copy, monkeypatch):
    made = decomposition.solver

    def broken(setting):
        if setting.algorithm == "ridge":
            raise ArithmeticError("it broke")
        return made(setting)

    monkeypatch.setattr(decomposition, "solver", broken)
    run(TINY, copy, seeds=(0,))
    table = parquet.read_table(copy / "results.parquet")
    assert table.num_rows == CELLS
    failures = table.filter(pc.equal(table["algorithm"], "ridge"))
    assert set(failures["failure"].to_pylist()) == {"ArithmeticError: it broke"}
    assert set(failures["status"].to_pylist()) == {"failed"}
    for name in decomposition.NUMBERS:
        assert failures[name].null_count == failures.num_rows
    rest = table.filter(pc.not_equal(table["algorithm"], "ridge"))
    assert rest["failure"].null_count == rest.num_rows


def test_a_merge_that_fails_is_a_result_and_is_tried_again(copy, finished, monkeypatch):
    from unmerge.experiment import reduction

    merge = reduction.merge_in_process

    def broken(recipe, output, **options):
        if recipe.stem == "02-mixed-ties":
            raise UnmergeError(f"mergekit failed on {recipe}: no room")
        return merge(recipe, output, **options)

    monkeypatch.setattr(reduction, "merge_in_process", broken)
    Place(copy, 0).statistics("02-mixed-ties").unlink()
    run(TINY, copy, seeds=(0,))
    table = parquet.read_table(copy / "results.parquet")
    failures = table.filter(pc.is_valid(table["failure"]))
    assert table.num_rows == CELLS
    assert set(failures["target"].to_pylist()) == {"02-mixed-ties"}
    assert failures.num_rows == 2 * 42
    assert set(failures["failure"].to_pylist()) == {
        "UnmergeError: mergekit failed on ./seed-0/recipes/02-mixed-ties.yml: no room"
    }
    monkeypatch.undo()
    run(TINY, copy, seeds=(0,))
    assert results(copy) == results(finished)


def test_checkpoints_are_dropped_where_they_cannot_be_kept(copy, finished):
    preset = replace(TINY, keep_checkpoints=False)
    run(preset, copy, seeds=(0,))
    assert not (copy / "seed-0" / "checkpoints").exists()
    run(preset, copy, seeds=(0,))
    assert not (copy / "seed-0" / "checkpoints").exists()
    assert results(copy) == results(finished)


def test_an_experiment_of_other_settings_is_refused(copy):
    with pytest.raises(UnmergeError, match="delete it or choose another folder"):
        run(replace(TINY, top_k=512), copy, seeds=(0,))


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_checked(tmp_path, seeds):
    with pytest.raises(UnmergeError, match="give at least one, and none twice"):
        run(TINY, tmp_path, seeds=seeds)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("mine")
    with pytest.raises(UnmergeError, match="is not empty, and not the folder of an experiment"):
        run(TINY, tmp_path, seeds=(0,))
    assert [path.name for path in tmp_path.iterdir()] == [".git"]
    assert (tmp_path / ".git" / "config").read_text() == "mine"


def test_hidden_files_of_others_survive_a_second_run(copy):
    (copy / ".gitignore").write_text("*")
    (copy / ".results.parquet.partial").write_text("left by a kill")
    run(TINY, copy, seeds=(0,))
    assert (copy / ".gitignore").read_text() == "*"
    assert not (copy / ".results.parquet.partial").exists()
