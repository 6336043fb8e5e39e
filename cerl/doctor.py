"""`cerl doctor`: what this machine has, what is missing for what, and whether a tiny run works.

Every finding is fine, an option that is not there (nothing is wrong, and the finding says what it
would be for), or a fault, which says what to do.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

from cerl import __version__
from cerl.record import files, lock
from cerl.record.screen import Screen
from cerl.text import visible

State = Literal["ok", "option", "fault"]
STYLES: dict[State, str] = {"ok": "green", "option": "yellow", "fault": "bold red"}
LEAST_TORCH = (2, 11)
LEAST_DISK = 2**30  # bytes that the disk of the folder for runs should have free
LEAST_MEMORY = 2 * 2**30  # bytes
PATIENCE = 60.0  # seconds that a package may take to be imported


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is a sentence that says what to do."""

    state: State
    text: str
    advice: str = ""


class Extra(NamedTuple):
    """An extra of the package: what it is for, and its modules, by the name of their package."""

    purpose: str
    modules: dict[str, str]
    probe: str = ""  # Python that fails where the extra is installed but does not work


EXTRAS = {
    "atari": Extra(
        "Atari games",
        {"envpool": "envpool", "ale-py": "ale_py"},
        "from ale_py import roms\nassert roms.get_all_rom_ids(), 'ale-py has no ROMs'",
    ),
    "mujoco": Extra("Gym-MuJoCo robots", {"envpool": "envpool"}, "import envpool"),
    "dmc": Extra(
        "dm_control, images of MuJoCo",
        {"dm-control": "dm_control", "mujoco": "mujoco"},
        "import mujoco",
    ),
    "popgym": Extra("the original games of POPGym", {"popgym": "popgym"}),
    "video": Extra("cerl video", {"imageio-ffmpeg": "imageio_ffmpeg", "pillow": "PIL"}),
    "page": Extra("the page of a report, cerl watch", {"plotly": "plotly"}),
    "docs": Extra("make docs", {"zensical": "zensical", "mkdocstrings": "mkdocstrings"}),
    "ray": Extra("sweeps on a Ray cluster", {"ray": "ray"}),
    "wandb": Extra("curves in Weights & Biases", {"wandb": "wandb"}),
    "trackio": Extra("curves in trackio", {"trackio": "trackio"}),
    "test": Extra("make check and make test", {"pytest": "pytest", "MinAtar": "minatar"}),
}


def examine(out: Path, *, quick: bool = False) -> int:
    """Prints all findings.

    Args:    out, the folder for runs, need not exist; quick, leave the self-test out.
    Returns: how many of the findings are faults.
    """
    screen, faults = Screen(), 0
    parts: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("device", device),
        ("extras", extras),
        ("rendering", rendering),
        (f"folder for runs: {out}", lambda: folder(out)),
    ]
    if not quick:
        parts.append(("self-test", self_test))
    for title, part in parts:
        screen.line(title, style="bold")
        for finding in part():
            faults += finding.state == "fault"
            screen.line(f"  {finding.state:7} {finding.text}", style=STYLES[finding.state])
            if finding.advice:
                screen.line(f"          {finding.advice}")
    return faults


def versions() -> Iterator[Finding]:
    """The versions of cerl, Python and what every run needs."""
    yield Finding("ok", f"cerl {__version__}, {Path(__file__).parent}")
    python, name = sys.version_info, f"Python {platform.python_version()}"
    if (3, 11) <= python < (3, 14):
        yield Finding("ok", f"{name}, {platform.platform()}")
    else:
        yield Finding("fault", name, "Install cerl under Python 3.11, 3.12 or 3.13.")
    for package in ("torch", "triton", "numpy", "gymnasium"):
        version = version_of(package)
        advice = f"Install it: pip install -c constraints.txt {package}"
        if version is not None:
            if package == "torch" and _numbers(version) < LEAST_TORCH:
                least = ".".join(map(str, LEAST_TORCH))
                yield Finding("fault", f"torch {version}", f"cerl needs torch {least} or newer.")
            else:
                yield Finding("ok", f"{package} {version}")
        elif package != "triton":
            yield Finding("fault", f"no {package}", advice)
        elif _has_gpu():
            yield Finding("fault", "no triton, which compiles the kernels of a GPU", advice)
        else:
            yield Finding("option", "no triton: needed on a GPU only")


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, (2, 13) of 2.13.0+cu130."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device() -> Iterator[Finding]:
    """GPUs with their driver, and the memory and cores of the machine."""
    import torch

    from cerl.device.cores import cores
    from cerl.device.free import free_bytes

    driver = driver_version()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.device("cuda", index)
            free = free_bytes(card)[0].free
            yield Finding(
                "ok",
                f"cuda:{index} {torch.cuda.get_device_name(card)}, {_size(free)} free, driver "
                f"{driver or 'unknown'}, CUDA {torch.version.cuda}",
            )
    elif driver is None:
        yield Finding("option", "no NVIDIA GPU: runs train on the CPU")
    elif torch.version.cuda is None:
        yield Finding(
            "fault",
            f"a GPU with driver {driver}, but torch {torch.__version__} is a build for CPUs",
            "Install a build of torch for CUDA: pip install --force-reinstall torch, without the "
            "index of CPU builds.",
        )
    else:
        yield Finding(
            "fault",
            f"a GPU with driver {driver}, which torch {torch.__version__} (CUDA "
            f"{torch.version.cuda}) cannot use",
            "Update the driver, or install a build of torch for an older CUDA. The variable "
            "CUDA_VISIBLE_DEVICES must not be empty, and a container must pass the GPU on.",
        )
    free = min((limit.free for limit in free_bytes(torch.device("cpu"))), default=None)
    if free is not None:
        text = f"{cores()} CPU cores, {_size(free)} of memory free"
        if free < LEAST_MEMORY:
            advice = "A small run needs 2 GB: end other processes, or raise the limit of the job."
            yield Finding("fault", text, advice)
        else:
            yield Finding("ok", text)


def driver_version(proc: Path = Path("/proc")) -> str | None:
    """The version of NVIDIA's driver; None without one. Args: proc, another folder in tests."""
    try:
        words = (proc / "driver/nvidia/version").read_text().split()
    except OSError:
        command = shutil.which("nvidia-smi")
        if command is None:
            return None
        asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True)
        return done.stdout.split()[0] if not done.returncode and done.stdout.split() else None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def extras() -> Iterator[Finding]:
    """The extras of the package: installed, and what for; or how to install them."""
    for name, extra in EXTRAS.items():
        command = f"pip install 'cerl[{name}]'"
        missing = [package for package, module in extra.modules.items() if not there(module)]
        if missing:
            text = f"{name}: no {', '.join(missing)}; for {extra.purpose}"
            yield Finding("option", text, f"Install it: {command}")
        elif problem := broken(extra.probe):
            advice = f"Install it anew: {command} --force-reinstall -c constraints.txt"
            yield Finding("fault", f"{name}: does not work ({problem})", advice)
        else:
            found = ", ".join(f"{package} {version_of(package)}" for package in extra.modules)
            yield Finding("ok", f"{name}: {found}; for {extra.purpose}")


def there(module: str) -> bool:
    """Whether a module can be found."""
    return util.find_spec(module) is not None


def broken(probe: str) -> str:
    """Runs Python in a process of its own. Returns: why it fails, "" if it does not."""
    if not probe:
        return ""
    line = [sys.executable, "-P", "-c", probe]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer within {PATIENCE:.0f} seconds"
    if done.returncode == 0:
        return ""
    last = done.stderr.strip().splitlines()
    return visible(last[-1]) if last else f"exit code {done.returncode}"


def rendering() -> Iterator[Finding]:
    """Whether MuJoCo can draw: dm_control from images, and videos of robots."""
    if not there("mujoco"):
        yield Finding("option", "no mujoco, so there is nothing to draw: the extra dmc brings it")
        return
    from cerl.video.scene import find_renderer

    before = os.environ.get("MUJOCO_GL")
    try:
        find_renderer("doctor")
        yield Finding("ok", f"MuJoCo draws with {os.environ.get('MUJOCO_GL', 'the system')}")
    except RuntimeError as error:
        _, _, reason = str(error).partition(": ")
        text = "MuJoCo cannot draw; for videos of robots, and for env.pixels of dm_control"
        yield Finding("option", text, f"{visible(reason)}.")
    finally:
        if before is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = before


def folder(out: Path) -> Iterator[Finding]:
    """The file system of the folder for runs: space, writing, renaming and locks.

    A folder that does not exist is not made: then the nearest one above it is examined.
    """
    place = out.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
        made = files.temporary(place / "cerl-doctor")
        made.mkdir()
    except OSError as error:
        advice = "Choose another folder: --out FOLDER, here and in cerl train or cerl sweep."
        text = f"{place} cannot be written to ({error.strerror or error})"
        yield Finding("fault", text, advice)
        return
    try:
        if free < LEAST_DISK:
            advice = "Free some space, or choose another folder with --out; Atari runs need more."
            yield Finding("fault", f"{_size(free)} of disk space free", advice)
        else:
            yield Finding("ok", f"{_size(free)} of disk space free")
        yield _written(made)
        yield _locked(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _written(made: Path) -> Finding:
    """Whether files can be replaced, and are then what was written."""
    start, path = time.perf_counter(), made / "file"
    try:
        for text in ("one", "other"):
            files.write_text(path, text)
            content, _ = files.read_small(path, most=100)
            if content.decode() != text:
                raise OSError("a replaced file has its old content")
    except OSError as error:
        reason = error.strerror or error
        advice = "Checkpoints need a file system that can rename and flush: choose another --out."
        return Finding("fault", f"a file cannot be replaced ({reason})", advice)
    took = (time.perf_counter() - start) / 2
    return Finding("ok", f"files are written, flushed and renamed in {1000 * took:.0f} ms")


def _locked(made: Path) -> Finding:
    """Whether a lock that one process holds keeps others away."""
    path = made / lock.LOCK
    fcntl = lock.fcntl
    if fcntl is not None and lock.works(path):
        with path.open() as one, path.open() as other:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding("ok", "files can be locked")
    return Finding(
        "option",
        "files cannot be locked here: heartbeats alone show that a run is trained already",
        "Resume a run from one machine at a time, or choose a file system with locks.",
    )


def self_test() -> Iterator[Finding]:
    """A tiny run on the CPU and on the GPU, and what only a GPU does."""
    from cerl import self_test as tests

    checks: list[tuple[str, Callable[[str], str]]] = [("cpu", tests.check_run)]
    if _has_gpu():
        on_gpu = (tests.check_run, tests.check_attention, tests.check_update)
        checks += [("cuda", check) for check in on_gpu]
    for where, check in checks:
        start = time.perf_counter()
        try:
            said = check(where)
        except AssertionError as error:
            yield Finding("fault", f"{where}: wrong numbers", visible(str(error)))
        except Exception as error:  # whatever a broken installation raises is a finding
            reason = visible(str(error).strip().partition("\n")[0])
            yield Finding(
                "fault",
                f"{where}: {type(error).__name__}: {reason}",
                "CERL_DEBUG=1 cerl train catch/ddqn --schedule.steps 2000 shows where it fails; "
                "versions that are tested together stand in constraints.txt.",
            )
        else:
            yield Finding("ok", f"{where}: {said} ({time.perf_counter() - start:.1f} s)")
