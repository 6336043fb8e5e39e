"""The contract of every environment: S x E of them step together and reset themselves.

The step after an episode's last one ignores its action and returns the first observation of the
next episode with reward 0 and both flags False (gymnasium's NEXT_STEP autoreset). A device-resident
environment never syncs with the host, mutates its state tensors in place and steps inside a CUDA
graph. Continuous actions are in [-1, 1]; an environment scales them to its simulator's bounds.
"""

from typing import Any, Protocol

from torch import Tensor

from cerl.data import EnvSpec, Step


class VecEnv(Protocol):
    """S x E environments of one kind."""

    @property
    def spec(self) -> EnvSpec:
        """Facts that never change: shapes, number of actions, whether it is device-resident."""
        ...

    @property
    def note(self) -> str:
        """What `load_state_dict` did, in a few words for the user; "" if nothing is to be said."""
        ...

    def reset(self) -> Step:
        """Starts a new episode everywhere; rewards 0, flags False."""
        ...

    def restart(self, number: int) -> Step:
        """Starts a new episode everywhere, independent of all earlier episodes.

        The episodes from here on depend only on the seed's number, the salt, the index of the
        environment, `number` (0 to 2**31 - 1) and the actions. The same `number` plays the same
        episodes again, another `number` plays other ones.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """Advances every environment by one agent step.

        Args:    action [S, E] int64 in [0, spec.actions), or where spec.continuous [S, E, actions]
                 float32 in [-1, 1]; ignored where the last step ended an episode. On the device or,
                 unless spec.resident, on the host. The caller may overwrite it after the call.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where `spec.exact_state` is True, everything that a bit-for-bit continuation needs.

        Otherwise only what is needed to start new episodes that differ from all earlier ones.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores a state in place.

        Returns: None, or the first Step of new episodes where the old ones cannot be continued.
        """
        ...

    def close(self) -> None:
        """Frees simulators and threads."""
        ...
