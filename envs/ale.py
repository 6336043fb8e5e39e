"""Atari games by ale-py's own vector environment (C++ threads, game ROMs in the wheel).

The emulator is ALE 0.12 where the original's is 0.7.5, which reads game-over before acting: there a
terminal came one emulator frame late, with reward 0. ale-py does not capture a game's very last frame
(the observation of a terminal step shows frames before it), which nothing learns from. Everything
else of the original's environment can be had here exactly, no no-ops at the start included.
"""

from collections.abc import Sequence

import numpy as np

from cerl.config import AtariEnv
from cerl.envs.host import nearest

# Two-player cartridges, which the package brings but no single player can play.
TWO_PLAYERS = {"Combat", "Joust", "MazeCraze", "Warlords"}


def camel_case(rom: str) -> str:
    """Name of a game as EnvPool and cerl spell it: space_invaders is SpaceInvaders."""
    return "".join(part.capitalize() for part in rom.split("_"))


class AleGames:
    """G games of ale-py's AtariVectorEnv: single frames, raw rewards, no limit on the episode.

    Args:    seeds [G] of the emulators; threads of the emulators.
    Raises:  ImportError without ale-py; ValueError on an unknown game.
    """

    def __init__(self, config: AtariEnv, *, seeds: Sequence[int] | np.ndarray, threads: int) -> None:
        try:
            from ale_py import roms
            from ale_py.vector_env import AtariVectorEnv
        except ImportError as error:
            raise ImportError(
                f"backend 'ale' needs ale-py ({error}): pip install 'cerl[atari]'"
            ) from error
        games = {camel_case(rom): rom for rom in roms.get_all_rom_ids()}
        for name in TWO_PLAYERS:
            games.pop(name, None)
        if config.name not in games:
            raise ValueError(
                f"env.name: no Atari game is called {config.name!r}{nearest(config.name, games)}; "
                f"`cerl list` prints all {len(games)}"
            )
        # The library subtracts one for FIRE, and one more because its range is open above.
        noop_max = config.noop_max + (2 if config.fire_reset else 1)
        self._env = AtariVectorEnv(
            games[config.name],
            len(seeds),
            num_threads=threads,
            max_num_frames_per_episode=2**30,
            repeat_action_probability=config.sticky,
            full_action_space=config.full_actions,
            stack_num=1,
            frameskip=config.frame_skip,
            maxpool=True,
            noop_max=noop_max,
            use_fire_reset=config.fire_reset,
            reward_clipping=False,
        )
        self._seeds: np.ndarray | None = np.asarray(seeds, dtype=np.int64)
        self._count = len(seeds)
        meanings = [action.value for action in self._env.ale.get_action_set()]
        self.actions = len(meanings)
        self.fire = meanings.index(1) if 1 in meanings else None

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games, of the indices `which` or of all: their frames [., 84, 84] and lives."""
        if which is None:
            frame, info = self._env.reset(seed=self._seeds)
            self._seeds = None
            return frame[:, 0], info["lives"]
        mask = np.zeros(self._count, dtype=bool)
        mask[which] = True
        frame, info = self._env.reset(options={"reset_mask": mask})
        return frame[which, 0], info["lives"][which]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: frame [G, 84, 84], raw reward [G], game over [G] bool, lives [G].

        A game that was over starts anew instead and returns its first frame and reward 0.
        """
        frame, reward, over, _, info = self._env.step(action.astype(np.int32))
        return frame[:, 0], reward, over, info["lives"]

    def close(self) -> None:
        self._env.close()
        del self._env
