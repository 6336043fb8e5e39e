"""The Player: lets members act in S x E environments, one agent step after the other.

It owns the state between two agent steps: the last Step, the carry of the network, the member on
duty in every environment and the number of steps. The Collector and the Evaluator each own a player
and give it two functions: `decide` chooses members and actions, `record` stores the result.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cerl.agent import Agent, Decision, Network
from cerl.config import Config
from cerl.data import ActInput, EnvSpec, Previous, Step
from cerl.device.precision import precision
from cerl.envs.api import VecEnv
from cerl.explore import Noise
from cerl.graph import captured, fused
from cerl.state import put

# Which parts of an agent step become CUDA graphs (on a CPU there are none):
#   whole         one graph of everything, if environments and rows are on the device
#   both halves   a graph of `decide` and one of `record`; simulators run on the host in between
#   first half    a graph of `decide` only, if `record` writes to host memory
Capture = Literal["whole", "both halves", "first half"]


class Halves(NamedTuple):
    """The functions that make up an agent step, each captured as a CUDA graph or not."""

    decide: Callable[[], None]  # before the environments step: members, noise, actions
    record: Callable[[], None]  # after the environments stepped: stores the result
    whole: Callable[[], None] | None  # decide, step and record in one; None: they run one by one


def capture(
    how: Capture,
    decide: Callable[[], None],
    simulate: Callable[[], None],
    record: Callable[[], None],
    *,
    device: torch.device,
) -> Halves:
    """Captures an agent step as `how` says. Args: simulate, steps the environments."""
    if how == "whole":

        def whole() -> None:
            decide()
            simulate()
            record()

        return Halves(decide, record, captured(whole, device))
    if how == "both halves":
        return Halves(captured(decide, device), captured(record, device), None)
    return Halves(captured(decide, device), record, None)


def blank(spec: EnvSpec, seeds: int, device: torch.device) -> Step:
    """A Step of zeros. Args: seeds, S."""
    lead = (seeds, spec.envs)
    return Step(
        torch.zeros(*lead, *spec.observation, dtype=spec.dtype, device=device),
        torch.zeros(lead, device=device),
        *(torch.zeros(lead, dtype=torch.bool, device=device) for _ in range(2)),
    )


def nothing() -> None:
    """Does nothing; the `learn` of a step without updates."""


class Player:
    """Steps S x E environments with the members on duty; `step()` is one agent step of each.

    Args of the constructor: decide, called first in every step, sets `member` and calls `act`;
    record, called last, reads `last`, `action` and `next` and calls `advance`. Both run on the
    device and may be captured. fuse, whether to compile both into few kernels; evaluating, names of
    the aggregate policies (None while training).

    Before the first step, `begin` or `restart` has to be called.

    `lost` is True once simulators on the host have failed in a step, see `step`.
    """

    def __init__(
        self,
        config: Config,
        env: VecEnv,
        agent: Agent[Any, Any, Any],
        net: Network,
        *,
        keys: Tensor,
        decide: Callable[[], None],
        record: Callable[[], None],
        how: Capture,
        fuse: bool = False,
        evaluating: Sequence[str] | None = None,
    ) -> None:
        self.env, self.agent, self.net, self.keys = env, agent, net, keys
        self.precision, self.reward_clip = config.precision, config.replay.reward_clip
        self.evaluating = evaluating
        seeds, envs, device = len(keys), env.spec.envs, keys.device
        self.last, self.next = (blank(env.spec, seeds, device) for _ in range(2))
        self.action = env.spec.action(seeds, envs, device=device)
        self.carry = net.carry(envs=envs, evaluating=evaluating is not None)
        self.start = torch.ones(seeds, envs, dtype=torch.bool, device=device)
        self.member = torch.zeros(seeds, envs, dtype=torch.int64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.lost = False
        # Simulators on the host read actions from `sent`, a pinned copy in host memory. The event
        # `arrived` tells when the copy is complete.
        self.sent, self.arrived = self.action, None
        if device.type == "cuda" and not env.spec.resident:
            self.sent = torch.empty_like(self.action, device="cpu").pin_memory()
            self.arrived = torch.cuda.Event()
        if fuse:
            decide, record = fused(decide), fused(record)

        def choose() -> None:
            with precision(self.precision, device):
                decide()
            if self.sent is not self.action:
                self.sent.copy_(self.action, non_blocking=True)

        self.halves = capture(how, choose, self._simulate, record, device=device)

    def step(self, learn: Callable[[], None] = nothing) -> None:
        """One agent step of every environment, and `learn`, which makes the updates that are due.

        With environments on the device, updates run after the step. With simulators on the host,
        updates run on the GPU while the simulators step; their batches therefore lack the newest
        row.

        An error of a simulator on the host is passed on. At that moment some simulators may have
        stepped and others not, while the updates have been made. So the step is counted, and `lost`
        becomes True: this player cannot go on, but its state can be saved. Loading that state
        starts new episodes in all environments (`load_state_dict`).
        """
        if self.halves.whole is not None:
            self.halves.whole()
            learn()
            return
        self.halves.decide()
        if self.env.spec.resident:
            self._simulate()
            self.halves.record()
            learn()
            return
        if self.arrived is not None:
            self.arrived.record()
        learn()
        if self.arrived is not None:
            self.arrived.synchronize()
        try:
            step = self.env.step(self.sent)
        except BaseException:
            self.lost = True
            self.steps += 1
            raise
        self.next.copy_(step)
        self.halves.record()

    def _simulate(self) -> None:
        """Steps environments that are on the device."""
        self.next.copy_(self.env.step(self.action))

    def act(self, noise: Noise) -> Decision:
        """Lets the members on duty choose `action`; updates the carry in place."""
        decision = self.agent.act(
            self.net, self.seen(), self.carry, noise=noise, evaluating=self.evaluating
        )
        self.action.copy_(decision.action)
        return decision

    def seen(self) -> ActInput:
        """The input from which the members on duty choose their next actions."""
        previous = Previous(self.stored(), self.clipped(self.last.reward))
        return ActInput(self.last.obs, self.start, previous, self.member)

    def stored(self) -> Tensor:
        """The last actions as replay stores them, [S, E] or [S, E, A].

        NaN actions are stored as 0, so one diverged member cannot spoil the batches of the others.
        """
        action = self.action
        return action.nan_to_num(0.0, 0.0, 0.0) if self.env.spec.continuous else action

    def clipped(self, reward: Tensor) -> Tensor:
        """Rewards [S, E] as replay stores them: clipped to +- replay.reward_clip, if it is set."""
        clip = self.reward_clip
        return reward.clamp(-clip, clip) if clip else reward

    def real(self) -> Tensor:
        """Where the last observation does not end an episode, [S, E] bool.

        Where it does, the environment ignores the action and its next step is a reset.
        """
        return ~(self.last.terminated | self.last.truncated)

    def advance(self, real: Tensor) -> None:
        """Ends a step: `next` becomes `last`. Args: real [S, E] bool, from `real()` before it."""
        self.start.copy_(~real)
        self.last.copy_(self.next)
        self.steps += 1

    def restart(self, number: int, *, steps: int) -> None:
        """Starts new episodes in all environments and clears the carry.

        Args: number, the same number starts the same episodes; steps, the new value of the step
              counter, which noise depends on.
        """
        for tensor in (*self.carry, self.action, self.member):
            tensor.zero_()
        self.start.fill_(True)
        self.steps.fill_(steps)
        self.last.copy_(self.env.restart(number))

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs; simulators that failed in a step are left out."""
        return {
            "last": list(self.last),
            "carry": list(self.carry),
            "lost": self.lost,
            **{name: getattr(self, name) for name in ("action", "start", "member", "steps")},
            "env": {} if self.lost else self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place.

        Returns: None if the environments continue exactly, else the first Step of new episodes in
                 all of them, which the caller passes to `begin`.
        """
        for name in ("action", "start", "member", "steps"):
            put(getattr(self, name), state[name], what=f"collector.{name}")
        for name in ("last", "carry"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                put(mine, saved, what=f"collector.{name}")
        self.lost = False
        if state["lost"]:
            # Simulators that failed in the middle of a step cannot be continued. The step counter
            # only grows, so restarting with it gives the simulators seeds not used before.
            return self.env.restart(int(self.steps))
        return self.env.load_state_dict(state["env"])

    def begin(self, first: Step) -> None:
        """Continues with new episodes in all environments. Args: first, their first Step."""
        self.last.copy_(first)
        self.start.fill_(True)
