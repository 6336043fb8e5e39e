"""Chooses the device of a run and sets the process up for it."""

import os

import torch

from cerl.config import Config
from cerl.device.cores import cores, threads
from cerl.device.kind import NUMBER, kind_of

# The most threads that may be asked for: 4 per core, or 64 if that is more. With far more threads
# than cores, threads cannot be started, or the process crashes.
THREADS_A_CORE, FEW_THREADS = 4, 64


def pick(name: str) -> torch.device:
    """The device with a config's `device` as name. A GPU with a number becomes the current one of
    this process, since kernels are launched there.

    Raises: ValueError if it does not exist on this machine.
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
            f"device: expected one of the {count} visible CUDA devices, or cpu; got {name!r}"
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def prepare(config: Config) -> torch.device:
    """Sets the device and the number of CPU threads of this process. Returns: the device.

    Raises: ValueError if this machine does not have the device, or too few cores for the threads.
    """
    device = pick(config.device)
    most = max(THREADS_A_CORE * cores(), FEW_THREADS)
    for key, asked in (("", config.threads), ("env.", getattr(config.env, "threads", 0))):
        if asked > most:
            raise ValueError(
                f"{key}threads: expected at most {most} on this machine of {cores()} cores, got "
                f"{asked}; 0 means one per core"
            )
    torch.set_num_threads(config.threads or threads())
    return device


def described(device: torch.device) -> str:
    """A device as text: `cpu`, or the number and model of a GPU, e.g. `cuda:1 NVIDIA H200`.

    The number is the one that the user counts with: if CUDA_VISIBLE_DEVICES is 2,3 then the first
    GPU that this process sees is cuda:2. If the variable names a GPU by its UUID, a sweep tells the
    number (`NUMBER`); else the first 12 characters of the UUID take its place.
    """
    if device.type != "cuda":
        return device.type
    index = torch.cuda.current_device() if device.index is None else device.index
    listed = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    entry = listed[index] if index < len(listed) and listed[index] else str(index)
    entry = os.environ.get(NUMBER, entry)
    place = f"cuda:{entry}" if entry.isdecimal() else entry[:12]
    return f"{place} {torch.cuda.get_device_name(device)}"
