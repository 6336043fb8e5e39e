"""Atari 2600: S x E games on the host's cores, one 84x84 grey frame an agent step.

`AtariPool` is what the agent sees: episodes, lives, time limit. Two back ends emulate behind it,
EnvPool here and ale-py in `ale.py`; they agree frame by frame, and each is the other's test. A
frame is ALE's grey screen, the maximum of an agent step's last two, resized by INTER_AREA. Rewards
are raw; clipping belongs to the collector, stacking to replay.

What cannot match the environment of Lin et al. 2024 (ale-py 0.7.5 and Dopamine's preprocessing):

- Its emulator reads game-over before acting, so its terminals come one emulator frame later than
  here (both back ends read it after), and an agent step later when the game ends on a skip's last
  frame.
- EnvPool cannot start an episode without a no-op frame unless it presses FIRE; ale-py can. So
  `noop_max: 0` without FIRE asks for `backend: ale`.
- The first frame there is a maximum with zeros, which is the frame itself: the same here. Episodes
  are cut at 27,000 agent steps by its runner, gym's TimeLimit being removed: `time_limit` here.
- The last frame of a game: EnvPool pools it with what its buffer holds, ale-py leaves it out. It is
  the observation of a terminal, which nothing learns from. After a time limit it is right in both.
- Both resize with OpenCV's INTER_AREA, each linking its own copy of OpenCV.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cerl.config import AtariEnv
from cerl.data import EnvSpec, Step
from cerl.envs.ale import AleGames, camel_case, check_known, fire_action
from cerl.envs.host import Outbox, host_actions, simulator_seeds, worker_threads


class Games(Protocol):
    """What a back end does: emulates G games that restart on the step after their game over."""

    actions: int  # number of actions
    fire: int | None  # index of FIRE among them

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]: ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...

    def close(self) -> None: ...


class EnvPoolGames:
    """G games of EnvPool: single frames, raw rewards, no limit on the episode.

    Args:    seeds [G] of the emulators; threads of the emulators.
    Raises:  ImportError without envpool; ValueError on an unknown game, or on no no-ops at the
             start of a game that is not started by FIRE.
    """

    def __init__(
        self, config: AtariEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
    ) -> None:
        try:
            import envpool
            from envpool.atari.registration import atari_game_list
        except ImportError as error:
            raise ImportError(
                f"backend 'envpool' needs envpool ({error}): pip install 'cerl[atari]'"
            ) from error
        names = [camel_case(rom) for rom in atari_game_list]
        check_known(config.name, names)
        self.fire = fire_action(config)
        presses = config.fire_reset and self.fire is not None
        if config.noop_max == 0 and not presses:
            raise ValueError(
                "env.noop_max: EnvPool plays at least one no-op frame where it presses no FIRE, "
                f"got 0 for {config.name}; set env.noop_max to 1 or more, or env.backend to 'ale'"
            )
        # Its count of no-ops is 1..noop_max; FIRE takes the place of one.
        self._env: Any = envpool.make_gymnasium(
            f"{config.name}-v5",
            num_envs=len(seeds),
            batch_size=len(seeds),
            num_threads=threads,
            seed=[int(seed) for seed in seeds],
            max_episode_steps=2**30,
            stack_num=1,
            frame_skip=config.frame_skip,
            noop_max=config.noop_max + int(presses),
            use_fire_reset=config.fire_reset,
            episodic_life=False,
            reward_clip=False,
            use_inter_area_resize=True,
            full_action_space=config.full_actions,
            repeat_action_probability=config.sticky,
        )
        self.actions = int(self._env.action_space.n)

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games, of the indices `which` or of all. Returns: frames and lives."""
        frame, info = self._env.reset(*(() if which is None else (which.astype(np.int32),)))
        return frame[:, 0], info["lives"]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: frame [G, 84, 84], raw reward [G], game over [G] bool, lives [G].

        A game that was over starts anew instead and returns its first frame and reward 0.
        """
        frame, reward, _, _, info = self._env.step(action.astype(np.int32))
        # The info's flag is the emulator's game over, without EnvPool's own notion of truncation.
        return frame[:, 0], reward, info["terminated"].astype(bool), info["lives"]

    def close(self) -> None:
        self._env.close()
        del self._env


class AtariPool:
    """A VecEnv of S x E Atari games.

    With `life_loss`, a lost life is terminal for the agent and the game plays on. On the step after
    it, the agent's action is ignored as after any episode's end; the game plays one agent step of
    no-op (of FIRE with `fire_reset`, where the game has it), whose reward is dropped, and its frame
    is the first of the next episode. Should the game end in that very step, a new game starts at
    once. `time_limit` counts the agent steps of a whole game; reaching it truncates unless the game
    ends.

    Steps have memory of their own: they stay valid as long as somebody holds them. The emulators
    cannot be saved: `load_state_dict` builds new ones with new seeds and starts new episodes.

    Args:    seeds are the user's numbers; salt separates consumers (training, evaluation) of a
             seed.
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
    ) -> None:
        self._config, self._seeds, self._salt = config, tuple(seeds), salt
        self._generation = 0
        self._games = self._build()
        self.spec = EnvSpec(
            name=config.name,
            observation=(84, 84),
            dtype=torch.uint8,
            actions=self._games.actions,
            envs=config.envs,
            frames=config.frame_skip,
            resident=False,
            exact_state=False,
        )
        self._outbox = Outbox(self.spec, seeds=len(seeds), device=device)
        games = len(seeds) * config.envs
        self._elapsed = np.zeros(games, dtype=np.int64)  # agent steps of the game
        self._lives = np.zeros(games, dtype=np.int64)
        self._over = np.zeros(games, dtype=bool)  # the game ended: its next step is its reset
        self._lost = np.zeros(games, dtype=bool)  # a life was lost, the game plays on
        self._cut = np.zeros(games, dtype=bool)  # the time limit came: has to be reset

    def _build(self) -> Games:
        config = self._config
        seeds = simulator_seeds(
            self._seeds, salt=self._salt, envs=config.envs, generation=self._generation
        )
        threads = worker_threads(config.threads, simulators=len(seeds))
        make = EnvPoolGames if config.backend == "envpool" else AleGames
        return make(config, seeds=seeds, threads=threads)

    def reset(self) -> Step:
        """Starts a new game everywhere."""
        frame, lives = self._games.reset(None)
        self._lives[:] = lives
        for array in (self._elapsed, self._over, self._lost, self._cut):
            array[:] = 0
        return self._outbox.send(frame, np.zeros(len(lives)), self._over, self._cut)

    def step(self, action: Tensor) -> Step:
        """Advances every game by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions) on any device; ignored where the last step
                 ended an episode.
        Raises:  ValueError on a wrong shape, dtype or an action out of range.
        """
        config, limit = self._config, self._config.time_limit
        starts = self._over | self._lost | self._cut
        shape = (len(self._seeds), config.envs)
        act = host_actions(
            action, name=config.name, count=self.spec.actions, ignored=starts.reshape(shape)
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
        """How often the emulators were built; they themselves cannot be saved."""
        return {"generation": self._generation}

    def load_state_dict(self, state: dict[str, Any]) -> Step:
        """Builds new emulators with seeds of their own. Returns: the first Step of new episodes."""
        self._generation = int(state.get("generation", 0)) + 1
        self._games.close()
        self._games = self._build()
        return self.reset()

    def close(self) -> None:
        """Frees the emulators and their threads."""
        self._games.close()
