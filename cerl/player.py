"""The Player: members that act in S x E environments, one agent step after the other.

It owns what lives between two steps: the last Step, the carry of the acting network, the member on
duty of every environment and the number of steps. The Collector and the Evaluator own a player
each; they say how a step begins (who is on duty, which noise) and what is recorded of it.
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

# What of an agent step is captured as CUDA graphs (on the CPU everything runs as it is):
#   whole         all of it as one graph: environments and what is recorded live on the device
#   both halves   a graph before and one after simulators that run on the host
#   first half    only the choice of actions: rows are recorded in the memory of the host
Capture = Literal["whole", "both halves", "first half"]


class Halves(NamedTuple):
    """An agent step as it runs, captured or not."""

    decide: Callable[[], None]  # before the environments step: members, noise, actions
    record: Callable[[], None]  # after it: what is kept of the step
    whole: Callable[[], None] | None  # both, and the environments between them; None: in parts


def capture(
    how: Capture,
    decide: Callable[[], None],
    simulate: Callable[[], None],
    record: Callable[[], None],
    *,
    device: torch.device,
) -> Halves:
    """Captures the parts of an agent step; nothing else decides what becomes a CUDA graph."""
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
    """A step that shows nothing."""
    lead = (seeds, spec.envs)
    return Step(
        torch.zeros(*lead, *spec.observation, dtype=spec.dtype, device=device),
        torch.zeros(lead, device=device),
        *(torch.zeros(lead, dtype=torch.bool, device=device) for _ in range(2)),
    )


def nothing() -> None:
    """What runs beside a step where no updates are due."""


class Player:
    """Steps S x E environments with the members on duty; `step()` is one agent step of each.

    Args of the constructor: decide, called first in every step, sets `member` and calls `act`;
    record, called last, looks at `last`, `action` and `next` and calls `advance`. Both run on the
    device and may be captured. fuse, compile both into few kernels; evaluating, names of the
    aggregates that act (None while training).

    Before its first step a player is told where the environments are: `begin` or `restart`.

    `lost` is True from the moment when simulators on the host failed in a step, see `step`.
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
        # Where simulators on the host read the actions, and when these have come there.
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
        """One agent step of every environment, and `learn`, which makes the updates then due.

        Updates run after environments of the device. Simulators on the host they run beside, on
        the GPU, so their batches lack the row that is being made.

        Whatever simulators on the host raise is passed on. Some of them may have taken the step
        and others not, and its updates are made; so the step counts, as one that lost its
        simulators: `lost` is then True, and a state that is saved now goes on with new episodes
        everywhere (`load_state_dict`). Going on without loading it is not possible.
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
        """Steps environments of the device."""
        self.next.copy_(self.env.step(self.action))

    def act(self, noise: Noise) -> Decision:
        """Takes the actions of the members on duty; the carry moves on."""
        decision = self.agent.act(
            self.net, self.seen(), self.carry, noise=noise, evaluating=self.evaluating
        )
        self.action.copy_(decision.action)
        return decision

    def seen(self) -> ActInput:
        """What the members on duty see now."""
        previous = Previous(self.stored(), self.clipped(self.last.reward))
        return ActInput(self.last.obs, self.start, previous, self.member)

    def stored(self) -> Tensor:
        """The last actions as replay stores them: a NaN counts as 0, so that a member that diverged
        spoils no batch of the others."""
        action = self.action
        return action.nan_to_num(0.0, 0.0, 0.0) if self.env.spec.continuous else action

    def clipped(self, reward: Tensor) -> Tensor:
        """Rewards as replay stores them."""
        clip = self.reward_clip
        return reward.clamp(-clip, clip) if clip else reward

    def real(self) -> Tensor:
        """Where the last step did not end its episode, [S, E] bool: elsewhere the action is ignored
        and the next step is the reset."""
        return ~(self.last.terminated | self.last.truncated)

    def advance(self, real: Tensor) -> None:
        """Ends a step: `next` becomes `last`. Args: real, as `real()` gave it for this step."""
        self.start.copy_(~real)
        self.last.copy_(self.next)
        self.steps += 1

    def restart(self, number: int, *, steps: int) -> None:
        """New episodes everywhere, the same ones for a number; nothing before them is known.

        Args: steps, what `steps` counts on from.
        """
        for tensor in (*self.carry, self.action, self.member):
            tensor.zero_()
        self.start.fill_(True)
        self.steps.fill_(steps)
        self.last.copy_(self.env.restart(number))

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs; simulators that failed in a step are left out."""
        return {
            "last": list(self.last),
            "carry": list(self.carry),
            "lost": self.lost,
            **{name: getattr(self, name) for name in ("action", "start", "member", "steps")},
            "env": {} if self.lost else self.env.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place.

        Returns: None if the environments go on exactly, else the first step of the new episodes
                 that they began, to be handed to `begin`.
        """
        for name in ("action", "start", "member", "steps"):
            put(getattr(self, name), state[name], what=f"collector.{name}")
        for name in ("last", "carry"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                put(mine, saved, what=f"collector.{name}")
        self.lost = False
        if state["lost"]:
            # Simulators that stopped in the middle of a step are no state to go on from. Steps
            # only grow, so these seeds of the simulators are new.
            return self.env.restart(int(self.steps))
        return self.env.load_state_dict(state["env"])

    def begin(self, first: Step) -> None:
        """Goes on with new episodes everywhere, whose first step this is."""
        self.last.copy_(first)
        self.start.fill_(True)
