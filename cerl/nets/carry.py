"""What networks remember while acting: made, measured, moved on and recomputed.

While training an environment has one stream, that of the member on duty, which begins anew where
an episode (and so another member's duty) begins. Evaluations, aggregates, and members that change
at every step need the streams of all members. A network says which trunks act by
`trunks(evaluating)`; their carries lie one after the other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cerl.config import Config
from cerl.data import Carry, EnvSpec, Previous, Window
from cerl.nets.frames import Encoder
from cerl.nets.tokens import tokens_of
from cerl.nets.trunk import Trunk


def single(config: Config, *, evaluating: bool) -> bool:
    """Whether an environment has one stream, that of the member on duty, where members differ."""
    e = config.ensemble
    return not evaluating and e.switch == "episode" and e.members > 1 and not e.shared_layers


def _streams(config: Config, *, evaluating: bool) -> int:
    one = single(config, evaluating=evaluating) or config.ensemble.shared_layers > 0
    return 1 if one else config.ensemble.members


def new(
    config: Config, net: Any, spec: EnvSpec, *, seeds: int, envs: int, evaluating: bool
) -> Carry:
    """What is remembered before the first step, on the device of the network."""
    device = next(net.parameters()).device
    if isinstance(net.encoder, Encoder):
        return net.encoder.carry(seeds, envs, dtype=spec.dtype, device=device)
    sizes = {"seeds": seeds, "members": _streams(config, evaluating=evaluating), "envs": envs}
    trunks: list[Trunk] = net.trunks(evaluating)
    return tuple(part for trunk in trunks for part in trunk.carry(**sizes, device=device))


def step(
    config: Config,
    net: Any,
    obs: Tensor,
    start: Tensor,
    carry: Carry,
    member: Tensor,
    *,
    previous: Previous | None,
    evaluating: bool,
) -> list[Tensor]:
    """What the feed-forward parts see of one new observation; the carry moves on in place.

    Args:    obs [S, E, *observation]; start [S, E] bool; member [S, E] on duty; previous, which
             networks without memory do without.
    Returns: for every trunk [S, 1, E, D], or [S, N, E, D] of all members' streams; without memory
             [S, 1, E, ...] once.
    """
    if isinstance(net.encoder, Encoder):
        return [net.encoder.step(obs, start, carry)]
    assert previous is not None, "sequence networks are told what came before"
    stream = member if single(config, evaluating=evaluating) else None
    row = net.encoder.step(obs, start, previous)
    trunks: list[Trunk] = net.trunks(evaluating)
    return [
        trunk.step(_own(tokens_of(trunk, *row), stream), start, part, member=stream)
        for trunk, part in zip(trunks, _parts(trunks, carry), strict=True)
    ]


@torch.no_grad()
def refill(
    config: Config,
    net: Any,
    window: Window,
    carry: Carry,
    member: Tensor,
    *,
    evaluating: bool = False,
) -> None:
    """Recomputes a carry in place, with the parameters of now.

    Args: window [S, 1, E, W], the last rows that were acted on; carry, or () to read them and
          write nothing; member [S, E] on duty.
    """
    stream = member if single(config, evaluating=evaluating) else None
    start = F.pad(~window.real[..., :-1], (1, 0), value=False)
    whole = net.encoder.inputs(window, start, slice(0, 1))
    trunks: list[Trunk] = net.trunks(evaluating)
    for trunk, part in zip(trunks, _parts(trunks, carry), strict=True):
        tokens = _own(tokens_of(trunk, whole.obs, whole.extra), stream)
        trunk.refill(tokens, start, part, member=stream)


def _parts(trunks: list[Trunk], carry: Carry) -> list[Carry]:
    """The carry of every trunk; all are alike."""
    each = len(carry) // max(len(trunks), 1)
    return [carry[k * each : (k + 1) * each] for k in range(len(trunks))]


def _own(tokens: Tensor, member: Tensor | None) -> Tensor:
    """Tokens [S, 1 or N, E, ...] as the members on duty [S, E] see them, [S, 1, E, ...]."""
    if member is None or tokens.shape[1] == 1:
        return tokens
    index = member.view(member.shape[0], 1, -1, *([1] * (tokens.dim() - 3)))
    return tokens.gather(1, index.expand(-1, 1, -1, *tokens.shape[3:]))
