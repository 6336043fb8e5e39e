"""What environments on the host share: seeds of simulators, actions in, one copy out.

A host environment costs two transfers an agent step: actions come to the host (the Collector sends
them early and works on, `host_actions` and `host_controls` wait for those still on the device), and
`Outbox` sends everything back in one buffer, from pinned memory and without waiting.
"""

import os
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cerl import draw
from cerl.config.errors import closest
from cerl.data import EnvSpec, Step


def simulator_seeds(
    seeds: Sequence[int], *, salt: int, envs: int, generation: int = 0
) -> np.ndarray:
    """A seed of its own for every simulator, hash(seed value, salt, generation, environment).

    Args:    salt separates consumers (training, evaluation) of one seed; generation counts how
             often the simulators were built anew, so that a resumed run does not draw its start
             again.
    Returns: [S * E] int64 in [1, 2**31), the same for a seed alone or among others.
    """
    key = draw.seed_keys(seeds, salt=salt)
    index = torch.arange(envs).view(1, envs)
    return (1 + draw.bits(key, draw.ENV, generation, index) % (2**31 - 1)).flatten().numpy()


def host_actions(action: Tensor, *, name: str, count: int, ignored: np.ndarray) -> np.ndarray:
    """The actions on the host; waits for a device that has them.

    Args:    action [S, E] integer in [0, count) on any device; ignored [S, E] bool, rows whose
             action does not matter (they come back as 0).
    Returns: [S, E] int64.
    Raises:  ValueError on a wrong shape, dtype or an action out of range.
    """
    if tuple(action.shape) != ignored.shape or action.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: expected actions of shape {ignored.shape} and type int64, "
            f"got {tuple(action.shape)} of {action.dtype}"
        )
    values = np.where(ignored, 0, action.detach().cpu().numpy())
    if values.size and (values.min() < 0 or values.max() >= count):
        seed, env = np.argwhere((values < 0) | (values >= count))[0]
        raise ValueError(
            f"{name}: expected actions in [0, {count}), got {values[seed, env]} "
            f"at seed row {seed}, environment {env}"
        )
    return values


# dm_control writes 1e10 where there is no bound.
_UNBOUNDED = 1e9


class Bounds:
    """The affine map from [-1, 1] at the joint to a simulator's own bounds.

    Args:    low, high [A] of the simulator's actions.
    Raises:  ValueError if a bound is infinite (or as good as that: 1e9 and more) or none is above
             the other.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, *, name: str) -> None:
        low, high = (np.asarray(bound, dtype=np.float64).reshape(-1) for bound in (low, high))
        if not (np.abs(low) < _UNBOUNDED).all() or not (np.abs(high) < _UNBOUNDED).all():
            raise ValueError(
                f"env.name: expected bounded actions, got {low.tolist()} to {high.tolist()} of "
                f"{name}; actions are scaled from [-1, 1], so choose an environment with bounds, "
                "or register it with a wrapper that has them"
            )
        if not len(low) or not (low < high).all():
            raise ValueError(
                f"env.name: expected actions whose upper bounds are above the lower ones, got "
                f"{low.tolist()} to {high.tolist()} of {name}"
            )
        self.low, self.high = low, high
        self._identity = bool((low == -1).all() and (high == 1).all())

    def scale(self, action: np.ndarray) -> np.ndarray:
        """Actions [..., A] in [-1, 1] as the simulator takes them, float64; the ends are exact."""
        if self._identity:
            return action.astype(np.float64)
        share = (action.astype(np.float64) + 1) / 2
        return self.low * (1 - share) + self.high * share


def host_controls(action: Tensor, *, name: str, count: int, ignored: np.ndarray) -> np.ndarray:
    """Continuous actions on the host; waits for a device that has them.

    Args:    action [S, E, count] float32 in [-1, 1] on any device; ignored [S, E] bool, rows whose
             action does not matter (they come back as 0).
    Returns: [S * E, count] float32; NaN passes, see `watch.Watch`.
    Raises:  ValueError on a wrong shape, dtype or an action out of range.
    """
    shape = (*ignored.shape, count)
    if tuple(action.shape) != shape or action.dtype != torch.float32:
        raise ValueError(
            f"{name}: expected actions of shape {shape} and type float32, "
            f"got {tuple(action.shape)} of {action.dtype}"
        )
    values = action.numpy(force=True)
    if ignored.any():
        values = np.where(ignored[..., None], np.float32(0), values)
    # One reduction sees everything that is wrong: NaN is not at most 1 either.
    if not np.abs(values).max() <= 1 and (beyond := np.abs(values) > 1).any():
        seed, env, component = np.argwhere(beyond)[0]
        raise ValueError(
            f"{name}: expected actions in [-1, 1], got {values[seed, env, component]} at seed row "
            f"{seed}, environment {env}, component {component}; environments scale them themselves"
        )
    return values.reshape(-1, count)


def worker_threads(asked: int, *, simulators: int) -> int:
    """Threads of a pool: as many as asked for, 0: one for each core, at most one a simulator."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return asked or min(simulators, cores)


class Outbox:
    """Sends the results of a step to the device as one buffer, from pinned memory on CUDA.

    Every Step has memory of its own and stays valid as long as somebody holds it.
    """

    def __init__(self, spec: EnvSpec, *, seeds: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        lead = (seeds, spec.envs)
        fields = [((*lead, *spec.observation), spec.dtype), (lead, torch.float32)]
        self._fields = [*fields, (lead, torch.bool), (lead, torch.bool)]
        self._blank = [
            (shape, torch.empty(0, dtype=dtype).numpy().dtype) for shape, dtype in self._fields
        ]
        used = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._fields]
        # Every field starts aligned for any type; the padding is a slice of its own.
        self._slices = [size for n in used for size in (n, -n % 16)]
        self._turn = 0
        self._staging: list[tuple[Tensor, list[np.ndarray], torch.cuda.Event]] = []
        if self._device.type == "cuda":
            for _ in range(2):
                pinned = torch.zeros(sum(self._slices), dtype=torch.uint8, pin_memory=True)
                into = [field.numpy() for field in self._views(pinned)]
                self._staging.append((pinned, into, torch.cuda.Event()))

    def _views(self, buffer: Tensor) -> Step:
        parts = buffer.split(self._slices)[::2]
        return Step(
            *(
                part.view(dtype).view(shape)
                for part, (shape, dtype) in zip(parts, self._fields, strict=True)
            )
        )

    def send(
        self, obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> Step:
        """The results of a step on the device.

        Args:    obs [S * E, ...] with the elements of spec.observation each; the others [S * E].
        """
        values = (obs, reward, terminated, truncated)
        if not self._staging:
            into = [np.empty(shape, dtype=dtype) for shape, dtype in self._blank]
            _fill(into, values)
            return Step(*map(torch.from_numpy, into))
        self._turn ^= 1
        staging, into, sent = self._staging[self._turn]
        sent.synchronize()
        _fill(into, values)
        buffer = torch.empty(len(staging), dtype=torch.uint8, device=self._device)
        buffer.copy_(staging, non_blocking=True)
        sent.record(torch.cuda.current_stream(self._device))
        return self._views(buffer)


def _fill(into: Iterable[np.ndarray], values: Iterable[np.ndarray]) -> None:
    for field, value in zip(into, values, strict=True):
        field[...] = value.reshape(field.shape)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that look like `name`, for an error message; "" if none does."""
    close = closest(name, known, most=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
