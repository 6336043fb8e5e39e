"""The agents keep the protocol of `cerl.agent`, by which alone other code knows them."""

from pathlib import Path

import pytest
import torch

import cerl
from cerl import wiring
from cerl.bench import runs
from cerl.config import load
from cerl.data import EnvSpec

FLAT = EnvSpec("flat", (5,), torch.float32, 3, 1, 1, True, True)
SMALL = {"seeds": (0, 1), "replay": {"capacity": 2_000, "start": 1_000, "batch": 4}}
NAMES = ("catch/cerl", "catch/tandem", "minatar/qrdqn", "point_mass/cerl", "mujoco/redq")


def test_only_wiring_imports_agents():
    folder = Path(cerl.__file__).parent
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    assert [name for name, text in texts.items() if "from cerl.agents" in text] == ["wiring.py"]


@pytest.mark.parametrize("name", NAMES)
def test_stages_move_every_parameter_and_name_every_metric(name):
    config = load(name, {**SMALL, "net": {"channels": (), "kernels": (), "strides": ()}})
    spec = FLAT._replace(continuous=config.agent.name == "sac", envs=config.env.envs)
    learner = runs.filled_learner(config, spec, torch.device("cpu"))
    moved = {id(leaf) for leaf in learner.leaves}
    assert len(moved) == len(learner.leaves)
    assert moved == {id(leaf) for leaf in learner.net.parameters()}
    given = [
        set(stage.loss(learner.net, learner.target, window, mask=None, dice=dice, prepared=None)[1])
        for window in [learner.sample()]
        for dice in [learner.agent.dice(learner.keys, learner.updates)]
        for stage in learner.stages
    ]
    assert set().union(*given) == set(learner.agent.metrics)
    assert sum(map(len, given)) == len(learner.agent.metrics)
    followed = set(map(id, learner.agent.followed(learner.net).parameters()))
    assert followed <= moved and len(followed) == len(list(learner.target.parameters()))
    assert not any(leaf.requires_grad for leaf in learner.target.parameters())


@pytest.mark.parametrize("continuous", [False, True])
def test_agents_refuse_environments_of_the_other_kind(continuous):
    config = load("catch/ddqn" if continuous else "point_mass/sac")
    with pytest.raises(ValueError, match="agent.name: .* chooses .* actions, but flat takes"):
        wiring.make_agent(config, FLAT._replace(continuous=continuous), torch.device("cpu"))
