from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from benchmarks.evidence.material import SEEDS, dictionary_of, every_name, strangers_of, task_of, twin_of
from benchmarks.evidence.mixes import (
    CHANGES,
    COVERED,
    EDITED,
    HARD,
    Mix,
    coverage_mixes,
    design_mixes,
    draw_hard,
    edited_mixes,
    hard_mixes,
)

from unmerge.experiment.mergekit import METHODS

POOL = every_name()


@pytest.fixture(scope="module")
def hard() -> list[Mix]:
    return hard_mixes(POOL)


def test_names_lead_to_tasks_and_twins() -> None:
    assert task_of("xsum-4-early") == task_of("xsum-11") == "xsum"
    assert twin_of("xsum-4") == "xsum-4-early"
    assert twin_of("xsum-4-early") == "xsum-4"
    assert len(set(POOL)) == len(POOL) == 270


def test_the_design_is_the_papers() -> None:
    mixes = design_mixes()
    assert len(mixes) == len({mix.name for mix in mixes}) == 216
    assert Counter(mix.group for mix in mixes) == {"known": 72, "mixed": 72, "unknown": 72}
    assert all(mix.effective == pytest.approx(dict(mix.weights)) for mix in mixes)
    assert all(len(mix.dictionary) == 8 for mix in mixes)


def test_a_number_always_names_the_same_mix() -> None:
    assert draw_hard(POOL, 64, 7) == draw_hard(POOL, 64, 7)
    assert draw_hard(POOL, 64, 7) != draw_hard(POOL, 64, 11)


def test_hard_mixes_are_as_many_as_said_of_every_method(hard: list[Mix]) -> None:
    assert Counter(len(mix.dictionary) for mix in hard) == HARD
    assert sum(HARD.values()) >= 320
    for size, count in HARD.items():
        methods = Counter(mix.method for mix in hard if len(mix.dictionary) == size)
        assert methods == dict.fromkeys(METHODS, count // len(METHODS))
    assert len({mix.name for mix in hard}) == len(hard)
    assert {len(mix.dictionary) for mix in hard[:8]} == set(HARD)


def test_ingredients_are_within_bounds(hard: list[Mix]) -> None:
    for mix in hard:
        inside = [name for name in mix.weights if name in mix.dictionary]
        assert len(inside) <= 3
        assert len(mix.strangers) <= 2
        assert len(mix.weights) >= (2 if mix.method == "ties" else 1)
        assert all(0.02 <= mix.weights[name] <= 0.9 for name in inside)
        assert all(0.2 <= mix.weights[name] <= 0.9 for name in mix.strangers)
        assert len(set(mix.dictionary)) == len(mix.dictionary)


def test_most_strangers_have_siblings_in_the_dictionary_and_some_have_none(hard: list[Mix]) -> None:
    related = [
        task_of(name) in {task_of(atom) for atom in mix.dictionary}
        for mix in hard
        if len(mix.dictionary) == 8
        for name in mix.strangers
    ]
    assert 0.5 < sum(related) / len(related) < 0.7


def test_twins_are_in_the_merge_in_the_dictionary_and_in_both(hard: list[Mix]) -> None:
    kinds = Counter(mix.kind(atom) for mix in hard for atom in mix.dictionary)
    assert min(kinds[kind] for kind in ("present", "twin", "sibling", "other")) > 50
    assert any(mix.has_twin(atom) for mix in hard for atom in mix.dictionary if mix.kind(atom) == "present")


def test_effective_weights_are_divided_by_the_sum_where_mergekit_does() -> None:
    mix = replace(draw_hard(POOL, 8, 0), weights={"xsum-3": 0.6, "xsum-4": 0.2}, dictionary=("xsum-3", "xsum-5"))
    assert mix.strangers == ("xsum-4",)
    for method in METHODS:
        effective = replace(mix, method=method).effective
        assert effective["xsum-3"] == pytest.approx(0.75 if method in ("linear", "ties") else 0.6)


def test_kinds_of_absent_atoms() -> None:
    mix = replace(draw_hard(POOL, 8, 0), weights={"xsum-3": 0.6, "squad_qa-4-early": 0.2})
    kinds = [mix.kind(atom) for atom in ("xsum-3", "xsum-3-early", "xsum-4", "squad_qa-4", "orca_math-3")]
    assert kinds == ["present", "twin", "sibling", "twin", "other"]


def test_coverage_merges_are_linear_and_mixed_ones_have_one_stranger() -> None:
    mixes = coverage_mixes()
    assert Counter((mix.change, mix.group) for mix in mixes) == {
        (change, group): count for change in CHANGES for group, count in COVERED.items()
    }
    assert len({(mix.change, tuple(mix.weights.items())) for mix in mixes}) == len(mixes)
    for mix in mixes:
        assert mix.method == "linear"
        assert 2 <= len(mix.weights) <= 4
        assert len(mix.strangers) == (mix.group == "mixed")
        assert sum(mix.effective.values()) == pytest.approx(1.0)


def test_an_edit_does_not_change_what_is_merged() -> None:
    mixes = edited_mixes(["one", "other"])
    assert Counter(mix.edit for mix in mixes) == {None: EDITED, "one": EDITED, "other": EDITED}
    assert [mix.edit for mix in mixes[:EDITED]] == [None] * EDITED
    plain, edited = mixes[0], next(mix for mix in mixes if mix.edit == "one")
    assert (plain.weights, plain.seed, plain.method) == (edited.weights, edited.seed, edited.method)


def test_the_papers_dictionary_and_its_strangers_are_all_tasks_of_a_seed() -> None:
    for seed in SEEDS:
        assert not set(dictionary_of(seed)) & set(strangers_of(seed))
        assert len({*dictionary_of(seed), *strangers_of(seed)}) == 15
