"""Seaquest: hunt fish and submarines, collect divers, surface before the oxygen runs out.

The enemies of one kind in one row are stored as an integer of 60 bits (a "word"): bit
6 * column + wait is an enemy in that column that moves after `wait` more steps. Every position that
the rules allow can be stored so: the enemies of a row all swim the same way, and two enemies in one
cell always differ in their wait (the older one's is shorter), because all swim at one speed, which
changes only while new enemies appear at least 15 steps apart. Shifting a word moves all of its
enemies. A torpedo or a missile is the lowest bit of its cell. At most two divers are in the water,
since one appears every 30 steps and needs 60 to cross it. The column of a diver follows from the
time since it appeared.

Quirks of the original: surfacing with six divers leaves -1 divers on board; surfacing is safe with
any number of divers except zero; a submarine that is hit launches its missile in that step anyway.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# front, back, torpedo, trail, missile, fish, submarine, oxygen gauge, diver gauge, diver
CHANNELS = 10
MINIMAL = (0, 1, 2, 3, 4, 5)
DRAWS = 5  # enemy: side, kind, row; diver: side, row
RESET_DRAWS = 0

_OXYGEN = 200  # steps under water
_COOLDOWN = 5  # steps between torpedoes
_MISSILES = 11  # steps between missiles of a submarine
_DIVERS = 30  # steps between divers
_CROSSING = 6  # steps that a diver needs for one column
_CREW = 6  # divers that find room on board
_ENEMIES = 20  # steps between enemies at the start
_HARDEST = 19  # level at which an enemy appears on every step

_CELL = 0b111111
_FIRST = sum(1 << (6 * column) for column in range(10))  # the lowest bit of every cell
_ROW = (1 << 60) - 1
_RIGHT = 16  # a diver is stored as its row, plus this if it swims to the right; 0: no diver


class State(NamedTuple):
    x: Tensor  # [G] int64, column of the front of the player's boat
    y: Tensor  # [G] int64, its row, 0 (surface) to 8
    right: Tensor  # [G] bool, the player's boat faces right
    cooldown: Tensor  # [G] int64, steps until the next torpedo may be fired
    oxygen: Tensor  # [G] int64, steps left under water; -1 after a death by lack of it
    crew: Tensor  # [G] int64, divers on board, at most 6, may be negative
    level: Tensor  # [G] int64, times surfaced with ramping on, at most 19
    clock: Tensor  # [G] int64, step of the episode modulo 11
    spawn_wait: Tensor  # [G] int64, steps until an enemy appears
    diver_wait: Tensor  # [G] int64, steps until a diver appears
    newer: Tensor  # [G] int64, the diver that appeared last
    older: Tensor  # [G] int64, the one before
    heading: Tensor  # [G, 10] bool, enemies of this row swim to the right
    fish: Tensor  # [G, 10] int64 words
    subs: Tensor  # [G, 10] int64 words
    # The value of `clock` at which each submarine launches a missile: word k holds the k-th binary
    # digit of that value, at the submarine's bit.
    phase_0: Tensor  # [G, 10] int64 words
    phase_1: Tensor  # [G, 10] int64 words
    phase_2: Tensor  # [G, 10] int64 words
    phase_3: Tensor  # [G, 10] int64 words
    torpedoes_left: Tensor  # [G, 10] int64 words
    torpedoes_right: Tensor  # [G, 10] int64 words
    missiles_left: Tensor  # [G, 10] int64 words
    missiles_right: Tensor  # [G, 10] int64 words


def reset(u: Tensor) -> State:
    """The boat in the middle of the surface, full of oxygen, alone. Args: `u` is unused."""
    zero = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
    water = zero[:, None].expand(-1, 10)
    start = {"x": 5, "oxygen": _OXYGEN, "spawn_wait": _ENEMIES, "diver_wait": _DIVERS}
    scalars = {name: torch.full_like(zero, start.get(name, 0)) for name in State._fields[:12]}
    scalars["right"] = zero.bool()
    return State(**scalars, heading=water.bool(), **dict.fromkeys(State._fields[13:], water))


def step(state: State, action: Tensor, u: Tensor, *, ramping: bool) -> tuple[State, Tensor, Tensor]:
    """Spawns, then moves in turn: player, torpedoes, divers, submarines, missiles, fish.

    Args:    u [G, 5] decides side, kind (a third are submarines) and row of a new enemy, and side
             and row of a new diver; ramping, each time the player surfaces, enemies come more often
             and swim faster.
    """
    rows = torch.arange(10, device=u.device)
    heading, fish, subs, phases, spawn_wait = _spawn_enemy(state, u, rows)
    newer, older, diver_wait = _spawn_diver(state, u)

    fires = (action == 5) & (state.cooldown == 0)
    left, right = action == 1, action == 3
    x = (state.x + right.long() - left.long()).clamp(0, 9)
    y = (state.y + (action == 4).long() - (action == 2).long()).clamp(0, 8)
    here = rows == y[:, None]  # [G, 10]

    torpedo = torch.where(here & fires[:, None], 1 << 6 * x[:, None], 0)
    to_right = (state.torpedoes_right | torch.where(state.right[:, None], torpedo, 0)) << 6 & _ROW
    to_left = (state.torpedoes_left | torch.where(state.right[:, None], 0, torpedo)) >> 6
    flying = to_right | to_left
    fish, left_over = _strike(fish, flying)
    subs, left_over = _strike(subs, left_over)
    newer, older, crew = _board_divers(newer, older, state.crew, diver_wait, x, y)

    speed = _speed(state.level)[:, None]
    before = fish | subs
    waiting, arrived = _swim(subs, heading, speed)
    moved = waiting | arrived
    phases = [torch.bitwise_or(*_swim(phase, heading, speed)) for phase in phases]
    arrived, left_over = _strike(arrived, left_over)
    subs = waiting | arrived

    launched = moved
    for digit, phase in enumerate(phases):
        launched = launched & ~(phase ^ -(state.clock[:, None] >> digit & 1))
    launched = _cells(launched)
    missiles_right = state.missiles_right | torch.where(heading, launched, 0)
    missiles_left = state.missiles_left | torch.where(heading, 0, launched)
    before = before | missiles_right | missiles_left
    missiles_right, missiles_left = missiles_right << 6 & _ROW, missiles_left >> 6

    waiting, arrived = _swim(fish, heading, speed)
    danger = before | moved | missiles_right | missiles_left | arrived
    arrived, left_over = _strike(arrived, left_over)
    fish = waiting | arrived
    # Each cell holds 0 or 1. Multiplied by `_FIRST`, the last cell holds the sum of all cells.
    hits = ((flying ^ left_over) * _FIRST >> 54 & _CELL).sum(1)
    terminal = (here & (danger >> 6 * x[:, None] & _CELL != 0)).any(1) | (state.oxygen <= 0)

    under = y > 0
    arrives = ~under & (state.y > 0)
    surfaces = arrives & (crew != 0)
    rescued = surfaces & (crew == _CREW)
    reward = hits + torch.where(rescued, state.oxygen // 20, 0)
    played = State(
        x=x,
        y=y,
        right=right | (state.right & ~left),
        cooldown=(torch.where(fires, _COOLDOWN, state.cooldown) - 1).clamp(min=0),
        oxygen=torch.where(surfaces, _OXYGEN, state.oxygen - under.long()),
        crew=torch.where(rescued, 0, crew) - surfaces.long(),
        level=(state.level + surfaces.long()).clamp(max=_HARDEST) if ramping else state.level,
        clock=torch.where(state.clock == _MISSILES - 1, 0, state.clock + 1),
        spawn_wait=spawn_wait - 1,
        diver_wait=diver_wait - 1,
        newer=newer,
        older=older,
        heading=heading,
        fish=fish,
        subs=subs,
        phase_0=phases[0] & subs,
        phase_1=phases[1] & subs,
        phase_2=phases[2] & subs,
        phase_3=phases[3] & subs,
        torpedoes_left=to_left & left_over,
        torpedoes_right=to_right & left_over,
        missiles_left=missiles_left,
        missiles_right=missiles_right,
    )
    return played, reward.float(), terminal | (arrives & (crew == 0))


def observe(state: State) -> Tensor:
    """The board, [G, 10, 10, 10] bool."""
    rows = torch.arange(10, device=state.x.device)
    here, floor = rows == state.y[:, None], rows == 9
    bow = 1 << 6 * state.x
    stern = torch.where(state.right, bow >> 6, bow << 6)
    air = (1 << 6 * (state.oxygen.clamp(min=0) // 20)) - 1
    seats = (1 << 54) - (1 << 6 * (9 - state.crew.clamp(min=0)))
    newer = _diver_word(state.newer, _DIVERS - state.diver_wait, rows)
    older = _diver_word(state.older, 2 * _DIVERS - state.diver_wait, rows)
    enemies = _cells(state.fish | state.subs)
    trail = (
        torch.where(state.heading, enemies >> 6, enemies << 6)
        | torch.where(state.newer[:, None] >= _RIGHT, newer >> 6, newer << 6)
        | torch.where(state.older[:, None] >= _RIGHT, older >> 6, older << 6)
    )
    words = torch.stack(
        [
            torch.where(here, bow[:, None], 0),
            torch.where(here, stern[:, None], 0),
            state.torpedoes_left | state.torpedoes_right,
            trail,
            state.missiles_left | state.missiles_right,
            state.fish,
            state.subs,
            torch.where(floor, air[:, None], 0),
            torch.where(floor, seats[:, None], 0),
            newer | older,
        ],
        1,
    )  # [G, 10, 10]
    return words[..., None] & (_CELL << 6 * rows) != 0  # [G, 10, 10, 10]


def _speed(level: Tensor) -> Tensor:
    """Steps that an enemy waits between moves: 5, one less after every second level, at least 2."""
    return (5 - (level >> 1)).clamp(min=2)


def _cells(word: Tensor) -> Tensor:
    """The lowest bit of every cell in which any bit is set."""
    word = word | word >> 1
    word = word | word >> 2
    return (word | word >> 2) & _FIRST


def _strike(word: Tensor, torpedoes: Tensor) -> tuple[Tensor, Tensor]:
    """Removes each torpedo that has an enemy in its cell, and the oldest enemy there.

    Args:    word, enemies [G, 10]; torpedoes [G, 10].
    Returns: the enemies and the torpedoes that remain.
    """
    inside = word & torpedoes * _CELL
    hit = _cells(inside)
    oldest = inside & ~(inside - hit)
    return word ^ oldest, torpedoes ^ hit


def _swim(word: Tensor, heading: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """One step of enemies: the wait of each falls by 1, and those at 0 move by a column.

    Args:    word [G, 10]; heading [G, 10]; speed [G, 1], the wait after a move.
    Returns: the enemies that did not move, and those that did, without any that left the board.
    """
    due = word & _FIRST
    arrived = torch.where(heading, due << 6 + speed & _ROW, due >> 6 - speed)
    return (word ^ due) >> 1, arrived


def _spawn_enemy(
    state: State, u: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Adds an enemy where one is due, unless enemies in its row swim the other way.

    Args:    u [G, 5] as in `step`; rows, the numbers 0 to 9.
    Returns: heading, fish, subs, the four words of phases, and spawn_wait, as in `State`.
    """
    due = state.spawn_wait == 0
    from_left, is_sub = u[:, :1] < 0.5, u[:, 1:2] < 1 / 3
    row = 1 + (u[:, 2:3] * 8).long()
    free = (state.fish | state.subs == 0) | (state.heading == from_left)
    chosen = due[:, None] & (rows == row) & free
    born = torch.where(from_left, 1, 1 << 54) << _speed(state.level)[:, None]  # [G, 1]
    born = torch.where(chosen, born, 0)  # [G, 10]
    sub = torch.where(is_sub, born, 0)
    # The first missile leaves ten steps from now, and one every eleven steps from then on: whenever
    # `clock` has the value that it had on the step before this one.
    phase = torch.where(state.clock == 0, _MISSILES - 1, state.clock - 1)[:, None]
    digits = (state.phase_0, state.phase_1, state.phase_2, state.phase_3)
    phases = [digit | sub & -(phase >> i & 1) for i, digit in enumerate(digits)]
    wait = torch.where(due, _ENEMIES - state.level, state.spawn_wait)
    heading = torch.where(chosen, from_left, state.heading)
    return heading, state.fish | (born ^ sub), state.subs | sub, phases, wait


def _spawn_diver(state: State, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a diver where one is due. Returns: newer, older and diver_wait, as in `State`."""
    due = state.diver_wait == 0
    diver = 1 + (u[:, 4] * 8).long() + torch.where(u[:, 3] < 0.5, _RIGHT, 0)
    newer = torch.where(due, diver, state.newer)
    older = torch.where(due, state.newer, state.older)
    return newer, older, torch.where(due, _DIVERS, state.diver_wait)


def _diver_column(diver: Tensor, age: Tensor) -> Tensor:
    """The column after `age` steps [G] in the water; -1 or 10 once the diver has left the board."""
    columns = age // _CROSSING
    return torch.where(diver >= _RIGHT, columns, 9 - columns)


def _diver_word(diver: Tensor, age: Tensor, rows: Tensor) -> Tensor:
    """The words [G, 10] in which only the diver's cell is set, by its lowest bit."""
    bit = 1 << 6 * _diver_column(diver, age).clamp(0, 9)
    return torch.where((rows == (diver & 15)[:, None]) & (rows > 0), bit[:, None], 0)  # [G, 10]


def _board_divers(
    newer: Tensor, older: Tensor, crew: Tensor, wait: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes divers on board that are at the boat before or after they move, the newer one first.

    Args:    wait, diver_wait after this step's spawning; x and y of the boat; all [G].
    Returns: newer, older and crew, as in `State`; a diver that left the board is gone too.
    """
    divers = []
    for diver, age in ((newer, _DIVERS - wait), (older, 2 * _DIVERS - wait)):
        column, following = _diver_column(diver, age), _diver_column(diver, age + 1)
        met = (diver & 15 == y) & ((column == x) | (following == x))
        met = met & (diver > 0) & (crew < _CREW)
        crew = crew + met.long()
        divers.append(torch.where(met | (following < 0) | (following > 9), 0, diver))
    return divers[0], divers[1], crew
