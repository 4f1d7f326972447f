from __future__ import annotations

from unmerge.experiment.crowd import FIRST_WORLD, members, train_member
from unmerge.experiment.tasks import TASKS


def test_every_task_comes_back_once_per_world_under_its_own_name():
    crowd = list(members(3))
    assert [member.task for member in crowd] == 3 * list(TASKS)
    names = [name for member in crowd for name in member.names]
    assert len(set(names)) == len(names)
    assert list(members(2)) == crowd[: 2 * len(TASKS)]


def test_one_script_or_many_seed_the_initial_matrices():
    alike, apart = (
        {member.init for member in members(2) if member.world == world} for world in (FIRST_WORLD, FIRST_WORLD + 1)
    )
    assert (len(alike), len(apart)) == (1, len(TASKS))


def test_what_is_there_is_not_trained_again(tmp_path):
    member = next(members(1))
    for name in member.names:
        (tmp_path / name).mkdir()
    train_member(member, tmp_path / "no base", tmp_path)
