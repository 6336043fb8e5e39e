"""Gives the state of a run to other members: fewer of them, others in their places, or copies.

Which axes of a tensor are members is found out by asking: the state of the same run with one member
more has other sizes exactly there. The first such axis counts members, the second, as of CERL's
heads, counts the members that a head learns from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cerl import draw, envs
from cerl.config import Config
from cerl.data import EnvSpec
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.state import match
from cerl.wiring import make_agent

META = torch.device("meta")  # tensors without memory


def sizes(config: Config, spec: EnvSpec, *, members: int) -> dict[str, Any]:
    """The learner's state, and the carry of acting, of a config with so many members, as tensors
    without memory."""
    ensemble = config.ensemble.model_copy(update={"members": members, "frozen": ()})
    config = config.model_copy(update={"ensemble": ensemble})
    keys = draw.seed_keys(config.seeds, device=META)
    with META:
        agent = make_agent(config, spec, META)
        net = agent.build(keys=keys)
        replay = Replay(spec, keys=keys, capacity=2 * spec.envs, device=META)
        learner = Learner(config, agent, net, replay, keys=keys)
        carry = net.carry(envs=spec.envs, evaluating=False)
    return {"learner": learner.state_dict(), "carry": list(carry)}


def spec_of(config: Config) -> EnvSpec:
    """The spec of a run's environments, of which one is made and closed again."""
    one = config.env.model_copy(update={"envs": 1})
    env = envs.make(one, seeds=config.seeds[:1], salt=0, device="cpu")
    try:
        return env.spec._replace(envs=config.env.envs)
    finally:
        env.close()


def moved(state: dict[str, Any], parent: Config, picked: Sequence[int]) -> dict[str, Any]:
    """The state of a run with other members; parts that it does not change are the same objects.

    Args:    state of a checkpoint of the run; parent, the config of the run; picked, for each new
             member the one that it begins as.
    Raises:  CheckpointError if the state is not one of this run.
    """
    count = parent.ensemble.members
    if tuple(picked) == tuple(range(count)):
        return state
    spec = spec_of(parent)
    now, more = (sizes(parent, spec, members=n) for n in (count, count + 1))
    collector = dict(state["collector"])
    match(now["learner"], state["learner"], "checkpoint.learner")
    match(now["carry"], collector["carry"], "checkpoint.collector.carry")
    pick = _Pick(len(parent.seeds), count, tuple(picked))
    held = zip(collector["carry"], now["carry"], more["carry"], strict=True)
    collector["carry"] = [pick.carry(*tensors) for tensors in held]
    # Episodes that no row tells yet were played by one member, not by each of its copies.
    first = [list(picked).index(k) == place for place, k in enumerate(picked)]
    finished = collector["finished"][:, list(picked)]  # [S, N, EPISODES]
    collector["finished"] = finished * torch.tensor(first).view(1, -1, 1)
    collector["member"] = places(collector["member"], picked, count=count, gone=0)
    learner = pick.tree(state["learner"], now["learner"], more["learner"])
    return {**state, "collector": collector, "learner": learner}


def places(member: Tensor, picked: Sequence[int], *, count: int, gone: int) -> Tensor:
    """The new numbers of members; of several copies that of the first.

    Args: member, numbers in [0, count), or -1 for nobody; gone, the number for members that are not
          among `picked`, and for nobody.
    """
    # The last entry is that of -1.
    table = [*(picked.index(k) if k in picked else gone for k in range(count)), gone]
    return torch.tensor(table, dtype=member.dtype)[member.long()]


class _Pick:
    """Chooses members of tensors. Args: seeds, S; count, N of the run; picked, as in `moved`."""

    def __init__(self, seeds: int, count: int, picked: tuple[int, ...]) -> None:
        self.seeds, self.count = seeds, count
        self.index = torch.tensor(picked)
        # Head b of new member a learns from new member a + b. In the run, the head of its member
        # that learns from that one's is as many places away.
        a = torch.arange(len(picked))
        other = self.index[(a.view(-1, 1) + a) % len(picked)]
        self.head = (other - self.index.view(-1, 1)) % count  # [K, K]

    def tree(self, saved: Any, now: Any, more: Any) -> Any:
        """A tree of tensors; `now` and `more` are the same tree for N and N + 1 members."""
        if isinstance(saved, dict):
            return type(saved)((k, self.tree(v, now[k], more[k])) for k, v in saved.items())
        if isinstance(saved, list | tuple):
            parts = zip(saved, now, more, strict=True)
            return type(saved)(self.tree(*part) for part in parts)
        return self.tensor(saved, now, more) if isinstance(saved, Tensor) else saved

    def tensor(self, saved: Tensor, now: Tensor, more: Tensor) -> Tensor:
        """A tensor [S, N, ...], perhaps with an axis of heads."""
        own = [k for k in range(now.dim()) if now.shape[k] != more.shape[k]]
        if not own:
            return saved
        found = saved.index_select(own[0], self.index)
        for axis in own[1:]:
            shape = [1] * found.dim()
            shape[own[0]], shape[axis] = self.head.shape
            found = found.take_along_dim(self.head.view(shape), axis)
        return found.contiguous()

    def carry(self, saved: Tensor, now: Tensor, more: Tensor) -> Tensor:
        """A tensor of the carry, whose first axis is S x N x E where every member has a stream."""
        if more.shape[0] == now.shape[0]:  # only the acting member has a stream
            return saved
        streams = saved.unflatten(0, (self.seeds, self.count, -1))  # [S, N, E, ...]
        return streams.index_select(1, self.index).flatten(0, 2)
