"""Quantile values: the value of an action, and the loss of a distribution worked out by hand."""

import pytest
import torch

from cerl import draw
from cerl.agents.dqn import DQN
from cerl.agents.values import quantile_value
from cerl.config import Config, EnsembleConfig, NetConfig, QuantileConfig, of_kind
from cerl.data import ActInput, EnvSpec, Previous
from cerl.explore import Noise


def test_a_value_is_the_mean_of_its_quantiles():
    kind = quantile_value(QuantileConfig(quantiles=4))
    assert kind.atoms == 4
    quantiles = torch.tensor([[[0.0, 1.0, 2.0, 5.0], [3.0, 3.0, 3.0, 3.0]]])
    assert kind.mean(quantiles).tolist() == [[2.0, 3.0]]


def test_the_error_is_the_quantile_huber_loss_with_kappa():
    # tau 1/4 and 3/4, target samples 4 and 0: u = 3, -1 for theta 1; u = 2, -2 for theta 2
    theta, target = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0])

    def huber(u, kappa):
        return 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)

    for kappa in (1.0, 2.5):
        kind = quantile_value(QuantileConfig(quantiles=2, huber_delta=kappa))
        first = (0.25 * huber(3, kappa) + 0.75 * huber(1, kappa)) / 2
        second = (0.75 * huber(2, kappa) + 0.25 * huber(2, kappa)) / 2
        assert float(kind.error(theta, target)) == pytest.approx(first + second)


def test_acting_is_greedy_in_the_mean_of_the_quantiles():
    cfg = Config(
        agent=QuantileConfig(quantiles=3),
        net=NetConfig(hidden=()),
        ensemble=EnsembleConfig(members=2),
    )
    spec = EnvSpec("flat", (1,), torch.float32, 2, 2, 1, True, True)
    agent = DQN(cfg, spec, kind=quantile_value(of_kind(cfg.agent, QuantileConfig)), device="cpu")
    net = agent.build(keys=draw.seed_keys([0]))
    # the largest quantile lies with the other action than the largest mean
    table = torch.tensor([[[9.0, 0.0, 0.0], [4.0, 4.0, 4.0]], [[5.0, 5.0, 5.0], [8.0, 0.0, 0.0]]])
    with torch.no_grad():
        net.final.weight.zero_()
        net.final.bias.copy_(table.view(1, 2, 1, 6))
    still = torch.zeros(1, 2)
    noise = Noise(still.bool(), still.long(), torch.zeros(1, 2, 0), still, still)
    member, start = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    seen = ActInput(torch.ones(1, 2, 1), start, Previous(member, still), member)
    carry = net.carry(envs=2, evaluating=False)
    with torch.no_grad():
        decision = agent.act(net, seen, carry, noise=noise)
    assert decision.action.tolist() == [[1, 0]]
    assert decision.value.tolist() == [[4.0, 5.0]]


def test_a_single_quantile_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        QuantileConfig(quantiles=1)
