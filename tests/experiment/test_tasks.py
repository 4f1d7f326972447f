from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from unmerge.experiment.tasks import MAX_LENGTH, TASKS, base_corpus

EVERY_TASK = pytest.mark.parametrize("name", list(TASKS))


def examples(name, seed=0, count=200):
    rng = np.random.default_rng(seed)
    return [TASKS[name].example(rng) for _ in range(count)]


def test_the_tasks_are_the_papers():
    assert len(TASKS) == 15
    assert sum(task.in_dictionary for task in TASKS.values()) == 8
    assert len({task.family for task in TASKS.values()}) == 6
    assert all(name == task.name for name, task in TASKS.items())


@EVERY_TASK
def test_the_same_seed_gives_the_same_examples(name):
    assert examples(name) == examples(name)
    assert examples(name) != examples(name, seed=1)


@EVERY_TASK
def test_an_answer_follows_from_its_prompt(name):
    answers = {}
    for example in examples(name, count=2000):
        assert answers.setdefault(example.prompt, example.answer) == example.answer
    assert len(answers) >= 30


@EVERY_TASK
def test_examples_are_short_printable_ascii(name):
    for example in examples(name):
        text = f"{example.prompt}\n{example.answer}"
        assert len(text) <= MAX_LENGTH
        assert text.isascii()
        assert text.replace("\n", "").isprintable()


def test_no_prompt_belongs_to_two_tasks():
    prompts = [{example.prompt for example in examples(name)} for name in TASKS]
    assert len(set.union(*prompts)) == sum(map(len, prompts))


def test_the_corpus_is_repeatable_and_holds_no_task():
    texts = list(islice(base_corpus(np.random.default_rng(0)), 2000))
    assert texts == list(islice(base_corpus(np.random.default_rng(0)), 2000))
    solved = {f"{one.prompt}\n{one.answer}" for name in TASKS for one in examples(name, count=2000)}
    assert not solved & set(texts)


def test_every_character_of_a_task_is_in_the_corpus():
    corpus = set("".join(islice(base_corpus(np.random.default_rng(0)), 4000)))
    needed = {character for name in TASKS for one in examples(name) for character in one.prompt + one.answer}
    assert needed <= corpus, json.dumps(sorted(needed - corpus))
