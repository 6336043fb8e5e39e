"""Device-resident games: S x E copies of one game, stepped by tensor operations on the device.

A game is three pure functions of tensors with one leading axis G = S * E (`Game`). `Resident` adds
the parts that all games share: counter-based random numbers, sticky actions, autoreset on the next
step, a time limit, and a state that is allocated once and updated in place, so that a CUDA graph
can replay the step. The host never waits for the device. A new game needs only its rules: see
`envs/own_game.py`, and `envs/catch.py` for the shortest example.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cerl import draw
from cerl.data import EnvSpec, Step
from cerl.graph import fused
from cerl.tape.record import recording

_NEVER = 1 << 62  # a time limit that no episode reaches, agent steps


class Game(NamedTuple):
    """The rules of a game, as pure functions on tensors of any device.

    `reset(u) -> state` starts G games from u [G, reset_draws], uniform in [0, 1). A state is a
    NamedTuple of tensors [G, ...] whose shapes and types never change.
    `step(state, action, u) -> (state, reward, terminal)` plays one agent step of every game, with
    u [G, draws] uniform in [0, 1). Discrete actions are ids [G] int64 out of `actions`; continuous
    ones are [G, components] float32 in [-1, 1]. reward [G] float32, terminal [G] bool. A finished
    game is stepped once more and the result thrown away: it may be anything, but must not fail.
    `observe(state) -> [G, *observation]` of type `dtype` shows the games.

    No shape and no Python branch may depend on the data in a tensor: a GPU would have to wait for
    the host, and the step could not be compiled. Pointwise operations and small reductions compile
    into few kernels.
    """

    reset: Callable[[Tensor], Any]
    step: Callable[[Any, Tensor, Tensor], tuple[Any, Tensor, Tensor]]
    observe: Callable[[Any], Tensor]
    draws: int  # uniform numbers that one step of one game may use
    reset_draws: int  # uniform numbers that one reset of one game may use
    observation: tuple[int, ...]  # shape of one observation
    actions: tuple[int, ...] = ()  # for each action that the agent can choose, its id in the rules
    dtype: torch.dtype = torch.bool  # of observations
    components: int = 0  # numbers that make up a continuous action; 0: actions are discrete


class Episode(NamedTuple):
    """State of an episode that is not part of the rules: sticky actions, autoreset, time limit."""

    # [G] int64, the id in the rules of the last action executed, or [G, A]. A reset does not clear
    # it, as in MinAtar.
    last_action: Tensor
    done: Tensor  # [G] bool, the last step ended an episode
    elapsed: Tensor  # [G] int64, agent steps of the episode so far


class Resident:
    """A VecEnv of S x E copies of one game, on any device, exactly restorable.

    Args:    name, as in `spec`; envs, E per seed; sticky, the probability that an action is
             replaced by the last one executed (before the first one: action 0); time_limit and
             longest, agent steps (0: none), reaching the smaller of them truncates an episode
             unless the game ends by itself; seeds are the user's numbers, S of them; salt gives
             each consumer of a seed (training, evaluation) random numbers of its own; fuse compiles
             the step into few kernels (None: on CUDA only). A compiled step gives the same whole
             numbers and flags to the bit, and floats that agree up to rounding.
    Raises:  ValueError for no seed, envs below 1, action ids that are neither 0, 1, 2, ... nor
             within 0..7, or a game with both action ids and continuous actions, or with neither.
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
        in_order = game.actions == tuple(range(len(game.actions)))
        if not in_order and (not set(game.actions) <= set(range(8)) or len(game.actions) > 8):
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
        # Kept as a tensor in memory: in the compiled step, an `arange` times the constants of the
        # hash would be folded symbolically and leave the range of 64 bits.
        self._grid = torch.arange(envs * self.columns, device=device).view(1, envs, self.columns)
        self._counter = torch.zeros((), dtype=torch.int64, device=device)
        self._episode = Episode(
            last_action=self._spec.action(games, device=device),
            done=torch.ones(games, dtype=torch.bool, device=device),
            elapsed=torch.zeros(games, dtype=torch.int64, device=device),
        )
        blank = game.reset(torch.zeros(games, game.reset_draws, device=device))
        # Fields of a reset may be views of each other or expanded. This state is updated in place,
        # so each of its fields needs memory of its own.
        self._state = type(blank)(
            *(torch.empty(f.shape, dtype=f.dtype, device=device).copy_(f) for f in blank)
        )
        self._idle = self._spec.action(*self._shape, device=device)
        fuse = device.type == "cuda" if fuse is None else fuse
        self._advance: Callable[[Tensor], Step] = self._advance_once
        if fuse:
            self._advance = fused(self._advance_once)

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def columns(self) -> int:
        """How many uniform numbers are drawn for a game on each step.

        The first one is for sticky actions, the others are for the rules. On a step a game either
        plays or resets, so `step` and `reset` of the rules read the same columns.
        """
        return 1 + max(self._game.draws, self._game.reset_draws)

    def draws(self) -> Tensor:
        """The uniform numbers that the next step will use, [S, E, columns] float32.

        They are those of `draw.uniform`. Tests play the original games on them.
        """
        return self._uniforms(self.columns)

    def _uniforms(self, columns: int) -> Tensor:
        grid = self._grid[..., :columns]
        return (draw.bits(self._key, draw.ENV, self._counter, grid) >> 8).float() * 2.0**-24

    def reset(self) -> Step:
        """Starts a new episode everywhere; rewards 0, flags False."""
        self._episode.done.fill_(True)
        return self.step(self._idle)

    def restart(self, number: int) -> Step:
        """Starts new episodes that depend on seeds, salt and `number` alone, as in `VecEnv`."""
        self._episode.last_action.zero_()
        self._counter.fill_(draw.first_step(number))
        return self.reset()

    def step(self, action: Tensor) -> Step:
        """Advances every game by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions), or [S, E, spec.actions] float32 in
                 [-1, 1]; ignored where the last step ended an episode. A NaN reaches the rules; it
                 can spoil only its own environment, and only until the episode ends.
        Raises:  ValueError for another shape or type, and on the CPU for an action out of range. On
                 CUDA that check would make the host wait for the device, so it is left out, and the
                 result of such an action is undefined.
        """
        idle = self._idle
        if action.shape != idle.shape or action.dtype != idle.dtype:
            axes = "[S, E, A]" if self._spec.continuous else "[S, E]"
            raise ValueError(
                f"{self._spec.name}: expected actions {axes} = {list(idle.shape)} of {idle.dtype}, "
                f"got {list(action.shape)} of {action.dtype}; one action per seed and environment"
            )
        if action.device.type == "cpu" and not recording():
            low, high = action.aminmax()
            if self._spec.continuous and (low < -1 or high > 1):
                raise ValueError(
                    f"{self._spec.name}: expected actions in [-1, 1], got {low:g}..{high:g}; "
                    "squash or clip them"
                )
            if not self._spec.continuous and (low < 0 or high >= self._spec.actions):
                in_order = self._game.actions == tuple(range(self._spec.actions))
                hint = "" if in_order else "; `full_actions` offers all six of MinAtar"
                raise ValueError(
                    f"{self._spec.name}: expected actions in 0..{self._spec.actions - 1}, got "
                    f"{int(low)}..{int(high)}{hint}"
                )
        return self._advance(action)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all tensors that the next step depends on, by name.

        The names of tensors that belong to the state of the rules begin with `game.`.
        """
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a saved state into the existing tensors, whose memory a captured step reads.

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
        return {"key": self._key, "counter": self._counter, **self._episode._asdict(), **rules}

    def _advance_once(self, action: Tensor) -> Step:
        """One step of every game, not compiled: `_advance` is this method or its compiled form."""
        over = self._episode.done
        # Skip the resets when no episode has ended. Only on the CPU: on a GPU, `any` would make the
        # host wait, and a step that is compiled or recorded cannot branch on it.
        steady = torch.compiler.is_compiling() or recording()
        resets = over.device.type != "cpu" or steady or bool(over.any())
        u = self._uniforms(self.columns if resets else 1 + self._game.draws).flatten(0, 1)
        episode, state, reward, terminated, truncated = self._transition(
            action.flatten(0, 1), u, resets=resets
        )
        obs = self._game.observe(state)
        for old, new in zip((*self._episode, *self._state), (*episode, *state), strict=True):
            old.copy_(new)
        self._counter.add_(1)
        return Step(
            *(out.unflatten(0, self._shape) for out in (obs, reward, terminated, truncated))
        )

    def _transition(
        self, action: Tensor, u: Tensor, *, resets: bool
    ) -> tuple[Episode, Any, Tensor, Tensor, Tensor]:
        """Computes the result of one step of every game, without changing anything.

        Args:    action [G] or [G, A]; u [G, columns] uniform in [0, 1); resets, False if the caller
                 knows that no game begins a new episode.
        Returns: the new episode and state, reward [G] float32, terminated and truncated [G] bool.
        """
        game, over = self._game, self._episode.done
        executed = action if game.components else _game_id(game.actions, action)
        if self._sticky > 0:
            executed = _choose(u[:, 0] < self._sticky, self._episode.last_action, executed)
        played, reward, terminal = game.step(self._state, executed, u[:, 1 : 1 + game.draws])
        if resets:
            fresh = game.reset(u[:, 1 : 1 + game.reset_draws])
            state = type(played)(*(_choose(over, a, b) for a, b in zip(fresh, played, strict=True)))
        else:
            state = _unaliased(self._state, played)
        elapsed = torch.where(over, 0, self._episode.elapsed + 1)
        playing = ~over
        terminated = terminal & playing
        truncated = (elapsed >= self._limit) & ~terminated & playing
        episode = Episode(
            last_action=_choose(over, self._episode.last_action, executed),
            done=terminated | truncated,
            elapsed=elapsed,
        )
        return episode, state, torch.where(over, 0.0, reward), terminated, truncated


def _game_id(actions: tuple[int, ...], action: Tensor) -> Tensor:
    """The rules' ids of chosen actions, [G] int64. Args: action [G] in [0, len(actions))."""
    if actions == tuple(range(len(actions))):
        return action
    # At most 8 ids of four bits each fit into one integer constant, so the lookup is a shift and
    # reads no memory.
    table = sum(game_id << 4 * index for index, game_id in enumerate(actions))
    return (table >> 4 * action) & 15


def _unaliased(old: Any, new: Any) -> Any:
    """The new state, with a copy of each field that is stored in the memory of another old field.

    Rules may return a field of the old state under another name, or a view of it. The caller copies
    the new fields into the old ones one after the other: without these copies, the first one could
    overwrite what a later one has yet to read.
    """
    taken = {field.untyped_storage().data_ptr() for field in old}
    return type(new)(
        *(
            b.clone() if b is not a and b.untyped_storage().data_ptr() in taken else b
            for a, b in zip(old, new, strict=True)
        )
    )


def _choose(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where which [G], else `other`; both [G, ...]."""
    return torch.where(which.view(-1, *([1] * (other.dim() - 1))), one, other)
