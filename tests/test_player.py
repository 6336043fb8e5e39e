"""The Player: which parts of an agent step are captured, and in which order they run."""

import pytest
import torch
from scripted import Scripted

from cerl import draw, player
from cerl.agents.dqn import DQN
from cerl.agents.values import expected_value
from cerl.collect import Collector
from cerl.config import Config, DqnConfig, EnsembleConfig, NetConfig, ReplayConfig
from cerl.evaluate import Evaluator, evaluation_keys, lanes
from cerl.replay import Replay

CPU = torch.device("cpu")


def scripted(cfg: Config, envs: int, *, resident: bool) -> Scripted:
    kind = {"length": lambda *_: 3, "reward": lambda *_: 1.0, "resident": resident}
    return Scripted(seeds=cfg.seeds, envs=envs, **kind)


def config() -> Config:
    return Config(
        seeds=(0, 1),
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(members=2),
        replay=ReplayConfig(capacity=200, start=10),
    )


def collector(*, resident: bool, placement: str) -> Collector:
    cfg = config()
    env, keys = scripted(cfg, 2, resident=resident), draw.seed_keys(cfg.seeds)
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    replay = Replay(env.spec, keys=keys, capacity=200, device=CPU)
    replay.placement = placement
    return Collector(cfg, env, agent, agent.build(keys=keys), replay, keys=keys)


def evaluator(*, resident: bool) -> Evaluator:
    cfg = config()
    env = scripted(cfg, lanes(cfg), resident=resident)
    agent = DQN(cfg, env.spec, kind=expected_value(DqnConfig()), device=CPU)
    net = agent.build(keys=draw.seed_keys(cfg.seeds))
    return Evaluator(cfg, env, agent, net, keys=evaluation_keys(cfg.seeds, CPU))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ran inside each captured part, one list a call."""
    ran: list[list[str]] = []
    inside: list[list[str]] = []

    def captured(step, device):
        def run() -> None:
            inside.append([])
            step()
            ran.append(inside.pop())

        return run

    def traced(owner, name, word) -> None:
        plain = getattr(owner, name)

        def spied(*arguments):
            if inside:
                inside[-1].append(word)
            else:
                ran.append([f"plain {word}"])
            return plain(*arguments)

        monkeypatch.setattr(owner, name, spied)

    monkeypatch.setattr(player, "captured", captured)
    for owner in (Collector, Evaluator):
        traced(owner, "decide", "decide")
        traced(owner, "record", "record")
    traced(Scripted, "step", "step")
    return ran


HALVES = [["decide"], ["plain step"], ["record"]]


@pytest.mark.parametrize(
    ("resident", "placement", "want"),
    [
        (True, "device", [["decide", "step", "record"]]),
        (False, "device", HALVES),
        (True, "host", [["decide"], ["plain step"], ["plain record"]]),
        (False, "host", [["decide"], ["plain step"], ["plain record"]]),
    ],
)
def test_a_step_of_training_is_as_few_graphs_as_its_places_allow(graphs, resident, placement, want):
    ours = collector(resident=resident, placement=placement)
    graphs.clear()
    ours.step()
    assert graphs == want


@pytest.mark.parametrize(
    ("resident", "want"), [(True, [["decide", "step", "record"]]), (False, HALVES)]
)
def test_a_step_of_an_evaluation_is_as_few_graphs_as_its_places_allow(graphs, resident, want):
    ours = evaluator(resident=resident)
    ours.player.restart(0, steps=0)
    graphs.clear()
    ours.player.step()
    assert graphs == want


@pytest.mark.parametrize(
    ("resident", "placement"), [(True, "host"), (True, "device"), (False, "device")]
)
def test_updates_come_after_environments_of_the_device_and_before_simulators(
    graphs, resident, placement
):
    ours = collector(resident=resident, placement=placement)
    graphs.clear()
    ours.step(lambda: graphs.append(["learn"]))
    words = [word.removeprefix("plain ") for part in graphs for word in part]
    order = (
        ["decide", "step", "record", "learn"] if resident else ["decide", "learn", "step", "record"]
    )
    assert words == order


def test_what_acting_sees_of_the_past_is_what_replay_stores():
    ours = collector(resident=True, placement="device")
    for _ in range(7):
        ours.step()
        seen, ring, row = ours.player.seen(), ours.replay, int(ours.replay.total) - 1
        assert torch.equal(seen.previous.action, ring.action[:, row])
        assert torch.equal(seen.previous.reward, ring.reward[:, row])
        assert torch.equal(seen.start, ~ring.real[:, row])
