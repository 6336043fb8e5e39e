"""Atari games by ale-py's vector environment (C++ threads; the wheel contains the game ROMs).

Differs from the environment of Lin et al. 2024: the emulator is ALE 0.12, theirs is 0.7.5. Theirs
checks for game over before it acts, so a terminal comes one emulator frame later there, with reward
0. Changes between the two versions in single games are not undone. ale-py does not show the last
frame of a game: the observation after a terminal, which no loss reads, is an earlier frame. Every
option of their environment exists here, a start without no-op frames included.

A game is saved as the actions and resets since its emulator was last seeded, and is restored by
playing them again. Seeding an emulator loads the cartridge anew, which takes as long as 250 agent
steps. So it is done every few thousand steps, not at the start of every game.
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
from cerl.state import CheckpointError

# Cartridges for two players, which ale-py includes but one player alone cannot play.
TWO_PLAYERS = {"Combat", "Joust", "MazeCraze", "Warlords"}
# Games without FIRE in the full action set of the console, and in their own minimal one.
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
    """A game's name as EnvPool and cerl spell it, from that of its ROM: space_invaders becomes
    SpaceInvaders."""
    return "".join(part.capitalize() for part in rom.split("_"))


def fire_action(config: AtariEnv) -> int | None:
    """The index of FIRE among the game's actions; None if the game has no such action.

    It is taken from the tables above, since EnvPool does not say what its actions mean.
    """
    if config.name in (NO_FIRE_FULL if config.full_actions else NO_FIRE_MINIMAL):
        return None
    return 0 if config.name in FIRE_FIRST and not config.full_actions else 1


def check_known(name: str, games: Collection[str]) -> None:
    """Raises: ValueError with the nearest names if a back end's games lack this one."""
    if name not in games:
        # From ids of gymnasium and gym, such as ALE/Pong-v5 and PongNoFrameskip-v4, take the game.
        game = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", name)
        raise ValueError(
            f"env.name: no Atari game is called {name!r}{nearest(game, games)}; "
            f"`cerl list` prints all {len(games)}"
        )


# If the record of a game is at least this long (agent steps), the next start of a game seeds the
# emulator and begins a new record. With this value seeding takes 5% of the emulation's time, and a
# saved game is played again in one or two seconds.
_STRETCH = 5000
# In the record of a game's actions, this bit of an action says that the game was reset after it.
_RESET = 128


class AleGames:
    """G games of ale-py's AtariVectorEnv: single frames, raw rewards, no limit on the episode.

    Args:    seeds [G] of the emulators; threads of the emulators; colour, frames are the console's
             picture [210, 160, 3] instead of [84, 84], in the same games.
    Raises:  ImportError without ale-py; ValueError on an unknown game.
    """

    def __init__(
        self,
        config: AtariEnv,
        *,
        seeds: Sequence[int] | np.ndarray,
        threads: int,
        colour: bool = False,
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
        # ale-py draws the number of no-op frames below its `noop_max`, and presses FIRE in place of
        # one of them.
        noop_max = config.noop_max + 1 + int(config.fire_reset and self.fire is not None)
        self._env = AtariVectorEnv(
            games[config.name],
            len(seeds),
            num_threads=threads,
            max_num_frames_per_episode=2**30,
            repeat_action_probability=config.sticky,
            full_action_space=config.full_actions,
            stack_num=1,
            grayscale=not colour,
            img_height=210 if colour else 84,
            img_width=160 if colour else 84,
            frameskip=config.frame_skip,
            maxpool=True,
            noop_max=noop_max,
            use_fire_reset=config.fire_reset,
            reward_clipping=False,
        )
        chosen = self._env.ale.get_action_set()
        self.actions = len(chosen)
        self.meanings = tuple(action.name.lower() for action in chosen)
        self._count = len(seeds)
        # Actions since the last seeding, [G, steps so far and room for more].
        self._given = np.zeros((self._count, 1024), dtype=np.uint8)
        self.observation: tuple[int, ...] = (210, 160, 3) if colour else (84, 84)
        self._frame = np.zeros((self._count, *self.observation), dtype=np.uint8)
        self.reseed(seeds)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """Gives the emulators new seeds [G]. The caller then has to reset all games."""
        self._seeds = np.asarray(seeds, dtype=np.int64)  # [G] in [1, 2**31)
        self._seedings = np.zeros(self._count, dtype=np.int64)  # how often each emulator was seeded
        self._length = np.zeros(self._count, dtype=np.int64)  # agent steps in the record
        self._over = np.zeros(self._count, dtype=bool)  # the last step ended the game

    def _restart(self, which: np.ndarray, *, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games where the mask `which` [G] is True, after seeding if `seeded`.

        Returns: frames [G, 84, 84] uint8 and lives [G] of all games.
        """
        seeds = None
        if seeded:
            # An emulator's first seeding uses its own seed; later ones add multiples of a large
            # odd number, which spreads them over the range.
            later = (self._seeds - 1 + (self._seedings - 1) * 0x9E3779B1) % (2**31 - 1)
            seeds = 1 + later[which]
        options = None if which.all() else {"reset_mask": which}
        frame, info = self._env.reset(seed=seeds, options=options)
        return frame[:, 0], info["lives"]

    def reset(self, which: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Starts new games in the emulators with the indices `which` (None: in all).

        Returns: frames [len(which), 84, 84] uint8 and lives [len(which)].
        """
        chosen = np.ones(self._count, dtype=bool)
        if which is not None:
            chosen[:] = False
            chosen[which] = True
        # A reset without seeding is noted at the last action in the record. Without any action, as
        # when two resets follow each other, the emulator has to be seeded.
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
        """The games' actions since their emulators were seeded, one byte an agent step, and
        checksums of their last frames."""
        given = [row[:length] for row, length in zip(self._given, self._length, strict=True)]
        return {
            "seedings": torch.from_numpy(self._seedings.copy()),
            "lengths": torch.from_numpy(self._length.copy()),
            "given": torch.from_numpy(np.concatenate(given)),
            "frames": torch.from_numpy(self._checksums()),
        }

    def _checksums(self) -> np.ndarray:
        """Checksums of the last frames, [G] int64."""
        return np.array([zlib.crc32(frame.tobytes()) for frame in self._frame], dtype=np.int64)

    def restore(
        self, saved: Any, *, seeds: Sequence[int] | np.ndarray, where: str
    ) -> tuple[np.ndarray, bool]:
        """Plays the saved games again.

        Args:    seeds [G] that the emulators had.
        Returns: lives [G], and whether the last frames equal those that were saved (under another
                 version of the emulator they may not).
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
        """Plays the recorded actions, all games side by side. Returns: lives [G].

        All records are aligned at their ends: a game with a shorter record is seeded later, and its
        emulator plays no-ops until then.
        """
        longest = int(self._length.max())
        start = longest - self._length
        games = np.arange(self._count)
        # ale-py has to reset all games once before it can reset some.
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
        """Frees the emulators and their threads."""
        self._env.close()
        del self._env
