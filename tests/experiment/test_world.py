from __future__ import annotations

import json
import shutil
from hashlib import sha256

import pytest

from unmerge.errors import UnmergeError
from unmerge.experiment.world import build_world

# Wall time is measured, so these two are not repeatable; everything else is.
TIMED = {"training.json", "world.json"}


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def copy(tiny_world, tmp_path):
    return shutil.copytree(tiny_world.folder, tmp_path / "world")


def test_a_world_has_every_part(tiny_world):
    names = {path.name for path in tiny_world.folder.iterdir()}
    assert names == {"base", "adapters", "checkpoints", "world.json"}
    for task in tiny_world.tasks:
        assert (tiny_world.adapter(task) / "adapter_model.safetensors").is_file()
        assert (tiny_world.checkpoint(task) / "model.safetensors").is_file()


def test_the_summary_records_settings_versions_and_training(tiny_world, tiny_options):
    summary = json.loads((tiny_world.folder / "world.json").read_text(encoding="utf-8"))
    assert summary["settings"]["seed"] == tiny_options["seed"]
    assert summary["versions"].keys() >= {"torch", "transformers", "peft"}
    assert summary["records"].keys() == {"base", *tiny_options["tasks"]}
    assert 0 < tiny_world.records["xsum"].relative_norm < 1


def test_defaults_are_recorded_too(tiny_world):
    settings = json.loads((tiny_world.folder / "world.json").read_text(encoding="utf-8"))["settings"]
    assert settings["adapters"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert settings["base"]["learning_rate"] > 0


def test_nothing_is_done_twice(copy, tiny_options):
    lines = []
    build_world(copy, **tiny_options, progress=lines.append)
    assert lines == []


@pytest.mark.parametrize("part", ["base", "adapters/xsum", "checkpoints/gsm8k_math"])
def test_a_deleted_part_comes_back_byte_for_byte_and_alone(copy, tiny_options, part):
    before = digests(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors") if part not in str(path)}
    shutil.rmtree(copy / part)
    lines = []
    build_world(copy, **tiny_options, progress=lines.append)
    assert [line.split(":")[0] for line in lines] == [part.split("/")[-1]]
    assert digests(copy) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_worker_processes_give_the_same_bytes(copy, tiny_options):
    before = digests(copy)
    shutil.rmtree(copy / "adapters")
    shutil.rmtree(copy / "checkpoints")
    build_world(copy, **{**tiny_options, "workers": 2})
    assert digests(copy) == before


def test_a_failure_leaves_nothing_behind(copy, tiny_options):
    shutil.rmtree(copy / "adapters" / "xsum")
    (copy / "base" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        build_world(copy, **tiny_options)
    assert [path.name for path in (copy / "adapters").iterdir()] == ["gsm8k_math"]


def test_a_world_of_other_settings_is_refused(copy, tiny_options):
    with pytest.raises(UnmergeError, match="delete it or choose another folder"):
        build_world(copy, **{**tiny_options, "seed": 4})


def test_an_unknown_task_is_named(tmp_path):
    with pytest.raises(UnmergeError, match="no task is named chess: the tasks are alpaca_instructions"):
        build_world(tmp_path, tasks=("chess",), seed=0)
