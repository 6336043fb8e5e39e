"""Reservations of memory: what runs see of each other, dead runs, damaged files, own folders."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cerl.config import load
from cerl.device import free
from cerl.footprint.estimate import Needs, Part
from cerl.footprint.reservation import check_fits, reserved

GB = 10**9
OTHER = """
import os, sys
from pathlib import Path
from cerl.config import load
from cerl.footprint.estimate import Needs, Part
from cerl.footprint.reservation import reserved
needs = Needs((Part("replay", "cpu", int(sys.argv[3])),), load("catch/ddqn"))
with reserved(needs, root=Path(sys.argv[1]), folder=Path(sys.argv[2])):
    print("reserved", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def place(tmp_path) -> tuple[Path, Path]:
    """The kernel's files, of a machine with 20 GB available, and a folder of reservations."""
    root = tmp_path / "root"
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {20 * GB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("0::/\n")
    resident(root, os.getpid(), 0)
    return root, tmp_path / "reservations"


def resident(root: Path, process: int, size: int) -> None:
    """Says what a process holds."""
    folder = root / f"proc/{process}"
    folder.mkdir(exist_ok=True)
    pages = 1 + size // os.sysconf("SC_PAGE_SIZE")
    (folder / "statm").write_text(f"{pages} {pages} 0 0 0 0 0\n")
    (folder / "stat").write_text(f"{process} (a ) name) R {' '.join(['1'] * 18)} 4711 0\n")


def needs(size: int) -> Needs:
    return Needs((Part("replay", "cpu", size),), load("catch/ddqn"))


def reservation(place: tuple[Path, Path], size: int, *, process: int, **changes) -> Path:
    """A reservation of another process."""
    root, folder = place
    folder.mkdir(mode=0o700, exist_ok=True)
    said = {"process": process, "started": "4711", "before": 4096, "groups": []}
    file = folder / f"{process}.json"
    file.write_text(json.dumps({**said, "wanted": {"cpu": size}, **changes}))
    return file


def test_what_a_run_needs_and_what_is_free_are_said(place):
    root, folder = place
    words = check_fits(needs(GB), root=root, folder=folder)
    assert words == "needs 1.0 GB: replay 1.0; free 20.0 GB on cpu"
    match = r"needs 19\.5 GB: replay 19\.5; 20\.0 GB are free on cpu\."
    with pytest.raises(RuntimeError, match=match):
        check_fits(needs(195 * GB // 10), root=root, folder=folder)


@pytest.mark.slow
def test_a_second_run_sees_what_the_first_will_take(place):
    root, folder = place
    arguments = [sys.executable, "-c", OTHER, str(root), str(folder), str(13 * GB)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, **pipes) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == "reserved\n"
        # The tree shows the other process as the first saw it: it began at the same time.
        said = json.loads((folder / f"{other.pid}.json").read_text())
        resident(root, other.pid, 0)
        (folder / f"{other.pid}.json").write_text(json.dumps({**said, "started": "4711"}))
        with pytest.raises(
            RuntimeError, match=r"7\.0 GB are free .*13\.0 GB more are reserved by other"
        ):
            check_fits(needs(13 * GB), root=root, folder=folder)
        assert "free 7.0 GB" in check_fits(needs(6 * GB), root=root, folder=folder)
        resident(root, other.pid, 5 * GB)  # which free memory is without by now
        assert "free 12.0 GB" in check_fits(needs(6 * GB), root=root, folder=folder)
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait(20) == 0
    assert "free 20.0 GB" in check_fits(needs(13 * GB), root=root, folder=folder)
    assert list(folder.glob("*.json")) == []


def test_a_run_does_not_count_its_own_reservation(place):
    root, folder = place
    with reserved(needs(13 * GB), root=root, folder=folder) as own:
        assert own.words.endswith("free 20.0 GB on cpu")
        assert "free 20.0 GB" in check_fits(needs(13 * GB), root=root, folder=folder)
        said = json.loads((folder / f"{os.getpid()}.json").read_text())
        assert said["wanted"] == {"cpu": 13 * GB} and said["process"] == os.getpid()
    assert list(folder.glob("*.json")) == []


def test_reservations_of_the_dead_are_removed(place):
    root, folder = place
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    dead = reservation(place, 13 * GB, process=gone.pid)
    later = reservation(place, 13 * GB, process=os.getppid(), started="1")  # same number, another
    resident(root, os.getppid(), 0)
    assert "free 20.0 GB" in check_fits(needs(13 * GB), root=root, folder=folder)
    assert not dead.exists() and not later.exists()


def test_files_that_say_nothing_are_passed_over(place):
    root, folder = place
    for number, text in enumerate(["", "[]", '{"process": "x"}', "\x00"]):
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / f"{number}.json").write_text(text)
    assert "free 20.0 GB" in check_fits(needs(GB), root=root, folder=folder)


def test_other_containers_do_not_take_from_this_ones_limit(place):
    root, folder = place
    (root / "proc/self/cgroup").write_text("0::/mine\n")
    mine = root / "sys/fs/cgroup/mine"
    mine.mkdir(parents=True)
    (mine / "memory.max").write_text(str(16 * GB))
    (mine / "memory.current").write_text("0")
    resident(root, os.getppid(), 0)
    reservation(place, 4 * GB, process=os.getppid(), groups=["/sys/fs/cgroup/other"])
    assert "free 16.0 GB on cpu" in check_fits(needs(GB), root=root, folder=folder)
    reservation(place, 4 * GB, process=os.getppid(), groups=[str(mine)])
    assert "free 12.0 GB on cpu" in check_fits(needs(GB), root=root, folder=folder)


def test_the_folder_is_this_users_alone_or_none_is_used(place, tmp_path):
    root, folder = place
    with reserved(needs(GB), root=root, folder=folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for other in (shared, link, tmp_path / "missing/folder"):
        with reserved(needs(GB), root=root, folder=other):
            assert not list(other.glob("*.json"))
    assert os.listdir(shared) == []


def test_where_free_memory_is_unknown_nothing_is_refused(place, monkeypatch):
    root, folder = place
    monkeypatch.setattr(free, "free_bytes", lambda device, root: [])
    assert check_fits(needs(10**18), root=root, folder=folder).startswith(
        "needs 1,000,000,000.0 GB"
    )
