"""Catch is compared with a loop over single games, and with a board worked out by hand."""

import pytest
import torch

from cerl import draw
from cerl.config import CatchEnv
from cerl.envs import make_resident


def build(*, seeds=(0,), salt=0, fuse=None, **options):
    return make_resident(
        CatchEnv.model_validate(options), seeds=seeds, salt=salt, device="cpu", fuse=fuse
    )


@pytest.mark.parametrize(("rows", "columns", "sticky"), [(10, 5, 0.0), (4, 7, 0.3), (2, 2, 0.0)])
def test_catch_equals_a_loop_over_single_games(rows, columns, sticky):
    env = build(seeds=(2, 5), envs=3, rows=rows, columns=columns, sticky=sticky)
    keys = draw.seed_keys((2, 5))
    generator = torch.Generator().manual_seed(0)
    games = [[{"last": 0, "over": True} for _ in range(3)] for _ in range(2)]
    catches = drops = 0
    for t in range(120):
        action = torch.randint(0, 3, (2, 3), generator=generator)
        u = draw.uniform(keys, draw.ENV, t, (3, 2))
        step = env.reset() if t == 0 else env.step(action)
        for s in range(2):
            for e in range(3):
                game, reward = games[s][e], 0.0
                if game["over"]:
                    ball = int(float(u[s, e, 1]) * columns)
                    game.update(row=0, ball=ball, paddle=columns // 2, over=False)
                else:
                    if float(u[s, e, 0]) >= sticky:
                        game["last"] = int(action[s, e])
                    game["paddle"] = min(columns - 1, max(0, game["paddle"] + game["last"] - 1))
                    game["row"] += 1
                    if game["row"] == rows - 1:
                        game["over"] = True
                        reward = 1.0 if game["ball"] == game["paddle"] else -1.0
                board = torch.zeros(rows, columns, dtype=torch.bool)
                board[game["row"], game["ball"]] = board[rows - 1, game["paddle"]] = True
                assert torch.equal(step.obs[s, e, 0], board)
                assert step.reward[s, e].item() == reward
                assert step.terminated[s, e].item() == game["over"]
                catches, drops = catches + (reward > 0), drops + (reward < 0)
        assert not step.truncated.any()
    assert catches > 3 and drops > 3


def test_a_paddle_that_follows_the_ball_always_wins():
    env = build(seeds=(0, 1, 2, 3), envs=50)
    step = env.reset()
    starts = step.obs[:, :, 0, 0].float().argmax(-1)
    for t in range(9):
        ball = starts
        paddle = step.obs[:, :, 0, 9].float().argmax(-1)
        step = env.step(1 + torch.sign(ball - paddle))
        assert step.terminated.all().item() == (t == 8)
    assert (step.reward == 1).all()
    # 200 balls over five columns: each at 40 +- 4 standard deviations.
    assert (torch.bincount(starts.flatten(), minlength=5) - 40).abs().max() < 4 * 5.7


def test_a_ball_by_hand():
    env = build(rows=3, columns=3, envs=1)
    step = env.reset()
    assert step.obs.shape == (1, 1, 1, 3, 3) and step.obs[0, 0, 0, 2].tolist() == [
        False,
        True,
        False,
    ]
    ball = int(step.obs[0, 0, 0, 0].nonzero())
    left = torch.zeros(1, 1, dtype=torch.int64)
    step = env.step(left)
    assert step.obs[0, 0, 0, 2].tolist() == [True, False, False] and step.reward.item() == 0
    step = env.step(left)
    assert step.terminated.item() and step.reward.item() == (1 if ball == 0 else -1)
    step = env.step(left)
    assert not step.terminated.item() and step.reward.item() == 0
    assert step.obs[0, 0, 0, 2].tolist() == [False, True, False]


@pytest.mark.slow
def test_the_step_is_one_graph_and_equals_eager():
    one, two = build(seeds=(0, 1), envs=3), build(seeds=(0, 1), envs=3)
    traced = torch.compile(two._advance_once, fullgraph=True, dynamic=False, backend="aot_eager")
    one.reset()
    two.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        action = torch.randint(0, 3, (2, 3), generator=generator)
        for a, b in zip(one.step(action), traced(action), strict=True):
            assert torch.equal(a, b)
