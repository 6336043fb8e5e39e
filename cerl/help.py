"""Help texts of the command line: the list of commands, the help of one, lists of presets etc."""

import contextlib
from collections.abc import Mapping, Sequence

import tyro

from cerl import bench
from cerl.arguments import HELP, asks_help
from cerl.config import lists, preset
from cerl.sweep.study import file, load_study

USAGE = """\
usage: cerl COMMAND ...

Ensemble exploration in reinforcement learning: populations of seeds x members on one device.

commands:
{commands}

`cerl COMMAND --help` explains a command; `cerl train PRESET --help` explains every option of a run,
with its unit and the preset's value. Numbers may be written as 25k, 1.5M or 2G, lists of whole
numbers as ranges: `--seeds 0..4` are five seeds. `cerl --version` prints the version. CERL_DEBUG=1
shows the traceback of an error."""

# What the help of a command lists.
LISTS = {"train": "presets", "sweep": "studies", "bench": "benchmarks"}

# Commands whose --help is that of the command, wherever it stands.
OWN_HELP = (
    "sweep",
    "sweep-run",
    "status",
    "report",
    "watch",
    "video",
    "export",
    "import",
    "list",
    "doctor",
)


def usage(commands: Mapping[str, type]) -> str:
    """All commands, each with the first line of its docstring."""
    first = {name: (kind.__doc__ or "").partition("\n")[0] for name, kind in commands.items()}
    return USAGE.format(commands="\n".join(f"  {name:8}{text}" for name, text in first.items()))


def wanted(name: str, rest: Sequence[str]) -> bool:
    """Whether to show the help of a command itself, not that of a preset, run or benchmark.

    Args: name, of the command; rest, the words after it. A command without any words shows its
          help, except `list`, which then lists everything, and `doctor`.
    """
    if not rest:
        return name not in ("list", "doctor")
    return rest[0] in HELP or (name in OWN_HELP and asks_help(rest))


def show(name: str, command: type) -> None:
    """Prints the help of a command: its docstring, its options, and the presets, studies or
    benchmarks that it takes."""
    with contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=f"cerl {name}")
    if name in LISTS:
        print("\n".join([f"{LISTS[name]}:", *listed(LISTS[name])]))


def listed(what: str) -> list[str]:
    """Lines with the name of every preset, study, environment or benchmark, and a description.

    After the environments come the named lists of them, with their sources.

    Args: what, one of presets, studies, envs, benchmarks.
    """
    if what == "envs":
        return _environments()
    if what == "presets":
        told = {name: preset.description(name) for name in preset.presets()}
    elif what == "studies":
        told = {name: _study(name) for name in preset.studies()}
    else:
        told = {name: text for name, (_, text) in bench.BENCHMARKS.items()}
    width = max(map(len, told))
    return [f"  {name:{width}}  {text}" for name, text in told.items()]


def _environments() -> list[str]:
    """A line for every family, and a paragraph for every named list of environments."""
    from cerl import envs

    lines = [f"{family}: {' '.join(names)}" for family, names in envs.available().items()]
    lines += ["", "lists, for --envs (e.g. --envs minatar-5):"]
    for name, entry in lists.lists().items():
        lines += [f"  {name}: {' '.join(entry.names)}", f"    {entry.source}"]
    return lines


def _study(name: str) -> str:
    """What a study answers and costs, on one line; without these keys, the first comment of its
    file."""
    study = load_study(name, "cuda")
    text = study.answers or preset.description(str(file(name)))
    return " ".join(f"{text} [{study.costs}]".removesuffix(" []").split())
