"""Parts that all environments on the host share: seeds of simulators, actions, and transfers.

An agent step of a host environment needs two transfers. The actions are copied to the host: the
Collector starts that copy early and does other work meanwhile; `host_actions` and `host_controls`
wait for it. The results are copied to the device as one buffer (`Outbox`), from pinned memory and
without waiting.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cerl import draw
from cerl.config.errors import closest
from cerl.data import EnvSpec, Step
from cerl.device.cores import threads


def simulator_seeds(
    seeds: Sequence[int], *, salt: int, envs: int, generation: int = 0
) -> np.ndarray:
    """A seed of its own for every simulator, hash(seed value, salt, generation, environment).

    Args:    seeds are the user's numbers, S of them; salt gives each consumer of a seed (training,
             evaluation) random numbers of its own; envs, E per seed; generation, another number
             gives other seeds, so that a resumed run does not repeat its first episodes.
    Returns: [S * E] int64 in [1, 2**31). The seeds of a user's seed do not depend on which other
             seeds run beside it.
    """
    key = draw.seed_keys(seeds, salt=salt)
    index = torch.arange(envs).view(1, envs)
    return (1 + draw.bits(key, draw.ENV, generation, index) % (2**31 - 1)).flatten().numpy()


def host_actions(action: Tensor, *, name: str, count: int, ignored: np.ndarray) -> np.ndarray:
    """Discrete actions as a numpy array; waits for the device if the tensor is on one.

    Args:    action [S, E] integer in [0, count) on any device; ignored [S, E] bool, environments
             whose action does not matter (0 is returned for them).
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


# A bound of at least this size stands for an unbounded action; dm_control writes 1e10, for example.
_UNBOUNDED = 1e9


class Bounds:
    """The affine map from an agent's actions in [-1, 1] to a simulator's own bounds.

    Args:    low, high [A] bounds of the simulator's actions; name of the task, for messages.
    Raises:  ValueError unless all bounds are finite, that is below 1e9 in size, and each upper
             bound is above its lower bound.
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
        """The simulator's actions [..., A] float64, from actions [..., A] in [-1, 1].

        -1 and 1 are mapped to the bounds exactly.
        """
        if self._identity:
            return action.astype(np.float64)
        share = (action.astype(np.float64) + 1) / 2
        return self.low * (1 - share) + self.high * share


def host_controls(action: Tensor, *, name: str, count: int, ignored: np.ndarray) -> np.ndarray:
    """Continuous actions as a numpy array; waits for the device if the tensor is on one.

    Args:    action [S, E, count] float32 in [-1, 1] on any device; ignored [S, E] bool,
             environments whose action does not matter (0 is returned for them).
    Returns: [S * E, count] float32. A NaN is no error here: `nonfinite.Watch` handles it.
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
    # The first test is fast, and fails for a number out of range and for a NaN. Only if it fails,
    # the second test finds out whether a number is out of range.
    if not np.abs(values).max() <= 1 and (beyond := np.abs(values) > 1).any():
        seed, env, component = np.argwhere(beyond)[0]
        raise ValueError(
            f"{name}: expected actions in [-1, 1], got {values[seed, env, component]} at seed row "
            f"{seed}, environment {env}, component {component}; environments scale them themselves"
        )
    return values.reshape(-1, count)


def worker_threads(asked: int, *, simulators: int) -> int:
    """The number of simulator threads.

    Args: asked, that number, or 0: then as many as this process has threads (OMP_NUM_THREADS, else
          one for each core), but at most one for each simulator.
    """
    return asked or min(simulators, threads())


class Outbox:
    """Sends the results of a step to the device as one buffer, from pinned memory on CUDA.

    Every Step has memory of its own, which later steps do not overwrite.

    Args:    spec of the environments; seeds S; device where steps arrive.
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
        # In the buffer, padding follows each field, so that the next field starts at a multiple of
        # 16 bytes. Views of a buffer as another type need such an alignment.
        self._slices = [size for n in used for size in (n, -n % 16)]
        # There are two pinned buffers: one can be filled while the other is still being copied.
        self._turn = 0
        self._staging: list[tuple[Tensor, list[np.ndarray], torch.cuda.Event]] = []
        if self._device.type == "cuda":
            for _ in range(2):
                pinned = torch.zeros(sum(self._slices), dtype=torch.uint8, pin_memory=True)
                into = [field.numpy() for field in self._views(pinned)]
                self._staging.append((pinned, into, torch.cuda.Event()))

    def _views(self, buffer: Tensor) -> Step:
        """The fields of a Step as views of a buffer [bytes] uint8."""
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
        """Starts the copy of a step's results to the device.

        Args:    obs [S * E, ...], whose trailing axes have as many elements as `spec.observation`;
                 the others [S * E].
        Returns: the results on the device, [S, E, ...].
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
