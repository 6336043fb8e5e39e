"""Atari games by ale-py's own vector environment (C++ threads, game ROMs in the wheel).

The emulator is ALE 0.12 where the original's is 0.7.5, which reads game-over before acting: there a
terminal came one emulator frame late, with reward 0; what else changed in single games between the
two is not undone. ale-py does not capture a game's very last frame (the observation of a terminal
step shows frames before it), which nothing learns from. Every option of the original's environment
can be had here, a start without no-ops included.

A game is saved as what it was given since its emulator was last seeded, and restored by playing
that again. Seeding loads the cartridge anew, which takes as long as 250 agent steps, so it is done
every few thousand steps and not at every game's start.
"""

import re
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from cerl.config import AtariEnv
from cerl.envs.host import nearest
from cerl.envs.simulator_state import array, entries
from cerl.record.checkpoint import CheckpointError

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
        # Of gymnasium's and gym's ids, such as ALE/Pong-v5 and PongNoFrameskip-v4, the game.
        game = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", name)
        raise ValueError(
            f"env.name: no Atari game is called {name!r}{nearest(game, games)}; "
            f"`cerl list` prints all {len(games)}"
        )


# Agent steps after which a game's next start seeds its emulator: 5% more time for emulation, and a
# second or two a game to play again where it is restored.
_STRETCH = 5000
# Added to an action after which the game was reset, in the record of what a game was given.
_RESET = 128


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
        self.actions = len(self._env.ale.get_action_set())
        self._count = len(seeds)
        self._given = np.zeros((self._count, 1024), dtype=np.uint8)  # since the last seeding
        self._frame = np.zeros((self._count, 84, 84), dtype=np.uint8)
        self.reseed(seeds)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """From the next reset on, which has to be of all games, only these seeds matter."""
        self._seeds = np.asarray(seeds, dtype=np.int64)  # [G] in [1, 2**31)
        self._seedings = np.zeros(self._count, dtype=np.int64)
        self._length = np.zeros(self._count, dtype=np.int64)  # steps in the record
        self._over = np.zeros(self._count, dtype=bool)

    def _restart(self, which: np.ndarray, *, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        """New games of the mask `which` [G] bool. Returns: frames and lives of all games."""
        seeds = None
        if seeded:
            # The first one is the emulator's own, the others lie far from it and from each other.
            later = (self._seeds - 1 + (self._seedings - 1) * 0x9E3779B1) % (2**31 - 1)
            seeds = 1 + later[which]
        options = None if which.all() else {"reset_mask": which}
        frame, info = self._env.reset(seed=seeds, options=options)
        return frame[:, 0], info["lives"]

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games, of the indices `which` or of all. Returns: frames and lives."""
        chosen = np.ones(self._count, dtype=bool)
        if which is not None:
            chosen[:] = False
            chosen[which] = True
        # A second reset in a row has no step in the record that it could be noted at.
        due = chosen & ((self._length >= _STRETCH) | (self._length == 0))
        frame, lives = self._frame, np.zeros(self._count, dtype=np.int64)
        if (chosen & ~due).any():
            again = np.flatnonzero(chosen & ~due)
            self._given[again, self._length[again] - 1] |= _RESET
            frame, lives = self._restart(chosen & ~due, seeded=False)
        if due.any():
            self._seedings[due] += 1
            self._length[due] = 0
            frame, lives = self._restart(due, seeded=True)
        self._over[chosen] = False
        self._frame = frame
        return frame[chosen], lives[chosen]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: frame [G, 84, 84], raw reward [G], game over [G] bool, lives [G].

        A game that was over starts anew instead and returns its first frame and reward 0.
        """
        if self._length.max() == self._given.shape[1]:
            self._given = np.pad(self._given, ((0, 0), (0, self._given.shape[1])))
        self._given[np.arange(self._count), self._length] = action
        self._length += 1
        frame, reward, over, _, info = self._env.step(action.astype(np.int32))
        frame, lives = frame[:, 0], info["lives"]
        self._frame = frame
        due = np.flatnonzero(self._over & (self._length >= _STRETCH))
        if len(due):
            frame[due], lives[due] = self.reset(due)
            self._frame = frame
        self._over = over.copy()
        return frame, reward, over, lives

    def state(self) -> dict[str, Any]:
        """What the games were given since their emulators were seeded, one byte an agent step."""
        given = [row[:length] for row, length in zip(self._given, self._length, strict=True)]
        return {
            "seedings": torch.from_numpy(self._seedings.copy()),
            "lengths": torch.from_numpy(self._length.copy()),
            "given": torch.from_numpy(np.concatenate(given)),
            "frames": torch.from_numpy(self._checksums()),
        }

    def _checksums(self) -> np.ndarray:
        """Of the last frames, [G] int64."""
        return np.array([zlib.crc32(frame.tobytes()) for frame in self._frame], dtype=np.int64)

    def restore(
        self, saved: Any, *, seeds: Sequence[int] | np.ndarray, where: str
    ) -> tuple[np.ndarray, bool]:
        """Plays the saved games again.

        Args:    seeds [G] that the emulators had.
        Returns: lives [G], and whether the games ended up with the frames that were saved (another
                 version of the emulator may play otherwise).
        Raises:  CheckpointError if the state does not fit; then nothing is changed.
        """
        entries(saved, ["seedings", "lengths", "given", "frames"], where=where)
        count = (self._count,)
        seedings = array(saved["seedings"], count, np.int64, where=f"{where}.seedings")
        lengths = array(saved["lengths"], count, np.int64, where=f"{where}.lengths")
        frames = array(saved["frames"], count, np.int64, where=f"{where}.frames")
        given = array(saved["given"], (-1,), np.uint8, where=f"{where}.given")
        bounded = (lengths >= 0) & (lengths <= len(given)) & (seedings >= 1) & (seedings < 2**31)
        if not bounded.all() or lengths.sum() != len(given):
            raise CheckpointError(
                f"{where}: expected lengths whose sum is the {len(given)} actions given, got "
                f"{lengths.tolist()[:8]} after {seedings.tolist()[:8]} seedings; the saved state "
                "is damaged"
            )
        if len(given) and (given & ~np.uint8(_RESET)).max() >= self.actions:
            raise CheckpointError(
                f"{where}.given: expected actions below {self.actions}, got "
                f"{(given & ~np.uint8(_RESET)).max()}; the saved state is of another game"
            )
        self.reseed(seeds)
        self._seedings, self._length = seedings, lengths
        width = max(1024, int(lengths.max()))
        self._given = np.zeros((self._count, width), dtype=np.uint8)
        self._given[np.arange(width) < lengths[:, None]] = given
        lives = self._play_again()
        return lives, np.array_equal(self._checksums(), frames)

    def _play_again(self) -> np.ndarray:
        """Plays what is in the record, all games side by side. Returns: lives [G].

        Games end in the same step, so one with a shorter record is seeded later; until then its
        emulator runs idle.
        """
        longest = int(self._length.max())
        start = longest - self._length
        games = np.arange(self._count)
        # The library wants all of them reset before some.
        frame, lives = self._restart(np.ones(self._count, dtype=bool), seeded=False)
        for time in range(longest + 1):
            starting = start == time
            if starting.any():
                frame, lives = self._restart(starting, seeded=True)
            if time == longest:
                break
            playing = start <= time
            given = np.where(playing, self._given[games, np.maximum(time - start, 0)], 0)
            frame, _, over, _, info = self._env.step((given % _RESET).astype(np.int32))
            frame, lives, self._over = frame[:, 0], info["lives"], over
            if (reset := given >= _RESET).any():
                frame, lives = self._restart(reset, seeded=False)
                self._over = self._over & ~reset
        self._over = self._over & (self._length > 0)
        self._frame = frame
        return lives

    def close(self) -> None:
        self._env.close()
        del self._env
