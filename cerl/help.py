"""What the command line says about itself: its commands, the help of one, what can be trained."""

import contextlib
from collections.abc import Mapping, Sequence

import tyro

from cerl import bench
from cerl.arguments import HELP, asks_help
from cerl.config import preset

USAGE = """\
usage: cerl COMMAND ...

Ensemble exploration in reinforcement learning: populations of seeds x members on one device.

commands:
{commands}

`cerl COMMAND --help` explains a command; `cerl train PRESET --help` explains every option of a run,
with its unit and the preset's value. `cerl --version` prints the version. CERL_DEBUG=1 shows the
traceback of an error."""

# What the help of a command lists.
LISTS = {"train": "presets", "sweep": "studies", "bench": "benchmarks"}


def usage(commands: Mapping[str, type]) -> str:
    """All commands, each with the first line of its docstring."""
    first = {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in commands.items()}
    return USAGE.format(commands="\n".join(f"  {name:8}{text}" for name, text in first.items()))


def wanted(name: str, rest: Sequence[str]) -> bool:
    """Whether the help of a command is asked for, and not that of a preset, run or benchmark."""
    if not rest:
        return name != "list"
    return rest[0] in HELP or (name in ("sweep", "report", "list") and asks_help(rest))


def show(name: str, command: type) -> None:
    """Prints the help of a command: its docstring, its options, and what can be given to it."""
    with contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=f"cerl {name}")
    if name in LISTS:
        print("\n".join([f"{LISTS[name]}:", *listed(LISTS[name])]))


def listed(what: str) -> list[str]:
    """Lines with the names of presets, studies, environments or benchmarks, and what they are."""
    if what == "envs":
        from cerl import envs

        return [f"{family}: {' '.join(names)}" for family, names in envs.available().items()]
    if what == "presets":
        told = {name: preset.description(name) for name in preset.presets()}
    elif what == "studies":
        files = {name: str(preset.FOLDER / f"{name}.yaml") for name in preset.studies()}
        told = {name: preset.description(path) for name, path in files.items()}
    else:
        told = {name: text for name, (_, text) in bench.BENCHMARKS.items()}
    width = max(map(len, told))
    return [f"  {name:{width}}  {text}" for name, text in told.items()]
