"""Atari games by ale-py's own vector environment (C++ threads, game ROMs in the wheel).

The emulator is ALE 0.12 where the original's is 0.7.5, which reads game-over before acting: there a
terminal came one emulator frame late, with reward 0; what else changed in single games between the
two is not undone. ale-py does not capture a game's very last frame (the observation of a terminal
step shows frames before it), which nothing learns from. Every option of the original's environment
can be had here, a start without no-ops included.
"""

from collections.abc import Collection, Sequence

import numpy as np

from cerl.config import AtariEnv
from cerl.envs.host import nearest

# Two-player cartridges, which the package brings but no single player can play.
TWO_PLAYERS = {"Combat", "Joust", "MazeCraze", "Warlords"}
# Games whose action set lacks FIRE: the minimal one, and all of the console's.
NO_FIRE_FULL = {"LostLuggage", "Skiing"}
NO_FIRE_MINIMAL = NO_FIRE_FULL | {
    "Asterix",
    "CrazyClimber",
    "Freeway",
    "Frogger",
    "JourneyEscape",
    "Koolaid",
    "KungFuMaster",
    "MsPacman",
    "Pacman",
    "Surround",
    "Tutankham",
}
# Games whose minimal set starts with FIRE because it lacks the no-op.
FIRE_FIRST = {"Backgammon", "VideoCheckers"}


def camel_case(rom: str) -> str:
    """Name of a game as EnvPool and cerl spell it: space_invaders is SpaceInvaders."""
    return "".join(part.capitalize() for part in rom.split("_"))


def fire_action(config: AtariEnv) -> int | None:
    """Index of FIRE among the game's actions, None where it has none (EnvPool does not tell)."""
    if config.name in (NO_FIRE_FULL if config.full_actions else NO_FIRE_MINIMAL):
        return None
    return 0 if config.name in FIRE_FIRST and not config.full_actions else 1


def check_known(name: str, games: Collection[str]) -> None:
    """Raises ValueError with the nearest names if a back end has no such game."""
    if name not in games:
        raise ValueError(
            f"env.name: no Atari game is called {name!r}{nearest(name, games)}; "
            f"`cerl list` prints all {len(games)}"
        )


class AleGames:
    """G games of ale-py's AtariVectorEnv: single frames, raw rewards, no limit on the episode.

    Args:    seeds [G] of the emulators; threads of the emulators.
    Raises:  ImportError without ale-py; ValueError on an unknown game.
    """

    def __init__(
        self, config: AtariEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
    ) -> None:
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
        check_known(config.name, games)
        self.fire = fire_action(config)
        # The library's range is open above, and it takes one off for FIRE.
        noop_max = config.noop_max + 1 + int(config.fire_reset and self.fire is not None)
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
        self.actions = len(self._env.ale.get_action_set())

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games, of the indices `which` or of all. Returns: frames and lives."""
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
