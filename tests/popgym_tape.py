"""Steps a game of ours and of the `popgym` package side by side on shared random numbers.

The package draws from gymnasium's `np_random`. Here a `Tape` takes its place: it makes decks,
boards, starts and noise of the uniform numbers that our environment uses for that game and step.
Observations are compared after `gymnasium.spaces.flatten`. `unflatten` gives back the original, so
flattening loses no information.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import popgym  # noqa: F401  registers its ids
import torch
from gymnasium import spaces

from cerl.config import MemoryEnv
from cerl.envs import make_resident
from cerl.envs.popgym import popgym_id
from cerl.envs.resident import Resident

# our environment, step, generator -> actions [G]
Policy = Callable[[Resident, int, np.random.Generator], np.ndarray]


class Tape:
    """Replaces `np.random.Generator`: every draw takes the next uniform numbers, in order."""

    def __init__(self, game: Any) -> None:
        self.game, self.row, self.at = game, np.zeros(0, np.float32), 0
        self.places: list[int] = []  # numbers still to be returned for the ship being placed

    def put(self, row: np.ndarray) -> None:
        self.row, self.at, self.places = row, 0, []

    def _next(self, count: int) -> np.ndarray:
        assert self.at + count <= len(self.row), f"drew more than the {len(self.row)} declared"
        self.at += count
        return self.row[self.at - count : self.at]

    def shuffle(self, deck: np.ndarray) -> None:
        """Shuffles a deck in place by a sort of the next numbers.

        Most games of the package deal from the end of the deck, so the order is reversed for them.
        Concentration lays the cards out from the beginning.
        """
        assert (deck == np.arange(len(deck))).all()
        order = np.argsort(self._next(len(deck)), kind="stable")
        spread = type(self.game).__name__.startswith("Concentration")
        deck[:] = order if spread else order[::-1]

    def uniform(self, low: Any, high: Any, size: Any = None) -> np.ndarray:
        low = np.broadcast_to(low, size if size is not None else np.shape(low))
        return low + self._next(low.size).astype(np.float64) * (high - low)

    def normal(self, mean: float, deviation: np.ndarray) -> np.ndarray:
        u = self._next(2 * deviation.size).astype(np.float64).reshape(-1, 2)
        plain = np.sqrt(-2 * np.log(1 - u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
        return mean + deviation * plain

    def random(self, size: int | None = None, dtype: Any = None) -> Any:
        return self._next(1)[0] if size is None else self._next(size).copy()

    def choice(self, values: np.ndarray, size: int, replace: bool) -> np.ndarray:
        assert not replace
        return values[np.argsort(self._next(len(values)), kind="stable")[:size]]

    def integers(self, high: int, size: int) -> np.ndarray:
        """Battleship asks for a ship's first square, then for its axis and direction.

        The answer is the free place with number floor(u * number of free places). If the package
        did not find it free, it would draw again, and `_next` would fail for lack of numbers.
        """
        if not self.places:
            board, lengths = self.game.board, self.game.ship_sizes
            placed = int(np.searchsorted(np.cumsum(lengths), board.sum(), side="right"))
            length, free = lengths[placed], []
            for axis in (1, 0):
                for row in range(high):
                    for column in range(high):
                        squares = [
                            (row + k * (axis == 0), column + k * (axis == 1)) for k in range(length)
                        ]
                        inside = squares[-1][axis] < high
                        if inside and not any(board[square] for square in squares):
                            free.append((row, column, axis))
            row, column, axis = free[int(self._next(1)[0] * np.float32(len(free)))]
            self.places = [row, column, axis, 0]
        drawn, self.places = self.places[:size], self.places[size:]
        return np.array(drawn)


class Report(NamedTuple):
    """What happened in a comparison, so that a test can require that it covered enough."""

    steps: int  # game steps compared, resets not counted
    terminals: int
    truncations: int  # episodes that the package truncated without a terminal on the same step
    rewards: dict[float, int]  # how often each reward came, rounded to 6 places
    error: float  # largest difference of an observation or a reward


def random_actions(ours: Resident, t: int, rng: np.random.Generator) -> np.ndarray:
    games = ours.spec.envs
    if ours.spec.continuous:
        return rng.uniform(-1, 1, (games, ours.spec.actions)).astype(np.float32)
    return rng.integers(0, ours.spec.actions, games)


def side_by_side(
    name: str,
    *,
    games: int,
    steps: int,
    policy: Policy = random_actions,
    tolerance: float = 0.0,
    resync: bool = False,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Asserts that observations, rewards and both flags are equal at every step of every game.

    Args:    tolerance of observations and rewards (0: exactly equal); resync sets the package's
             physical state to ours before every step, so that a step's own error is seen.
    """
    config = MemoryEnv.model_validate({"name": name, "envs": games, **options})
    ours = make_resident(config, seeds=[seed], salt=0, device="cpu")
    theirs: list[Any] = []
    for _ in range(games):
        made = gymnasium.make(popgym_id(name), disable_env_checker=True)
        theirs.append(made.unwrapped)
    tapes = [Tape(env) for env in theirs]
    for env, tape in zip(theirs, tapes, strict=True):
        env._np_random = tape
    space = theirs[0].observation_space
    exact = not isinstance(space, spaces.Box)
    assert ours.spec.observation == (spaces.flatdim(space),)
    rng = np.random.default_rng(seed)
    error = 0.0

    def fill() -> None:
        for tape, row in zip(tapes, ours.draws()[0].numpy(), strict=True):
            tape.put(row[1:])  # the first is the sticky draw's

    def check(where: str, got: torch.Tensor, want: list[Any]) -> None:
        nonlocal error
        for g, (mine, other) in enumerate(zip(got[0].numpy(), want, strict=True)):
            flat = np.asarray(spaces.flatten(space, other))
            if exact:
                assert (mine == flat).all(), f"{name}, {where}, game {g}: {mine} is not {flat}"
                back = spaces.unflatten(space, mine.astype(flat.dtype))
                assert np.array_equal(np.ravel(back), np.ravel(other))
            else:
                off = np.abs(mine - flat).max()
                error = max(error, float(off))
                assert off <= tolerance, f"{name}, {where}, game {g}: {mine} is not {flat}"

    fill()
    first = ours.reset()
    check("reset", first.obs, [env.reset()[0] for env in theirs])
    over = np.zeros(games, dtype=bool)
    played = terminals = truncations = 0
    rewards: dict[float, int] = {}
    for t in range(steps):
        action = policy(ours, t, rng)
        fill()
        if resync:
            for g, env in enumerate(theirs):
                env.state = _physics(ours, g)
        result = ours.step(torch.from_numpy(action)[None])
        seen = []
        for g, env in enumerate(theirs):
            if over[g]:
                seen.append(env.reset()[0])
                wanted = (0.0, False, False)
            else:
                obs, *wanted, _ = env.step(_theirs(env.action_space, action[g]))
                seen.append(obs)
            reward, terminal, cut = wanted
            cut = cut and not terminal
            got = [float(result.reward[0, g]), *(bool(flag[0, g]) for flag in result[2:])]
            where = f"{name}, step {t}, game {g}"
            off = abs(got[0] - float(np.float32(reward)))
            assert off <= tolerance, f"{where}: reward {got[0]} is not {reward}"
            assert got[1:] == [terminal, cut], f"{where}: ends {got[1:]}, not {[terminal, cut]}"
            error = max(error, off)
            if not over[g]:
                played += 1
                rewards[round(float(reward), 6)] = rewards.get(round(float(reward), 6), 0) + 1
            over[g] = terminal or cut
            terminals += terminal
            truncations += cut
        check(f"step {t}", result.obs, seen)
    return Report(played, terminals, truncations, rewards, error)


def _theirs(space: spaces.Space, action: Any) -> Any:
    """Our action in the form that the package expects."""
    if isinstance(space, spaces.MultiDiscrete):
        return divmod(int(action), int(space.nvec[1]))
    if isinstance(space, spaces.Box):
        return np.float32(space.high[0]) * np.asarray(action, dtype=np.float32)
    return int(action)


def _physics(ours: Resident, game: int) -> np.ndarray:
    """The physical state of one of our games, in the order of gymnasium's `state`."""
    state = ours._state
    if hasattr(state, "angle"):
        numbers = [state.angle[game], state.speed[game]]
    else:
        numbers = torch.stack([state.place[game], state.speed[game]], -1).flatten()
    return np.array([float(number) for number in numbers])
