"""Asterix: dodge enemies and collect gold (reward 1) that cross eight rows from either side.

The entity in slot i is always in row i + 1, so at most one entity is in the player's row. With
ramping, entities appear and move faster as an episode goes on. Quirk of the original: it draws side
and kind of a new entity even if no slot is free.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHANNELS = 4  # player, enemy, trail, gold
MINIMAL = (0, 1, 2, 3, 4)
DRAWS = 3  # side, kind, slot
RESET_DRAWS = 0

_SLOTS = 8
_SPAWN = 10  # steps between spawns at the start
_MOVE = 5  # steps between moves of the entities at the start
_RAMP = 100  # steps between rises of the difficulty


class State(NamedTuple):
    row: Tensor  # [G] int32, of the player, 1 to 8
    column: Tensor  # [G] int32, of the player
    spawn_wait: Tensor  # [G] int32, steps until something appears
    spawn_period: Tensor  # [G] int32, steps between spawns
    move_wait: Tensor  # [G] int32, steps until the entities move
    move_period: Tensor  # [G] int32, steps between moves
    ramp_wait: Tensor  # [G] int32, steps until the difficulty rises
    ramps: Tensor  # [G] int32, how often the difficulty rose
    present: Tensor  # [G, 8] bool, the slot holds an entity, in row slot + 1
    at: Tensor  # [G, 8] int32, its column
    right: Tensor  # [G, 8] bool, it moves to the right
    gold: Tensor  # [G, 8] bool, it is gold, else an enemy


def reset(u: Tensor) -> State:
    """The player in the middle of an empty board. Args: `u` is unused."""
    games, device = u.shape[0], u.device
    full = [5, 5, _SPAWN, _SPAWN, _MOVE, _MOVE, _RAMP, 0]
    scalars = [torch.full((games,), value, dtype=torch.int32, device=device) for value in full]
    empty = torch.zeros(games, _SLOTS, dtype=torch.bool, device=device)
    return State(*scalars, present=empty, at=empty.int(), right=empty, gold=empty)


def step(state: State, action: Tensor, u: Tensor, *, ramping: bool) -> tuple[State, Tensor, Tensor]:
    """Spawns, moves the player, then the entities, then raises the difficulty.

    Args:    u [G, 3] decides the side of a new entity, its kind (a third are gold), and which of
             the free slots it takes; ramping, the difficulty rises.
    """
    slot = torch.arange(_SLOTS, dtype=torch.int32, device=u.device)
    free = ~state.present
    before = free[:, None, :] & (slot[:, None] > slot)  # [G, 8, 8], free slots before each slot
    count = free.sum(1, dtype=torch.int32)
    pick = (u[:, 2] * count).to(torch.int32)
    due = state.spawn_wait == 0
    chosen = free & (before.sum(2, dtype=torch.int32) == pick[:, None]) & due[:, None]
    from_left, is_gold = u[:, :1] < 0.5, u[:, 1:2] < 1 / 3
    present = state.present | chosen
    at = torch.where(chosen, torch.where(from_left, 0, 9).to(torch.int32), state.at)
    right = torch.where(chosen, from_left, state.right)
    gold = torch.where(chosen, is_gold, state.gold)
    spawn_wait = torch.where(due, state.spawn_period, state.spawn_wait)

    column = (state.column + (action == 3).int() - (action == 1).int()).clamp(0, 9)
    row = (state.row + (action == 4).int() - (action == 2).int()).clamp(1, 8)
    here = present & (slot == row[:, None] - 1)
    met = here & (at == column[:, None])
    moves = state.move_wait == 0
    at = torch.where(moves[:, None], at + torch.where(right, 1, -1).to(torch.int32), at)
    met = met | (here & (at == column[:, None]))
    present = present & ~(met & gold) & (at >= 0) & (at <= 9)
    reward, terminal = (met & gold).any(1), (met & ~gold).any(1)
    move_wait = torch.where(moves, state.move_period, state.move_wait)

    spawn_period, move_period = state.spawn_period, state.move_period
    ramp_wait, ramps = state.ramp_wait, state.ramps
    if ramping:
        harder = (spawn_period > 1) | (move_period > 1)
        rise = harder & (ramp_wait < 0)
        move_period = move_period - (rise & (move_period > 1) & (ramps % 2 == 1)).int()
        spawn_period = spawn_period - (rise & (spawn_period > 1)).int()
        ramps = ramps + rise.int()
        ramp_wait = torch.where(rise, _RAMP, ramp_wait - harder.int())
    played = State(
        row=row,
        column=column,
        spawn_wait=spawn_wait - 1,
        spawn_period=spawn_period,
        move_wait=move_wait - 1,
        move_period=move_period,
        ramp_wait=ramp_wait,
        ramps=ramps,
        present=present,
        at=at,
        right=right,
        gold=gold,
    )
    return played, reward.float(), terminal


def observe(state: State) -> Tensor:
    """The board, [G, 4, 10, 10] bool."""
    ten = torch.arange(10, dtype=torch.int32, device=state.row.device)
    # In each channel, at most one cell of a row is set: its column, or -1 for none.
    player = torch.where(ten == state.row[:, None], state.column[:, None], -1)  # [G, 10]
    back = torch.where(state.right, state.at - 1, state.at + 1)
    kinds = [state.present & ~state.gold, state.present, state.present & state.gold]
    places = [state.at, back, state.at]
    slots = [torch.where(kind, at, -1) for kind, at in zip(kinds, places, strict=True)]
    shown = torch.stack([player, *(pad(slot, (1, 1), value=-1) for slot in slots)], 1)
    return shown[..., None] == ten  # [G, 4, 10, 10]
