"""Whether an allocation fits, asked before it is made."""

import torch

LESS_CACHE = "use fewer seeds, environments or evaluation episodes, or a smaller sequence.cache"


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def check_fits(wanted: int, device: torch.device, *, what: str, hint: str = "") -> None:
    """Raises RuntimeError with the numbers, before any allocation, if `wanted` bytes do not fit.

    Args: hint, what to do about it; by default that of a replay buffer.
    """
    if not wanted:
        return
    try:
        free = free_bytes(device)
    except OSError:  # no /proc: the allocation itself will tell
        return
    if wanted > 0.95 * free:
        if not hint:
            hint = "use fewer seeds or a smaller replay.capacity"
            if device.type == "cuda":
                hint += ", or set replay.placement to host (pinned memory)"
        raise RuntimeError(
            f"{what} needs {wanted / 2**30:.2f} GiB on {device}, "
            f"where {free / 2**30:.2f} GiB are free; {hint}"
        )
