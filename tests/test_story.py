"""The story of cerl in one file: a game of ten lines meets a population, and both meet the report.

Read it from top to bottom. Every test is a chapter: it names one part of the system, says in a
sentence what it is, and shows what it holds. The letters of shapes, [S, N, E, ...], are explained
in `cerl/__init__.py`: here S = 2 seeds of N = 3 members, each seed with E = 4 environments.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import cerl
from cerl.envs.resident import Game
from cerl.report import tables
from cerl.wiring import assemble

# 1. An environment is rules and a state. This one is a corridor of six cells: action 1 goes right,
# action 0 left, and the right end pays +1. G games are stepped at once, G = S x E.


class State(NamedTuple):
    place: Tensor  # [G] int64, cells from the left end


def step(state: State, action: Tensor, u: Tensor) -> tuple[State, Tensor, Tensor]:
    place = (state.place + 2 * action - 1).clamp(min=0)
    return State(place), (place == 5).float(), place == 5  # state, reward, terminal


def corridor() -> Game:
    return Game(
        reset=lambda u: State((5 * u[:, 0]).long()),  # u is uniform in [0, 1): the place is random
        step=step,
        observe=lambda state: torch.arange(6, device=state.place.device) == state.place[:, None],
        draws=0,  # uniform numbers of a step
        reset_draws=1,
        observation=(6,),
        actions=(0, 1),
    )


# 2. A config is every option of a run. A preset gives them, here Double DQN for a game of one's
# own; what differs is stated. With `heads: cerl` a member has one value head for every member, and
# learns through it what the others' values are (Lin et al. 2024).

CHANGES = {
    **{"env.name": "test_story:corridor", "env.time_limit": 15, "env.envs": 4},
    **{"seeds": (0, 1), "ensemble.members": 3, "ensemble.heads": "cerl", "device": "cpu"},
    **{
        "net.hidden": (16,),
        "loss.gamma": 0.8,
        "optim.lr": 1e-2,
        "replay.start": 40,
        "schedule.target_every": 40,
    },
    **{"schedule.steps": 800, "explore.hold": 100, "explore.decay": 400},
    **{"eval.every": 800, "eval.episodes": 4, "eval.policies": ("individual", "vote")},
    "eval.time_limit": 15,
}


@pytest.fixture
def parts():
    """The parts of a run, put together by `cerl/wiring.py`, after 20 steps of every environment."""
    parts = assemble(cerl.config.load("game/ddqn", CHANGES))
    for _ in range(20):
        parts.collector.step()
    return parts


def test_1_an_environment_steps_all_games_and_resets_those_that_ended():
    config = cerl.config.load("game/ddqn", CHANGES).env
    env = cerl.envs.make(config, seeds=(0, 1), salt=7, device="cpu")
    right = torch.ones(2, 4, dtype=torch.int64)  # [S, E], an action for every environment
    steps = [env.reset(), *(env.step(right) for _ in range(6))]
    obs, reward, ended, _ = (torch.stack(field) for field in zip(*steps, strict=True))
    assert obs.shape == (7, 2, 4, 6)  # [steps, S, E, *observation]
    assert ended.any(0).all() and torch.equal(reward, ended.float())
    # The last observation of an episode is shown; the step after it brings the next episode.
    assert obs[ended][:, 5].all() and not obs[1:][ended[:-1]][:, 5].any()


def test_2_an_ensemble_is_two_leading_axes_of_every_parameter(parts):
    shapes = {name: tuple(leaf.shape) for name, leaf in parts.learner.net.named_parameters()}
    assert all(shape[:2] == (2, 3) for shape in shapes.values())  # [S, N, ...]
    assert any(shape[2:] == (6, 16) for shape in shapes.values())  # a hidden layer of every member


def test_3_the_collector_lets_members_act_and_writes_rows_into_replay(parts):
    replay = parts.replay
    # A row is one moment: observation, action, its result, and who acted.
    assert int(replay.total) == 20 and replay.obs[:, :20].any(-1).all()  # [S, rows, E, 6]
    who = replay.member[:, :20]  # the member on duty is drawn anew for every episode
    assert set(who.unique().tolist()) == {0, 1, 2}


def test_4_a_batch_is_windows_of_rows_that_follow_each_other(parts):
    window = parts.learner.sample()
    assert window.obs.shape == (2, 1, 32, 2, 6)  # [S, 1: shared by the members, B, W rows, ...]
    moved = window.obs.long().argmax(-1).diff(dim=-1)[..., 0]  # from the first row to the second
    wanted = 2 * window.action[..., 0] - 1
    at_the_wall = (window.obs[..., 0, 0]) & (wanted < 0)
    assert ((moved == wanted) | at_the_wall | (window.weight == 0)).all()


def test_5_an_update_moves_every_member_and_the_target_follows_now_and_then(parts):
    learner = parts.learner
    before = [leaf.detach().clone() for leaf in learner.leaves]
    learner.update()
    assert all((old != new).any() for old, new in zip(before, learner.leaves, strict=True))
    assert learner.metrics["loss"].shape == (2, 3)  # of every seed and member
    target = next(learner.target.parameters())
    assert torch.equal(target, before[0]) and not torch.equal(target, learner.leaves[0])
    learner.sync()
    assert torch.equal(target, learner.leaves[0])


def test_6_with_both_taking_turns_the_population_learns_and_an_evaluation_shows_it(parts):
    untrained = parts.evaluator.run(1)
    for number in range(200):
        parts.collector.step(parts.learner.update)
        if number % 10 == 0:
            parts.learner.sync()
    scores = parts.evaluator.run(1)  # number 1 again: the same episodes, played greedily
    assert untrained is not None and scores is not None, "nothing told it to stop"
    assert untrained["individual"].returns.mean() < 1
    assert scores["individual"].returns.shape == (2, 3, 4)  # [S, N, episodes]
    assert scores["individual"].returns.mean() == 1
    assert scores["vote"].returns.shape == (2, 1, 4) and scores["vote"].returns.mean() == 1


def test_7_a_run_is_all_of_it_in_a_folder_that_reports_and_policies_are_made_of(tmp_path):
    # `cerl/training.py` is the loop: collect, learn, evaluate, log and save, each when it is due.
    run = cerl.train("game/ddqn", {**CHANGES, "out": str(tmp_path)})
    assert {"config.yaml", "rows.parquet", "finished"} <= {file.name for file in run.iterdir()}
    table = tables.main([run], tmp_path / "report").to_pylist()
    assert [line["score"] for line in table] == ["individual", "vote"]
    assert (tmp_path / "report" / "curves.png").is_file()
    action = cerl.load(run, policy="vote").act([True, False, False, False, False, False])
    assert action in (0, 1)
