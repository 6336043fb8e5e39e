"""T-mazes on the device: compared with a slow loop over a drawn map; returns of known policies."""

import pytest
import torch

from cerl.config import MemoryEnv
from cerl.envs import make_resident
from cerl.envs.memory.tmaze import DOWN, LEFT, RIGHT, UP
from cerl.envs.resident import Resident

MOVES = {RIGHT: (1, 0), UP: (0, 1), LEFT: (-1, 0), DOWN: (0, -1)}


def build(name="tmaze", *, envs=8, seeds=(0,), salt=0, **options) -> Resident:
    config = MemoryEnv.model_validate({"name": name, "envs": envs, **options})
    return make_resident(config, seeds=seeds, salt=salt, device="cpu")


class Loop:
    """One maze as Ni et al. describe it: cells in a set, a walker, a clock."""

    def __init__(self, length: int, oracle: int) -> None:
        self.length, self.oracle, self.junction = length, oracle, oracle + length
        self.cells = {(x, 0) for x in range(self.junction + 1)}
        self.cells |= {(self.junction, 1), (self.junction, -1)}

    def reset(self, goal: int):
        self.place, self.goal, self.time, self.visited = (self.oracle, 0), goal, 0, False
        return self.look()

    def look(self):
        x, y = self.place
        if x == 0:
            told, self.visited = (0 if self.visited else self.goal), True
            return [0.0, float(told)]
        return [1.0, float(y)] if x == self.junction else [0.0, 0.0]

    def step(self, action: int):
        self.time += 1
        (x, y), (right, up) = self.place, MOVES[action]
        if (x + right, y + up) in self.cells:
            self.place = (x + right, y + up)
        over = self.time == self.length + 1 + 2 * self.oracle
        if over:
            reward = 1.0 if self.place[1] == self.goal else 0.0
        else:
            reward = -1 / self.length if self.place[0] < self.time - self.oracle else 0.0
        return self.look(), reward, over


@pytest.mark.parametrize("name", ["tmaze", "tmaze_active"])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_every_step_equals_the_loop(name, length):
    env = build(name, envs=40, length=length)
    mazes = [Loop(length, oracle=int(name == "tmaze_active")) for _ in range(40)]
    generator = torch.Generator().manual_seed(length)

    def walk() -> torch.Tensor:
        """Nearly always to the right, anywhere at the junction: else few would ever see it."""
        astray = torch.rand(40, generator=generator) < 0.5 / length
        there = torch.tensor([maze.place[0] == maze.junction for maze in mazes])
        anywhere = torch.randint(0, 4, (40,), generator=generator)
        return torch.where(astray | there, anywhere, RIGHT)

    def goals():
        return [-1 if u < 0.5 else 1 for u in env.draws()[0, :, 1].tolist()]

    drawn = goals()
    obs = env.reset().obs[0].tolist()
    assert obs == [maze.reset(goal) for maze, goal in zip(mazes, drawn, strict=True)]
    over, steps, won, turned = [False] * 40, 0, 0, 0
    for _ in range(150):
        action = walk()
        drawn = goals()
        step = env.step(action[None])
        assert not step.truncated.any()
        for g, maze in enumerate(mazes):
            if over[g]:
                want = (maze.reset(drawn[g]), 0.0, False)
            else:
                want = maze.step(int(action[g]))
                steps += 1
            got = (step.obs[0, g].tolist(), float(step.reward[0, g]), bool(step.terminated[0, g]))
            assert got[0] == want[0] and got[2] == want[2]
            assert got[1] == pytest.approx(want[1], abs=1e-7)
            over[g] = want[2]
            won += want[1] == 1.0
            turned += abs(maze.place[1])
    assert steps >= 2000 and turned > 20 and won > 10


@pytest.mark.parametrize(("name", "oracle"), [("tmaze", 0), ("tmaze_active", 1)])
def test_who_remembers_the_cue_earns_1(name, oracle):
    env = build(name, envs=32, length=20)
    cue = env.reset().obs[0, :, 1].clone()
    total = torch.zeros(32)
    for t in range(20 + 2 * oracle):
        step = env.step(torch.full((1, 32), LEFT if t < oracle else RIGHT))
        total += step.reward[0]
        cue = torch.where(step.obs[0, :, 0] == 0, cue + step.obs[0, :, 1], cue)
        assert not step.terminated.any()
    assert bool((step.obs[0, :, 0] == 1).all()) and set(cue.tolist()) == {-1.0, 1.0}
    step = env.step(torch.where(cue > 0, UP, DOWN)[None])
    total += step.reward[0]
    assert bool(step.terminated.all()) and total.tolist() == [1.0] * 32


def test_who_sees_only_the_present_is_at_chance():
    """From the second step on, observations do not depend on the cue: whatever a policy without
    memory does there, it does it for both goals."""
    env = build(envs=2000, length=5)
    cue = env.reset().obs[0, :, 1].clone()
    for _ in range(5):
        step = env.step(torch.full((1, 2000), RIGHT))
        # The same for every game: nothing left to tell the cues apart.
        assert (step.obs == step.obs[:, :1]).all()
    assert step.obs[0, 0].tolist() == [1.0, 0.0]
    for action, goal in ((UP, 1), (DOWN, -1)):
        two = build(envs=2000, length=5)
        two.load_state_dict(env.state_dict())
        last = two.step(torch.full((1, 2000), action))
        assert torch.equal(last.reward[0], (cue == goal).float())
        # 2000 coins, 4 standard deviations.
        assert float(last.reward.mean()) == pytest.approx(0.5, abs=0.045)


def test_standing_still_costs_1():
    env = build(envs=1, length=10)
    env.reset()
    rewards = [float(env.step(torch.full((1, 1), UP)).reward) for _ in range(11)]
    assert rewards == pytest.approx([-0.1] * 10 + [0.0])


def test_a_time_limit_truncates_before_the_end():
    env = build(envs=2, length=10, time_limit=4)
    env.reset()
    ends = [env.step(torch.full((1, 2), RIGHT)) for _ in range(4)]
    assert bool(ends[-1].truncated.all()) and not ends[-1].terminated.any()
    assert not any(bool(step.truncated.any()) for step in ends[:-1])


def test_every_step_of_a_maze_ends_where_it_should():
    for name, length, steps in (("tmaze", 200, 201), ("tmaze_active", 200, 203)):
        env = build(name, envs=2, length=length)
        env.reset()
        ends = [bool(env.step(torch.zeros(1, 2).long()).terminated.all()) for _ in range(steps)]
        assert ends == [False] * (steps - 1) + [True]
