"""Help texts of the command line: the list of commands, the help of one, lists of presets etc."""

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
    """Whether to show the help of a command itself, not that of a preset, run or benchmark.

    Args: name, of the command; rest, the words after it. A command without any words shows its
          help, except `list`, which then lists everything.
    """
    if not rest:
        return name != "list"
    return rest[0] in HELP or (name in ("sweep", "report", "list") and asks_help(rest))


def show(name: str, command: type) -> None:
    """Prints the help of a command: its docstring, its options, and the presets, studies or
    benchmarks that it takes."""
    with contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=f"cerl {name}")
    if name in LISTS:
        print("\n".join([f"{LISTS[name]}:", *listed(LISTS[name])]))


def listed(what: str) -> list[str]:
    """Lines with the name of every preset, study, environment or benchmark, and a description.

    Args: what, one of presets, studies, envs, benchmarks.
    """
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
