from __future__ import annotations

from collections import Counter

import pytest

from unmerge.experiment import paper
from unmerge.experiment.decomposition import solver
from unmerge.experiment.presets import PRESETS
from unmerge.experiment.tasks import TASKS


def test_there_are_42_settings_and_9072_runs():
    settings = paper.settings()
    assert Counter(one.algorithm for one in settings) == {
        "nnls": 1, "dot_product": 1, "lasso": 3, "ridge": 4, "elastic_net": 9, "omp": 24,
    }  # fmt: skip
    assert len(set(settings)) == 42
    assert len(settings) * len(paper.compositions()) * len(PRESETS["micro"].methods) * 3 == 9072


def test_a_setting_is_written_as_compact_json():
    assert paper.Setting("elastic_net", (("l1_ratio", 0.5), ("lambda", 1e-8))).text == '{"l1_ratio":0.5,"lambda":1e-08}'


def test_the_compositions_are_of_their_groups():
    groups = Counter(one.group for one in paper.compositions())
    assert groups == {"known": 6, "mixed": 6, "unknown": 6}
    known = set(paper.dictionary())
    for one in paper.compositions():
        inside = len(known.intersection(one.tasks))
        assert {"known": inside == len(one.tasks), "unknown": inside == 0, "mixed": 0 < inside < len(one.tasks)}[
            one.group
        ]


def test_the_micro_tasks_are_the_papers():
    assert tuple(TASKS) == paper.tasks()
    assert tuple(name for name, task in TASKS.items() if task.in_dictionary) == paper.dictionary()
    assert [task.family for task in TASKS.values()] == [task["family"] for task in paper.facts()["tasks"]]


def test_the_qwen_preset_is_the_papers():
    preset, facts = PRESETS["qwen2.5-7b"], paper.facts()
    training, found = preset.training, facts["training"]
    assert (preset.base, preset.examples, preset.train_fraction) == ("Qwen/Qwen2.5-7B-Instruct", 1500, 0.9)
    assert (training.rank, training.alpha, training.dropout) == (32, 32, 0.05)
    assert (training.learning_rate, training.epochs) == (found["learning_rate"], found["epochs"]) == (2e-4, 3)
    assert (training.batch, training.accumulation, training.warmup_steps) == (1, 16, 25)
    assert (training.max_length, training.dtype, training.chat) == (2048, "bfloat16", True)
    assert training.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {name: source.dataset for name, source in preset.sources.items()} == {
        task["name"]: task["dataset"] for task in facts["tasks"]
    }
    assert preset.methods["ties"] == {"density": 0.5, "normalize": True, "int8_mask": True}
    assert preset.methods["dare_linear"] == {"density": 0.5}
    assert f"k = {preset.top_k:,} //" in facts["compression"]["select"]
    assert facts["compression"]["select"].endswith(str(preset.top_k // facts["compression"]["modules"]))


def test_both_presets_merge_the_same_things():
    micro, qwen = PRESETS["micro"], PRESETS["qwen2.5-7b"]
    for name in ("tasks", "dictionary", "compositions", "methods"):
        assert getattr(micro, name) == getattr(qwen, name)


@pytest.mark.parametrize("setting", paper.settings(), ids=lambda one: f"{one.algorithm}{one.text}")
def test_every_setting_has_a_solver_and_only_nnls_is_non_negative(setting):
    made = solver(setting)
    assert made.name == setting.algorithm
    assert made.signed == (setting.algorithm not in {"nnls", "dot_product"})
