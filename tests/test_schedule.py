"""The Schedule is compared with a loop that counts one agent step after the other."""

import itertools
from typing import Any

import pytest

from cerl.config import load
from cerl.schedule import Schedule


def schedule(**changes: Any) -> Schedule:
    plain: dict[str, Any] = {"steps": 100, "envs": 1, "start": 10, "update_every": 4, "updates": 1}
    return Schedule(**{**plain, "policy_every": 1, "refresh": 0, **changes})


CASES = list(itertools.product((1, 3, 8), (0, 10, 25), (1, 4, 9), (1, 2)))


@pytest.mark.parametrize(("envs", "start", "update_every", "updates"), CASES)
def test_iterations_make_the_updates_that_a_loop_over_steps_would(
    envs, start, update_every, updates
):
    ours = schedule(envs=envs, start=start, update_every=update_every, updates=updates)
    made = 0
    for iteration in range(1, ours.last + 1):
        want = []
        for step in range((iteration - 1) * envs + 1, iteration * envs + 1):
            if step > start and (step - start) % update_every == 0:
                want += range(made + 1, made + updates + 1)
                made += updates
        assert list(ours.updates_in(iteration, since=0)) == want
        assert ours.updates_by(iteration * envs) == made


def test_updates_that_were_due_while_replay_filled_up_again_are_not_made_up_for():
    ours = schedule(envs=2, start=10, update_every=2)
    assert not ours.updates_in(20, since=40)  # its steps, 39 and 40, began before
    assert list(ours.updates_in(21, since=40)) == [16]
    assert list(ours.updates_in(21, since=0)) == [16]


def test_the_last_iteration_reaches_the_steps_asked_for():
    ours = schedule(steps=10, envs=4)
    assert ours.last == 3 and [ours.steps_at(k) for k in range(4)] == [0, 4, 8, 10]


@pytest.mark.parametrize("envs", [1, 3, 8])
def test_what_is_due_is_due_once_for_every_multiple_passed_and_at_the_end(envs):
    ours = schedule(steps=50, envs=envs)
    for every in (1, 4, 7, 50, 1000):
        for iteration in range(1, ours.last + 1):
            covered = range((iteration - 1) * envs + 1, iteration * envs + 1)
            passes = any(step % every == 0 for step in covered)
            assert ours.passes(iteration, every) == passes
            assert ours.due(iteration, every) == (passes or iteration == ours.last)


def test_all_stages_and_refreshes_are_counted_in_updates():
    ours = schedule(start=0, update_every=2, updates=3, policy_every=2, refresh=4)
    assert [k for k in range(1, 9) if ours.all_stages(k)] == [2, 4, 6, 8]
    made, refreshed = 0, []
    for iteration in range(1, 21):
        new = ours.updates_in(iteration, since=0)
        if any(number % 4 == 0 for number in new):
            refreshed.append(iteration)
        made += len(new)
    assert made == 30
    assert refreshed == [k for k in range(1, 21) if ours.refreshes(k)]
    assert not any(schedule(refresh=0).refreshes(k) for k in range(1, 101))


def test_a_schedule_reads_its_config():
    config = load("mujoco/redq")
    ours = Schedule.of(config, envs=3)
    assert (ours.envs, ours.steps, ours.start) == (3, config.schedule.steps, config.replay.start)
    assert (ours.updates, ours.policy_every) == (20, 20)
