"""Keeps NaN and infinities, from a simulator or from a policy, out of replay.

One NaN in a batch would become a NaN in every parameter of its seed. A number counts as finite if
it is finite in the type in which replay stores it: a reward of 1e39 is infinite in float32.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

# Counts of an environment's cuts at which a warning is given: 1, 10, 100, ...
_POWERS = frozenset(10**power for power in range(19))


def _finite(values: np.ndarray) -> bool:
    """Whether all numbers are finite."""
    # The sum of squares is NaN or infinite if any number is, and takes one fast pass. It also
    # overflows for large finite numbers, so only a finite sum settles the question.
    if values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)):
        return True
    return bool(np.isfinite(values).all())


class Watch:
    """Finds numbers that are not finite, in observations and rewards and in actions.

    With `diverged` "error" the run stops with a message that names the environment. With "cut" the
    episode is truncated at that step: the step returns the previous observation again with reward 0
    (a transition that ends where it began, and bootstraps from there), a warning names the
    environment, and the next step starts a new episode. Other environments and seeds are not
    affected. `cuts` [S * E] counts the cuts of each environment; a warning is given at the 1st,
    10th, 100th, ... of them.

    Args:    name of the task, for messages; seeds are the user's numbers, S of them; envs, E per
             seed.
    """

    def __init__(
        self, diverged: Literal["error", "cut"], *, name: str, seeds: Sequence[int], envs: int
    ) -> None:
        self._name, self._seeds, self._count, self._cut = name, seeds, envs, diverged == "cut"
        self.cuts = np.zeros(len(seeds) * envs, dtype=np.int64)

    def where(self, index: int, step: int | None = None) -> str:
        """Text for messages: task, seed and environment of simulator `index` (of S * E), and the
        agent step of its episode if `step` is given."""
        seed, env = divmod(index, self._count)
        when = {None: "", 0: ", at the start of an episode"}.get(step, f", agent step {step}")
        return f"{self._name}, seed {self._seeds[seed]}, environment {env}{when}"

    def controls(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Replaces actions that are not finite by 0.

        Args:    action [G, A], G = S * E.
        Returns: the actions [G, A]; [G] bool, True in rows where a number was replaced.
        Raises:  RuntimeError if `diverged` is "error" and a number is not finite.
        """
        if _finite(action):
            return action, np.zeros(len(action), dtype=bool)
        bad = ~np.asarray(np.isfinite(action).all(-1))
        self._report(bad, action, "action", "the policy's parameters diverged")
        return np.nan_to_num(action, nan=0.0, posinf=0.0, neginf=0.0), bad

    def results(
        self,
        obs: np.ndarray,
        reward: np.ndarray,
        before: np.ndarray,
        *,
        fresh: np.ndarray,
        elapsed: np.ndarray,
    ) -> np.ndarray:
        """Looks for numbers in a step's results that are not finite.

        Where there are any, `obs` and `reward` are changed in place: the observation becomes that
        of the step before, and the reward 0.

        Args:    obs [G, ...], in the type of replay; before [G, ...], `obs` of the step before;
                 reward [G] of any float type; fresh [G] bool, True where obs is the first of an
                 episode; elapsed [G], agent steps of the episodes.
        Returns: [G] bool, True for episodes that have to be cut.
        Raises:  RuntimeError where a number is not finite if `diverged` is "error"; with "cut" only
                 if it is in a first observation, which has none before it.
        """
        with np.errstate(over="ignore"):
            stored = reward.astype(np.float32, copy=False)
        if _finite(obs) and _finite(stored):
            return np.zeros(len(obs), dtype=bool)
        why = "the simulator diverged or divides by zero"
        bad = np.zeros(len(obs), dtype=bool)
        for what, values, given in (("observation", obs, obs), ("reward", stored, reward)):
            if values.dtype.kind == "f":
                rows = ~np.asarray(np.isfinite(values.reshape(len(values), -1)).all(-1))
                self._report(rows & fresh, given, f"first {what}", why, elapsed, cut=False)
                self._report(rows & ~bad, given, what, why, elapsed)
                bad |= rows
        obs[bad], reward[bad] = before[bad], 0
        return bad

    def _report(
        self,
        rows: np.ndarray,
        values: np.ndarray,
        what: str,
        why: str,
        elapsed: np.ndarray | None = None,
        *,
        cut: bool = True,
    ) -> None:
        """Counts and warns of the episodes in `rows` [G] bool.

        Args:    values [G, ...], of which those in `rows` are shown; what they are and why they may
                 not be finite, for the message; cut, whether these episodes may be cut at all.
        Raises:  RuntimeError for the first one if it may not be cut, or `diverged` is "error".
        """
        for index in np.flatnonzero(rows):
            where = self.where(int(index), None if elapsed is None else int(elapsed[index]))
            value = values[index]
            # If the simulator's own number is finite, it became infinite only in replay's type.
            kind = " in float32" if np.isfinite(value).all() else ""
            text = f"{where}: expected a finite {what}{kind}, got {value}; {why}"
            if not (cut and self._cut):
                hint = "; env.diverged 'cut' ends such episodes and goes on" if cut else ""
                raise RuntimeError(text + hint)
            self.cuts[index] += 1
            if self.cuts[index] in _POWERS:
                text += f"; its episode is cut, the {self.cuts[index]}. of this environment"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
