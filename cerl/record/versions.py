"""versions.yaml: the versions and device of every session of a run, oldest first.

A session is one process that trains the run. A fork begins with the sessions of the run that it
comes from, which name that run. A resumed run continues bit for bit only with the same
versions and on the same kind of device.
"""

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cerl import __version__
from cerl.config import ConfigError, preset
from cerl.record import files
from cerl.text import visible

FILE = "versions.yaml"
_LARGEST = 1 << 22  # bytes
# Packages whose version may change results, e.g. by rounding differently.
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "gymnasium",
    "envpool",
    "ale-py",
    "mujoco",
    "dm-control",
    "popgym",
)

Entry = dict[str, Any]


def versions() -> dict[str, str]:
    """The versions that results may depend on: of cerl, Python, the system, and `PACKAGES`."""
    found = {"cerl": __version__, "python": platform.python_version()}
    found["machine"] = platform.platform()
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def device_kind(device: Any) -> str:
    """The model of a device, e.g. NVIDIA H200, or cpu. Args: device, a torch.device or its name."""
    import torch  # its import takes seconds, and presets are loaded without it

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def record_versions(folder: Path, device: Any) -> list[str]:
    """Adds an entry for the session that starts; only for the writer of the folder.

    Args:    folder of the run; device, a torch.device.
    Returns: sentences on what differs from the session before. If the file cannot be read, it is
             renamed, and a sentence says so.
    Raises:  OSError if the file cannot be written.
    """
    path, sentences = folder / FILE, []
    try:
        entries = read(path)
    except (OSError, ConfigError) as error:
        aside = path.with_name(f"damaged-{time.time_ns()}-{FILE}")
        os.replace(path, aside)
        entries = []
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{path}: {error.strerror or error}"
        sentences.append(f"{visible(reason)}; renamed to {aside.name}")
    now = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    now |= {"device": device_kind(device)} | versions()
    if entries:
        sentences += differences(entries[-1], now)
    write(folder, [*entries, now])
    return sentences


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """Writes the file of a run folder. Raises: OSError."""
    files.write_text(folder / FILE, yaml.safe_dump([*entries], sort_keys=False))


def differences(before: Entry, now: Entry) -> list[str]:
    """Sentences on versions and device that differ between two sessions."""
    changed = []
    for name in ("device", "cerl", *PACKAGES):
        old, new = (visible(str(entry.get(name) or "none")) for entry in (before, now))
        if old != new and (name != "device" or "device" in before):
            what = "on" if name == "device" else f"under {name}"
            changed.append(f"resumed {what} {new} instead of {old}: bits may differ from here on")
    return changed


def read(path: Path) -> list[Entry]:
    """The entries of the file; [] if it is missing. Raises: OSError, ConfigError."""
    try:
        content, _ = files.read_small(path, most=_LARGEST)
    except FileNotFoundError:
        return []
    found = preset.parsed(content, where=str(path))
    entries = [found] if isinstance(found, dict) else found
    plain = str | int | float | None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(value, plain) for value in entry.values())
        for entry in entries
    ):
        raise ConfigError(f"{path}: expected a list of `package: version` lines")
    return entries
