"""Free memory, read from files of a made-up machine: control groups, limits, missing files."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cerl.device import free
from cerl.device.free import Limit

CPU = torch.device("cpu")
MIB = 2**20


def machine(root: Path, groups: str, files: Mapping[str, object]) -> Path:
    """A tree of the kernel's files: 8 GiB available, the groups of this process, other files."""
    written = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * MIB} kB\n"}
    for name, text in {**written, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_free_memory_of_this_machine_is_a_plausible_number():
    found = free.free_bytes(CPU)
    assert found and all(0 <= limit.free < 2**50 for limit in found)
    assert any(limit.free > MIB for limit in found)


def test_a_container_is_limited_by_the_smallest_of_its_control_groups(tmp_path):
    files = {
        "sys/fs/cgroup/memory.stat": "inactive_file 0",
        "sys/fs/cgroup/job/memory.max": 3 * 2**30,
        "sys/fs/cgroup/job/memory.high": 2 * 2**30,
        "sys/fs/cgroup/job/memory.current": 2**30,
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {256 * MIB}",
        "sys/fs/cgroup/job/step/memory.max": "max",
        "sys/fs/cgroup/job/step/memory.current": 5,
    }
    root = machine(tmp_path, "0::/job/step", files)
    job = Limit(2**30 + 256 * MIB, str(root / "sys/fs/cgroup/job"))
    assert free.free_bytes(CPU, root=root)[:2] == [Limit(8 * 2**30, free.MACHINE), job]
    folders = [folder.name for folder in free.group_folders(root)]
    assert folders == ["step", "job", "cgroup"]


def test_control_groups_of_version_1_count_too(tmp_path):
    group = "sys/fs/cgroup/memory/slurm"
    files = {
        f"{group}/memory.limit_in_bytes": 2**30,
        f"{group}/memory.usage_in_bytes": 3 * 2**28,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {2**27}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,  # unlimited
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 2**30,
    }
    root = machine(tmp_path, "9:cpu:/\n4:memory:/slurm\n0::/", files)
    groups = [limit for limit in free.free_bytes(CPU, root=root) if "cgroup" in limit.scope]
    assert groups == [Limit(2**28 + 2**27, str(root / group))]


def test_a_container_that_sees_only_the_top_of_its_groups_is_limited_by_it(tmp_path):
    files = {"sys/fs/cgroup/memory.max": 1000, "sys/fs/cgroup/memory.current": 400}
    root = machine(tmp_path, "0::/docker/1d4eb2f8", files)
    assert Limit(600, str(root / "sys/fs/cgroup")) in free.free_bytes(CPU, root=root)


def test_without_the_kernels_files_the_system_is_asked(tmp_path):
    found = free.free_bytes(CPU, root=tmp_path)
    if "SC_PHYS_PAGES" in os.sysconf_names:
        assert found[0].scope == free.MACHINE and found[0].free > MIB
    assert free.group_folders(tmp_path) == []


def test_a_limit_of_the_address_space_counts(tmp_path):
    resource = pytest.importorskip("resource")
    root = machine(tmp_path, "0::/", {"proc/self/statm": "1000 200 1 1 0 1 0"})
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wide = 2**46 if hard == resource.RLIM_INFINITY else min(2**46, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wide, hard))
    try:
        used = 1000 * os.sysconf("SC_PAGE_SIZE")
        assert free.free_bytes(CPU, root=root)[-1] == Limit(wide - used, free.PROCESS)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_allocators_errors_are_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert free.out_of_memory(error.value)
    assert free.out_of_memory(MemoryError())
    assert free.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not free.out_of_memory(RuntimeError("expected a matrix"))
    assert not free.out_of_memory(ValueError("out of memory"))
