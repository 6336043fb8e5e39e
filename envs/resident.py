"""Device-resident games: S x E copies of one game stepped by tensor arithmetic, never a host sync.

A game is three pure functions of tensors with one leading axis G = S * E. This file adds what
every game needs: counter-based draws, sticky actions, autoreset on the next step, a time limit, and
a state that is allocated once and updated in place, so that a CUDA graph can hold the step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.data import EnvSpec, Step
from cerl.graph import fused

_NEVER = 1 << 62


class Game(NamedTuple):
    """Rules as pure functions. States are NamedTuples of tensors [G, ...]; uniforms are in [0, 1).

    `reset(u [G, reset_draws]) -> state`; `step(state, action, u [G, draws]) -> (state,
    reward [G] float32, terminal [G] bool)`; `observe(state) -> [G, *observation]` of type `dtype`.
    An action is an id, [G] int64, or with `components` [G, components] float32 in [-1, 1].
    Only pointwise operations and small reductions, no shape and no branch that depends on data. A
    step from a finished game may return anything, but must not fail.
    """

    reset: Callable[[Tensor], Any]
    step: Callable[[Any, Tensor, Tensor], tuple[Any, Tensor, Tensor]]
    observe: Callable[[Any], Tensor]
    draws: int  # uniforms that one step may use
    reset_draws: int  # uniforms that one reset may use
    observation: tuple[int, ...]
    actions: tuple[int, ...] = ()  # the game's id of each action on offer
    dtype: torch.dtype = torch.bool
    components: int = 0  # of a continuous action; 0: actions are discrete


class Memory(NamedTuple):
    """What a game's rules do not know about the game under way."""

    last_action: Tensor  # [G] int64, game's id, or [G, A]; survives a reset, as in MinAtar
    done: Tensor  # [G] bool, the last step ended an episode
    elapsed: Tensor  # [G] int64, agent steps of the episode


class Resident:
    """A VecEnv of S x E copies of one game, on any device, exactly restorable.

    Args:    name as in `spec`; envs E per seed; sticky the probability that an action is replaced
             by the last one executed (at first 0); time_limit and longest in agent steps (0: none),
             reaching the smaller of them truncates unless the game ends by itself; salt separates
             consumers (training, evaluation) of one seed; fuse compiles the step into few kernels
             (None: on CUDA only), the numbers are the same, fractions to rounding.
    Raises:  ValueError for no seed, no game, a choice of action ids outside 0..7, or a game whose
             actions are both ids and continuous, or neither.
    """

    def __init__(
        self,
        game: Game,
        *,
        name: str,
        envs: int,
        sticky: float,
        time_limit: int,
        seeds: Sequence[int],
        salt: int,
        device: torch.device | str,
        longest: int = 0,
        fuse: bool | None = None,
    ) -> None:
        if bool(game.actions) == bool(game.components):
            raise ValueError(f"{name}: expected either action ids or components, got {game}")
        every = game.actions == tuple(range(len(game.actions)))
        if not every and (not set(game.actions) <= set(range(8)) or len(game.actions) > 8):
            raise ValueError(
                f"{name}: expected the action ids 0, 1, 2, ... or at most 8 of 0..7, got "
                f"{game.actions}"
            )
        if not seeds or envs < 1:
            raise ValueError(
                f"{name} needs at least one seed and one game per seed, got seeds "
                f"{tuple(seeds)} and envs {envs}; give --seeds and --env.envs"
            )
        self.note = ""  # restoring is always exact
        device = torch.device(device)
        games = len(seeds) * envs
        self._game, self._sticky = game, sticky
        self._limit = min(time_limit or _NEVER, longest or _NEVER)
        self._shape = (len(seeds), envs)
        self._spec = EnvSpec(
            name=name,
            observation=game.observation,
            dtype=game.dtype,
            actions=len(game.actions) or game.components,
            envs=envs,
            frames=1,
            resident=True,
            exact_state=True,
            continuous=game.components > 0,
        )
        self._key = draw.seed_keys(seeds, salt=salt, device=device)
        # A tensor in memory: compilers fold `arange * constant` symbolically, beyond 64 bits.
        self._grid = torch.arange(envs * self.columns, device=device).view(1, envs, self.columns)
        self._counter = torch.zeros((), dtype=torch.int64, device=device)
        self._memory = Memory(
            last_action=self._spec.action(games, device=device),
            done=torch.ones(games, dtype=torch.bool, device=device),
            elapsed=torch.zeros(games, dtype=torch.int64, device=device),
        )
        blank = game.reset(torch.zeros(games, game.reset_draws, device=device))
        # A reset may share or expand tensors; what is updated in place must own its memory.
        self._state = type(blank)(
            *(torch.empty(f.shape, dtype=f.dtype, device=device).copy_(f) for f in blank)
        )
        self._idle = self._spec.action(*self._shape, device=device)
        fuse = device.type == "cuda" if fuse is None else fuse
        self._advance: Callable[[Tensor], Step] = self._eager
        if fuse:
            self._advance = fused(self._eager)

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def columns(self) -> int:
        """Uniforms that a game is given on each step: the sticky draw, then the rules' own.

        One step either plays or resets, so both read the same columns from the second on.
        """
        return 1 + max(self._game.draws, self._game.reset_draws)

    def draws(self) -> Tensor:
        """The uniforms that the next step will use, [S, E, columns] float32: `draw.uniform`'s."""
        return self._uniforms(self.columns)

    def _uniforms(self, columns: int) -> Tensor:
        grid = self._grid[..., :columns]
        return (draw.bits(self._key, draw.ENV, self._counter, grid) >> 8).float() * 2.0**-24

    def reset(self) -> Step:
        """Starts a new episode everywhere; rewards 0, flags False."""
        self._memory.done.fill_(True)
        return self.step(self._idle)

    def restart(self, number: int) -> Step:
        """Starts a new episode everywhere that depends on `number`, not on what came before."""
        self._memory.last_action.zero_()
        self._counter.fill_(draw.first_step(number))
        return self.reset()

    def step(self, action: Tensor) -> Step:
        """Advances every game by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions), or [S, E, spec.actions] float32 in
                 [-1, 1]; ignored where the last step ended an episode. NaN passes and stays in its
                 environment until the episode's end.
        Raises:  ValueError for another shape or type, and on the CPU for an action out of range (on
                 CUDA the test would wait for the device: such an action is then undefined).
        """
        idle = self._idle
        if action.shape != idle.shape or action.dtype != idle.dtype:
            axes = "[S, E, A]" if self._spec.continuous else "[S, E]"
            raise ValueError(
                f"{self._spec.name}: expected actions {axes} = {list(idle.shape)} of {idle.dtype}, "
                f"got {list(action.shape)} of {action.dtype}; one action per seed and environment"
            )
        if action.device.type == "cpu":
            low, high = action.aminmax()
            if self._spec.continuous and (low < -1 or high > 1):
                raise ValueError(
                    f"{self._spec.name}: expected actions in [-1, 1], got {low:g}..{high:g}; "
                    "squash or clip them"
                )
            if not self._spec.continuous and (low < 0 or high >= self._spec.actions):
                every = self._game.actions == tuple(range(self._spec.actions))
                hint = "" if every else "; `full_actions` offers all six of MinAtar"
                raise ValueError(
                    f"{self._spec.name}: expected actions in 0..{self._spec.actions - 1}, got "
                    f"{int(low)}..{int(high)}{hint}"
                )
        return self._advance(action)

    def state_dict(self) -> dict[str, Any]:
        """Copies of every tensor that the next step reads, draws included."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores in place, so compiled and captured steps go on with it.

        Raises:  ValueError if a tensor is missing, unknown, or of another shape or type; nothing is
                 changed then.
        """
        own = self._tensors()
        if own.keys() != state.keys():
            raise ValueError(
                f"{self._spec.name}: the saved state holds {sorted(state)}, expected "
                f"{sorted(own)}; it is from another game or another version"
            )
        for name, tensor in own.items():
            saved = state[name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise ValueError(
                    f"{self._spec.name}: saved {name} is {list(saved.shape)} of {saved.dtype}, "
                    f"expected {list(tensor.shape)} of {tensor.dtype}; restore with as many seeds "
                    "and envs as the run had"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def close(self) -> None:
        """Nothing to free."""

    def _tensors(self) -> dict[str, Tensor]:
        rules = {f"game.{name}": tensor for name, tensor in self._state._asdict().items()}
        return {"key": self._key, "counter": self._counter, **self._memory._asdict(), **rules}

    def _eager(self, action: Tensor) -> Step:
        over = self._memory.done
        # On the CPU this question costs nothing, and shuffling decks that nobody is dealt does.
        quiet = over.device.type == "cpu" and not torch.compiler.is_compiling() and not over.any()
        u = self._uniforms(1 + self._game.draws if quiet else self.columns).flatten(0, 1)
        memory, state, reward, terminated, truncated = self._transition(
            action.flatten(0, 1), u, starts=not quiet
        )
        obs = self._game.observe(state)
        for old, new in zip((*self._memory, *self._state), (*memory, *state), strict=True):
            old.copy_(new)
        self._counter.add_(1)
        return Step(
            *(out.unflatten(0, self._shape) for out in (obs, reward, terminated, truncated))
        )

    def _transition(
        self, action: Tensor, u: Tensor, *, starts: bool
    ) -> tuple[Memory, Any, Tensor, Tensor, Tensor]:
        """One step of every game. Args: u [G, columns]; starts, False if no episode begins."""
        game, over = self._game, self._memory.done
        executed = action if game.components else _game_id(game.actions, action)
        if self._sticky > 0:
            executed = _choose(u[:, 0] < self._sticky, self._memory.last_action, executed)
        played, reward, terminal = game.step(self._state, executed, u[:, 1 : 1 + game.draws])
        if starts:
            fresh = game.reset(u[:, 1 : 1 + game.reset_draws])
            state = type(played)(*(_choose(over, a, b) for a, b in zip(fresh, played, strict=True)))
        else:
            state = _apart(self._state, played)
        elapsed = torch.where(over, 0, self._memory.elapsed + 1)
        playing = ~over
        terminated = terminal & playing
        truncated = (elapsed >= self._limit) & ~terminated & playing
        memory = Memory(
            last_action=_choose(over, self._memory.last_action, executed),
            done=terminated | truncated,
            elapsed=elapsed,
        )
        return memory, state, torch.where(over, 0.0, reward), terminated, truncated


def _game_id(actions: tuple[int, ...], action: Tensor) -> Tensor:
    if actions == tuple(range(len(actions))):
        return action
    # Four bits an id in one constant: a lookup without a load.
    table = sum(game_id << 4 * index for index, game_id in enumerate(actions))
    return (table >> 4 * action) & 15


def _apart(old: Any, new: Any) -> Any:
    """The new state without tensors that share memory with another field of the old one: these are
    overwritten one after the other."""
    held = {field.untyped_storage().data_ptr() for field in old}
    return type(new)(
        *(
            b.clone() if b is not a and b.untyped_storage().data_ptr() in held else b
            for a, b in zip(old, new, strict=True)
        )
    )


def _choose(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(which.view(-1, *([1] * (other.dim() - 1))), one, other)
