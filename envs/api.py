"""The contract of every environment: S x E of them step together and reset themselves.

The step after an episode's last one ignores its action and returns the first observation of the
next episode with reward 0 and both flags False (gymnasium's NEXT_STEP autoreset). A device-resident
environment never syncs with the host, mutates its state tensors in place and steps inside a CUDA
graph. Continuous actions are in [-1, 1]; adapters scale them to the simulator's own bounds.
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
        """How `load_state_dict` went, in a few words; "" if there is nothing to say."""
        ...

    def reset(self) -> Step:
        """Starts a new episode everywhere; rewards 0, flags False."""
        ...

    def restart(self, number: int) -> Step:
        """Starts a new episode everywhere, independent of all that came before.

        What follows depends only on a seed's number, the salt, the index of the environment, and
        `number` (0 to 2**31 - 1): the same number plays the same episodes again, another number
        plays other ones.
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
        """Everything a bit-for-bit continuation needs; where `spec.exact_state` is False, what new
        episodes need that differ from those before."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Step | None:
        """Restores in place. Returns None, or the first Step of new episodes if state was lost."""
        ...

    def close(self) -> None:
        """Frees simulators and threads."""
        ...
