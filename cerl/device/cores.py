"""CPU cores and threads of this process; imports no torch."""

import os
import sys


def cores() -> int:
    """How many CPU cores this process may use, at least 1.

    On Linux these are the cores of its affinity mask, which a scheduler such as SLURM or the
    program `taskset` may have narrowed.
    """
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def asked_threads() -> int | None:
    """The number of threads that the environment variable OMP_NUM_THREADS asks for.

    A list such as `4,2` counts for nested loops; its first number is taken.

    Returns: None if the variable is missing, or its value is no number above 0.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def threads() -> int:
    """How many CPU threads a process uses unless its config says: those that OMP_NUM_THREADS asks
    for, else one for each core."""
    return asked_threads() or cores()
