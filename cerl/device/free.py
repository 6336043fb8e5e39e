"""How much memory is free: of the machine, of the control groups of this process, of a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path("/")
MACHINE, PROCESS = "machine", "process"
UNLIMITED = 1 << 60  # bytes; a limit of this or more counts as no limit


class Limit(NamedTuple):
    """How many bytes can still be allocated under one limit, and what the limit applies to."""

    free: int  # bytes
    scope: str  # MACHINE, PROCESS, the folder of a control group, or the name of a GPU


def free_bytes(device: torch.device, *, root: Path = ROOT) -> list[Limit]:
    """Bytes that this process can still allocate on a device, under every limit that applies.

    Args:    root, the folder that has /proc and /sys (another one in tests).
    Returns: for a GPU one entry; for the host one for the machine, one for every control group of
             this process with a memory limit, and one for a limit of its address space. [] if
             nothing is known.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return [Limit(free + held, gpu_name(device))]
    return [*_machine(root), *_groups(root), *_address_space(root)]


def gpu_name(device: torch.device) -> str:
    """A name of a GPU that is the same in all processes, whatever its number is there."""
    return f"gpu {torch.cuda.get_device_properties(device).uuid}"


def _machine(root: Path) -> Iterator[Limit]:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                yield Limit(int(line.split()[1]) * 1024, MACHINE)
                return
    except OSError:
        pass
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in os.sysconf_names:
            yield Limit(os.sysconf(name) * os.sysconf("SC_PAGE_SIZE"), MACHINE)
            return


def group_folders(root: Path = ROOT) -> list[Path]:
    """Folders of the control groups (Linux cgroups) of this process, innermost first."""
    folders = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            tops = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        # In a container the path may be the one on the host; then only its top folder exists here.
        inner = Path(path.lstrip("/"))
        folders += [top / part for top in tops for part in (inner, *inner.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _groups(root: Path) -> Iterator[Limit]:
    for folder in group_folders(root):
        two = [_number(folder / name) for name in ("memory.max", "memory.high")]
        one = _number(folder / "memory.limit_in_bytes")
        most = min(value for value in (*two, one, UNLIMITED) if value is not None)
        used = _number(folder / "memory.current")
        if used is None:
            used = _number(folder / "memory.usage_in_bytes")
        if most < UNLIMITED and used is not None:
            yield Limit(max(0, most - used + _reclaimable(folder)), str(folder))


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or it holds `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _reclaimable(folder: Path) -> int:
    """Bytes of a control group's file cache, which the kernel frees when memory is needed."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))


def _address_space(root: Path) -> Iterator[Limit]:
    try:
        import resource
    except ImportError:  # not POSIX
        return
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        yield Limit(max(0, most - pages("self", 0, root=root)), PROCESS)


def pages(process: int | str, column: int, *, root: Path = ROOT) -> int:
    """Bytes of memory of a process, from /proc/<process>/statm; 0 if unknown.

    Args: process, its number or "self"; column, 0 for its address space, 1 for resident memory.
    """
    try:
        numbers = (root / f"proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return int(numbers[column]) * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    signs = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
