"""Which device a run is on, and setting this process up for it."""

import os

import torch

from cerl.config import Config
from cerl.device.kind import kind_of

THREADS_A_CORE, FEW_THREADS = 4, 64  # many more than cores cannot be started, or crash


def pick(name: str) -> torch.device:
    """The device of a config, made the current one where it has a number (kernels launch there).

    Raises: ValueError if it does not exist here.
    """
    if name == "auto":
        return torch.device(kind_of(name))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"device: {name!r} asked for, but {count} CUDA devices are visible; use cpu"
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def prepare(config: Config) -> torch.device:
    """Sets this process up for a config. Returns: its device.

    Raises: ValueError for a device or a number of threads that this machine does not have.
    """
    device = pick(config.device)
    cores = os.cpu_count() or 1
    most = max(THREADS_A_CORE * cores, FEW_THREADS)
    for key, threads in (("", config.threads), ("env.", getattr(config.env, "threads", 0))):
        if threads > most:
            raise ValueError(
                f"{key}threads: expected at most {most} on this machine of {cores} cores, got "
                f"{threads}; 0 is one for each core"
            )
    torch.set_num_threads(config.threads or cores)
    return device
