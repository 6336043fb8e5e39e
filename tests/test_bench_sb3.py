"""`cerl bench sb3`: rows of both programs, turns, and the library that is missing."""

import sys

import pytest
import torch

from cerl.bench import sb3
from cerl.bench.sb3 import Pair

# Stands for Stable-Baselines3: an update waits, so that it takes some CPU time.
LIBRARY = """
class Model:
    def __init__(self, policy, env, *, buffer_size, learning_starts, device, seed, verbose,
                 policy_kwargs, batch_size, **others):
        assert policy == "MlpPolicy" and device == "cpu"
        self.batch_size = batch_size
    def learn(self, steps, **others):
        self.train(steps, self.batch_size)
    def train(self, gradient_steps, batch_size):
        for _ in range(gradient_steps):
            sum(range(20_000))
class SAC(Model): pass
class DQN(Model): pass
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with a package of the library's name, which is forgotten after the test."""
    monkeypatch.delitem(sys.modules, "stable_baselines3", raising=False)
    (tmp_path / "stable_baselines3.py").write_text(LIBRARY)
    yield tmp_path
    sys.modules.pop("stable_baselines3", None)


def test_a_row_for_each_program_and_work(library):
    torch.set_num_threads(2)
    before = list(sys.path)
    try:
        rows = sb3.sb3(agents=("dqn",), rounds=1, seconds=0.01, path=library)
        assert torch.get_num_threads() == 2 and sys.path == before
    finally:
        torch.set_num_threads(1)
    assert [(row["work"], row["program"]) for row in rows] == [
        (work, program) for work in ("update", "loop") for program in ("cerl", "stable-baselines3")
    ]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert theirs["ratio"] == 1.0
        assert ours["ratio"] == pytest.approx(theirs["microseconds"] / ours["microseconds"])


def test_programs_take_turns_and_change_their_order():
    turns = []
    pair = Pair(lambda n: turns.append(("ours", n)), lambda n: turns.append(("theirs", n)))
    ours, theirs = sb3.by_turns(pair, rounds=3, seconds=1e-9)
    assert len(ours) == len(theirs) == 3
    timed = [name for name, count in turns if count == 1]
    assert timed == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]


def test_without_the_library_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match="pip install --no-deps --target sb3"):
        sb3.sb3(path=tmp_path)
    with pytest.raises(ValueError, match="--rounds from 1 on"):
        sb3.sb3(rounds=0)


@pytest.mark.parametrize("name", sb3.TASKS)
def test_both_programs_get_the_same_sizes(name):
    task = sb3.TASKS[name]
    assert list(task.changes["net.hidden"]) == task.options["policy_kwargs"]["net_arch"]
    assert task.changes["replay.batch"] == task.options["batch_size"]
