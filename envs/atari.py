"""Atari 2600: S x E games on the host's cores, one 84x84 grey frame an agent step.

`Atari` is the environment that the agent sees: episodes, lives, time limit. The emulators are those
of one of two back ends, EnvPool (in this file) or ale-py (`ale.py`). Both give the same frames;
tests compare them. A frame is ALE's grey screen, the pixelwise maximum over the last two emulator
frames of an agent step, resized by OpenCV's INTER_AREA. Rewards are raw and frames are single: the
collector clips rewards, and replay stacks frames.

Compared with the environment of Lin et al. 2024 (ale-py 0.7.5 and Dopamine's preprocessing):

- Differs: that emulator checks for game over before it acts, both back ends here check after. So
  its terminals come one emulator frame later. Where the game ends on the last of the frames of an
  agent step, that is one agent step later.
- Differs under EnvPool: an episode cannot start without a no-op frame unless FIRE is pressed. So
  `noop_max: 0` without FIRE needs `backend: ale`.
- Differs: the last frame of a game, that is, the observation after a terminal, which no loss reads.
  EnvPool takes the maximum with an old frame in its buffer; ale-py shows the frame before. The last
  frame before a time limit is right in both.
- Same: the first frame of a game. That environment takes its maximum with zeros, which is the frame
  itself.
- Same: the time limit. The runner of that code cuts episodes at 27,000 agent steps and removes
  gym's TimeLimit; here the option `time_limit` does.
- Same up to the version of OpenCV: each back end contains its own copy.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cerl.config import AtariEnv
from cerl.data import EnvSpec, Step
from cerl.envs.ale import AleGames, camel_case, check_known, fire_action
from cerl.envs.envpool import EnvPool
from cerl.envs.host import Outbox, host_actions, simulator_seeds, worker_threads
from cerl.envs.simulator_state import array, entries, whole


class Games(Protocol):
    """A back end: G = S * E games that restart on the step after their game over."""

    actions: int  # number of actions
    observation: tuple[int, ...]  # shape of a frame
    meanings: tuple[str, ...]  # of the actions; () where the back end does not tell
    fire: int | None  # index of FIRE among them; None: the game has no such action

    def reseed(self, seeds: np.ndarray) -> None:
        """Gives the emulators new seeds [G]. The caller then has to reset all games."""
        ...

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games in the emulators with the indices `which` (None: in all).

        Returns: frames [len(which), 84, 84] uint8 and lives [len(which)].
        """
        ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: frame [G, 84, 84] uint8, raw reward [G], game over [G] bool, lives [G].

        A game that was over starts anew instead and returns its first frame and reward 0.
        """
        ...

    def close(self) -> None:
        """Frees the emulators and their threads."""
        ...


class EnvPoolGames:
    """G games of EnvPool: single frames, raw rewards, no limit on the episode.

    Args:    seeds [G] of the emulators; threads of the emulators.
    Raises:  ImportError without envpool; ValueError on an unknown game, or on `noop_max: 0` where
             the game is not started by FIRE.
    """

    observation: tuple[int, ...] = (84, 84)
    meanings: tuple[str, ...] = ()

    def __init__(
        self, config: AtariEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
    ) -> None:
        try:
            import envpool.atari.registration
        except ImportError as error:
            raise ImportError(
                f"backend 'envpool' needs envpool ({error}): pip install 'cerl[atari]'"
            ) from error
        names = [camel_case(rom) for rom in envpool.atari.registration.atari_game_list]
        check_known(config.name, names)
        self.fire = fire_action(config)
        presses = config.fire_reset and self.fire is not None
        if config.noop_max == 0 and not presses:
            raise ValueError(
                "env.noop_max: EnvPool plays at least one no-op frame where it presses no FIRE, "
                f"got 0 for {config.name}; set env.noop_max to 1 or more, or env.backend to 'ale'"
            )
        self._pool = EnvPool(
            f"{config.name}-v5",
            seeds=seeds,
            threads=threads,
            stack_num=1,
            frame_skip=config.frame_skip,
            # EnvPool draws the number of frames in 1..noop_max, and counts the frame of FIRE too.
            noop_max=config.noop_max + int(presses),
            use_fire_reset=config.fire_reset,
            episodic_life=False,
            reward_clip=False,
            use_inter_area_resize=True,
            full_action_space=config.full_actions,
            repeat_action_probability=config.sticky,
        )
        self.actions = int(self._pool.spaces[1].n)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """Gives the emulators new seeds [G]. The caller then has to reset all games."""
        self._pool.reseed(seeds)

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games in the emulators with the indices `which` (None: in all).

        Returns: frames [len(which), 84, 84] uint8 and lives [len(which)].
        """
        frame, info = self._pool.reset(which)
        return frame[:, 0], info["lives"]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: frame [G, 84, 84], raw reward [G], game over [G] bool, lives [G]."""
        frame, reward, _, _, info = self._pool.step(action.astype(np.int32))
        # `info["terminated"]` is the emulator's game over. EnvPool's third value is not: it reports
        # some terminals as truncations.
        return frame[:, 0], reward, info["terminated"].astype(bool), info["lives"]

    def close(self) -> None:
        """Frees the emulators and their threads."""
        self._pool.close()


class Atari:
    """A VecEnv of S x E Atari games.

    With `life_loss`, a lost life is terminal for the agent while the game goes on. On the next step
    the agent's action is ignored, as after the end of any episode: the game plays one agent step of
    no-op (of FIRE with `fire_reset`, where the game has it), the reward is dropped, and the frame
    is the first of the next episode. If the game ends in that very step, a new game starts at once.
    `time_limit` counts the agent steps of a whole game; reaching it truncates unless the game ends.

    A Step that was returned is not overwritten by later steps. ale-py's games are restored by
    playing them again (`note` says how long that took). EnvPool's cannot be saved:
    `load_state_dict` builds new ones with new seeds and starts new episodes.

    Args:    seeds are the user's numbers; salt gives each consumer of a seed (training, evaluation)
             random numbers of its own; longest, where above 0, limits a game's agent steps as
             `time_limit` does; colour (ale-py only), observations are the console's picture
             [210, 160, 3] of the same games, for people to look at.
    Raises:  ImportError without the back end; ValueError on an unknown game or an option that the
             back end cannot express.
    """

    def __init__(
        self,
        config: AtariEnv,
        *,
        seeds: Sequence[int],
        salt: int,
        device: torch.device | str,
        longest: int = 0,
        colour: bool = False,
    ) -> None:
        self._config, self._shape = config, (len(seeds), config.envs)
        self._limit = min(config.time_limit, longest or config.time_limit)
        self._seeds = partial(simulator_seeds, seeds, salt=salt, envs=config.envs)
        self._generation = 0  # the number that the emulators' seeds were drawn with
        self.note = ""  # of `load_state_dict`, as in `VecEnv`
        make = EnvPoolGames if config.backend == "envpool" else partial(AleGames, colour=colour)
        threads = worker_threads(config.threads, simulators=len(seeds) * config.envs)
        self._games: Games = make(config, seeds=self._seeds(generation=0), threads=threads)
        self.meanings = self._games.meanings
        self.spec = EnvSpec(
            name=config.name,
            observation=self._games.observation,
            dtype=torch.uint8,
            actions=self._games.actions,
            envs=config.envs,
            frames=config.frame_skip,
            resident=False,
            exact_state=config.backend == "ale",
        )
        self._outbox = Outbox(self.spec, seeds=len(seeds), device=device)
        games = len(seeds) * config.envs
        self._elapsed = np.zeros(games, dtype=np.int64)  # agent steps of the game
        self._lives = np.zeros(games, dtype=np.int64)
        # Whether and how the last step ended each episode. `_lost` and `_cut` can both be True.
        self._over = np.zeros(games, dtype=bool)  # game over; the emulator's next step restarts it
        self._lost = np.zeros(games, dtype=bool)  # a life was lost, and the game goes on
        self._cut = np.zeros(games, dtype=bool)  # time limit reached; the game has to be reset

    def restart(self, number: int) -> Step:
        """Starts new games that depend on seeds, salt and `number` alone, as in `VecEnv`."""
        self._generation = number
        self._games.reseed(self._seeds(generation=number))
        return self.reset()

    def reset(self) -> Step:
        """Starts a new game everywhere."""
        frame, lives = self._games.reset(None)
        self._lives[:] = lives
        for each in (self._elapsed, self._over, self._lost, self._cut):
            each[:] = 0
        return self._outbox.send(frame, np.zeros(len(lives)), self._over, self._cut)

    def step(self, action: Tensor) -> Step:
        """Advances every game by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions) on any device; ignored where the last step
                 ended an episode.
        Raises:  ValueError on a wrong shape, dtype or an action out of range.
        """
        config, limit = self._config, self._limit
        starts = self._over | self._lost | self._cut
        act = host_actions(
            action, name=config.name, count=self.spec.actions, ignored=starts.reshape(self._shape)
        ).reshape(-1)
        if config.fire_reset and self._games.fire is not None:
            act[self._lost] = self._games.fire
        frame, reward, over, lives = self._games.step(act)
        self._elapsed = np.where(self._over, 0, self._elapsed + 1)
        again = self._cut | (self._lost & (over | (self._elapsed >= limit)))
        if again.any():
            which = np.flatnonzero(again)
            frame[which], lives[which] = self._games.reset(which)
            self._elapsed[which], over[which] = 0, False
        lost = ~starts & ~over & (lives > 0) & (lives < self._lives)
        self._over = over
        self._lost = lost if config.life_loss else np.zeros_like(over)
        self._cut = ~over & (self._elapsed >= limit)
        self._lives[:] = lives
        terminated = over | self._lost
        return self._outbox.send(
            frame, np.where(starts, 0, reward), terminated, self._cut & ~terminated
        )

    def state_dict(self) -> dict[str, Any]:
        """The generation of the emulators' seeds, and with ale-py everything to restore the games.

        May be called only after the first reset.
        """
        state: dict[str, Any] = {"generation": self._generation}
        if isinstance(self._games, AleGames):
            ended = np.stack([self._over, self._lost, self._cut])
            state["elapsed"] = torch.from_numpy(self._elapsed.copy())
            state["lives"] = torch.from_numpy(self._lives.copy())
            state["ended"] = torch.from_numpy(ended)
            state["games"] = self._games.state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place, or starts new episodes with new seeds where that cannot be done.

        Returns: None, or the first Step of the new episodes.
        Raises:  CheckpointError if the state does not fit; then nothing is changed.
        """
        name = self._config.name
        keys = ["elapsed", "lives", "ended", "games"] if self.spec.exact_state else []
        entries(state, ["generation", *keys], where=name)
        generation = whole(state["generation"], where=f"{name}.generation")
        if keys and self._play_again(state, generation):
            return None
        if not keys:
            self.note = "EnvPool's emulators cannot be saved; env.backend 'ale' plays on exactly"
        return self.restart(generation + 1)

    def _play_again(self, state: dict[str, Any], generation: int) -> bool:
        """Restores ale-py's games. Returns: False if frames or lives then differ from the saved."""
        assert isinstance(self._games, AleGames)
        name, games = self._config.name, len(self._over)
        elapsed = array(state["elapsed"], (games,), np.int64, where=f"{name}.elapsed")
        lives = array(state["lives"], (games,), np.int64, where=f"{name}.lives")
        ended = array(state["ended"], (3, games), bool, where=f"{name}.ended")
        begin = time.perf_counter()
        now, same = self._games.restore(
            state["games"], seeds=self._seeds(generation=generation), where=f"{name}.games"
        )
        self._generation = generation
        steps, seconds = len(state["games"]["given"]), time.perf_counter() - begin
        self.note = f"replayed {steps:,} agent steps of {games} games in {seconds:.1f} s"
        if not same or not np.array_equal(now, lives):
            self.note += ", which ended differently from those saved (another version of ale-py?)"
            return False
        self._elapsed, self._lives = elapsed, lives
        self._over, self._lost, self._cut = ended
        return True

    def close(self) -> None:
        """Frees the emulators and their threads."""
        self._games.close()
