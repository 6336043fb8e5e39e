"""The command line: cerl train | eval | sweep | report | bench | list.

Every option of a run comes from `cerl/config/`, help text included. Whatever can go wrong by use is
one clear paragraph on stderr and exit code 2; CERL_DEBUG=1 adds the traceback.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# `python -m cerl` searches the current folder before everything else, `cerl` does not. A module of
# the user's that registers a task is found there all the same (`cerl.envs.gym_task`).
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]


def _leave(number: int, frame: object) -> None:
    """Handles Ctrl-C: ends the process."""
    # RuntimeError: the signal came while something was being printed.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def _prompt_to_leave() -> Iterator[None]:
    """Has Ctrl-C end the process at once, rather than raise an exception in the midst of an import:
    torch and numpy catch it there and go on half imported. A run that saves first sees to that
    itself (`train.stop_flag`)."""
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


with _prompt_to_leave():
    import dataclasses
    import errno
    import re
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any, Literal

    from pydantic import ValidationError

    from cerl import __version__
    from cerl.config import Config, ConfigError, errors, evaluated, preset
    from cerl.config.form import form_of, key_of, overridden, refuse_moved
    from cerl.record.folder import CHANGEABLE, FILE, changeable, check_out, load_file, unchangeable
    from cerl.stop import SAVED, Stopped
    from cerl.sweep.study import load_study
    from cerl.text import visible

USAGE = """\
usage: cerl COMMAND ...

Ensemble exploration in reinforcement learning: populations of seeds x members on one device.

commands:
  train PRESET [OPTIONS]          train one population; every option can be overridden
  train --resume RUN [OPTIONS]    go on from the newest checkpoint of a run folder
  eval RUN [OPTIONS]              play the newest checkpoint: every member, and the aggregate
  sweep PRESET... [OPTIONS]       train presets x environments one after the other, then report
  report RUN... [OPTIONS]          tables and learning curves of finished or running runs
  bench NAME [OPTIONS]            measure this machine: env, update, train, replay, attention, ...
  list [presets|envs]             what can be trained, and on what
  --version                       print the version

`cerl COMMAND --help` explains a command; `cerl train PRESET --help` explains every option of a run,
with its unit and the preset's value. CERL_DEBUG=1 shows the traceback of an error."""

TRAIN = """\
usage: cerl train PRESET [OPTIONS]      e.g. cerl train minatar/cerl --env.name asterix --seeds 0 1
       cerl train FILE.yaml [OPTIONS]   a file of your own (with `base: PRESET` if you like)
       cerl train --resume RUN          go on from the newest checkpoint of the run folder RUN

Of a run only schedule.steps (longer), log.*, device, threads and out can change when it goes on:
`cerl train --resume RUN --schedule.steps 2_000_000`. A run that somebody else made goes on if its
config.yaml names no module to import, or with --trust: then that module's code runs.

`cerl train PRESET --help` explains every option, with its unit and the preset's value. Presets:
"""

EVAL = """\
usage: cerl eval RUN [--episodes N] [--policies NAME...] [--epsilon SHARE] [--trust]

Plays the newest checkpoint of the run folder RUN: every member, and the aggregate policies.
--trust: a module that the config of somebody else's run names may be imported, and its code run.
`cerl eval RUN --help` explains the options, with the run's values."""

SWEEP = """\
usage: cerl sweep PRESET... [--envs NAME...] [--jobs N] [--out FOLDER] [OPTIONS]

Trains every preset on every environment, one run after the other or N at a time, then writes the
report. Started again with the same folder it keeps finished runs and resumes the others.
A PRESET may be a preset, a YAML file, or a study: `demo` (minutes, picks its presets by device),
`curse` (the curse of diversity on MinAtar, five methods, 1M agent steps, for a GPU), `continuous`
(on MuJoCo, three methods), `remember` (four ways to remember) or `curse-memory` (ensembles that
remember).

  --envs NAME...    environments of the presets' family (default: each preset's own)
  --jobs N          runs at a time, as processes of their own (default: 1)
  --out FOLDER      receives the run folders and the report (default: runs/sweep)
  OPTIONS           any option of `cerl train PRESET --help`, applied to every run"""

REPORT = """\
usage: cerl report RUN... [--out FOLDER] [--last K] [--until STEP]

Tables and learning curves. A RUN is a run folder, or a folder that holds run folders.

  --out FOLDER      receives table.md, table.csv, summary.parquet and curves.png
                    (default: the RUN, if there is one only, else report)
  --last K          scores are means over the last K evaluations of a run (default: 1)
  --until STEP      evaluations after this agent step are left out, so that runs that got to
                    different steps are compared at the same one"""

LIST = "usage: cerl list [presets|envs]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: exit code 0; 2 after an expected error; 75 where a run was told to stop and has saved
             all that it needs to go on; 130 where it was interrupted before it could.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    works = arguments[:1] in (["train"], ["sweep"]) and not _asks_help(arguments)
    try:
        with _prompt_to_leave(), contextlib.nullcontext() if works else _reader_may_leave():
            _run(arguments)
        return 0
    except Stopped:
        return SAVED
    except KeyboardInterrupt:
        _say("interrupted", "")
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("CERL_DEBUG") == "1":
            raise
        _say("error: ", _message(error))
        return 2


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Around what only prints: once the reader of a pipe has gone, nothing is left to be said."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich turns a broken pipe into SystemExit.
        if not any(isinstance(e, BrokenPipeError) for e in (error, error.__context__)):
            raise
        # Python flushes the output once more when it ends, and would fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_REMEDIES = {
    errno.EACCES: "it has to be readable and writable for you",
    errno.EPERM: "it has to be readable and writable for you",
    errno.EROFS: "the file system is read-only; copy the folder to another one",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


def _message(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, ValidationError):
        return "\n".join(errors.explained(error, Config))
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        remedy = _REMEDIES.get(error.errno or 0)
        text = f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")
    return f"{text}\n(CERL_DEBUG=1 shows where)"


def _say(head: str, text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    shown = visible(text, lines=True)
    with contextlib.suppress(OSError):
        Console(stderr=True, soft_wrap=True).print(Text.assemble((head, "bold red"), shown))


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    name, rest = arguments[0], arguments[1:]
    if name in ("--version", "-V", "version"):
        print(f"cerl {__version__}")
        return
    if name not in COMMANDS:
        hint = errors.nearest(name, list(COMMANDS))
        raise ConfigError(f"no command {name!r}{hint} (`cerl --help` lists them)")
    _refuse_repeated(rest)
    COMMANDS[name](rest)


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Raises: ConfigError if an option is given twice, of which only the last would count."""
    given = [key for word in arguments if (key := key_of(word))]
    for key in given:
        if given.count(key) > 1:
            raise ConfigError(
                f"--{key}: given {given.count(key)} times, and only the last would count; expected "
                "once, several values one after the other (--seeds 0 1 2)"
            )


def _asks_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(TRAIN + "\n".join(_preset_lines()))
        return
    trusted, arguments = _flag(arguments, "--trust")
    if arguments[:1] == ["--resume"]:
        _resume(arguments[1:], trusted=trusted)
        return
    if trusted or not arguments or arguments[0].startswith("-"):
        got = "--trust, which --resume takes" if trusted else repr(arguments[0])
        raise ConfigError(f"train: expected a preset first, got {got}; see `cerl list`")
    run = overridden(arguments[0], arguments[1:], prog=f"cerl train {arguments[0]}")
    from cerl import train

    folder = train.train(run)
    _print_folder(folder)


def _print_folder(folder: Path) -> None:
    from cerl.record.screen import Screen

    Screen().line(str(folder))


def _resume(arguments: list[str], *, trusted: bool) -> None:
    words, options = _split(arguments)
    if len(words) != 1:
        raise ConfigError(
            f"train --resume: expected one run folder, got {' '.join(words) or 'nothing'}"
        )
    folder = _run_folder(words[0])
    run = load_file(folder / FILE)
    changes = _changes(run, options, folder=folder)
    load_file(folder / FILE, changes)  # refused before seconds of imports
    from cerl import train

    train.resume(folder, changes=changes, trusted=trusted)
    _print_folder(folder)


def _changes(run: Config, options: list[str], *, folder: Path) -> dict[str, Any]:
    """Options of a run that are given, by dotted key.

    Raises: ConfigError if one may not change; SystemExit after --help, or where one cannot be read.
    """
    import tyro

    refuse_moved(options)
    known = set(errors.keys(Config, kinds=run.kinds))
    given = dict.fromkeys(key for word in options if (key := key_of(word)) in known)
    if fixed := [key for key in given if not changeable(key)]:
        raise ConfigError(unchangeable(fixed, folder / FILE))
    form, default = form_of(run, only=CHANGEABLE)
    filled = tyro.cli(
        form,
        default=default,
        args=options,
        prog=f"cerl train --resume {folder}",
        description="Options of a run that may change when it goes on.",
    )
    values = dict(preset.leaves(dataclasses.asdict(filled)))
    return {key: values[key] for key in given}


def _run_folder(name: str | Path) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a run folder, got {_nature(folder)}")
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: expected a run folder, but it has no {FILE}")
    return folder


def _nature(path: Path) -> str:
    return "a file" if path.exists() else "no such folder"


def _eval(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(EVAL)
        return
    folder = _run_folder(arguments[0])
    trusted, options = _flag(arguments[1:], "--trust")
    run = load_file(folder / FILE)
    asked = _eval_options(run, options, prog=f"cerl eval {folder}")
    from cerl import train

    _print_results(train.evaluate(folder, trusted=trusted, **asked))


def _eval_options(run: Config, arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """Those of episodes, policies and epsilon that are given, checked as options of the run."""
    import tyro

    keys = ("episodes", "policies", "epsilon")
    form, default = form_of(run.eval, only=keys)
    filled = tyro.cli(form, default=default, args=list(arguments), prog=prog)
    flags = set(map(key_of, arguments))
    asked = {key: getattr(filled, key) for key in keys if key in flags}
    evaluated(run, asked)  # refused before seconds of imports
    return asked


def _print_results(results: dict[str, Any]) -> None:
    """Mean return of each policy and member over all seeds and episodes."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from cerl.record.results import INDIVIDUAL

    table = Table("policy", "member", "mean return", "std of episodes", "episodes", "mean length")
    for policy, result in results.items():
        for member in range(result.returns.shape[1]):
            # A return may be NaN, of a simulator that diverged; an episode without length was not
            # played.
            there = ~torch.isnan(result.lengths[:, member])
            played = result.returns[:, member][there].double()
            lengths = result.lengths[:, member][there].double()
            table.add_row(
                policy,
                str(member) if policy in INDIVIDUAL else "",
                f"{played.mean():.3f}",
                f"{played.std(correction=0):.3f}",
                str(played.numel()),
                f"{lengths.mean():.1f}",
            )
    Console().print(table, markup=False)


def _sweep(arguments: list[str]) -> None:
    if not arguments or _asks_help(arguments):
        print(SWEEP)
        return
    words, options = _split(arguments)
    where, options = _taken(options, "--envs")
    out, options = _taken(options, "--out")
    jobs, options = _taken(options, "--jobs")
    folder = _one_folder("sweep", out, default="runs/sweep")
    cells = [cell for word in words for cell in _cells(word, options)]
    places = [["--env.name", name] for name in where] if where else [[]]
    runs = [
        overridden(name, [*changes, *place], prog=f"cerl sweep {name}")
        for place in places
        for name, changes in cells
    ]
    if not runs:
        raise ConfigError("sweep: expected at least one preset; see `cerl list presets`")
    from cerl.report import tables
    from cerl.sweep import local

    tables.main(
        local.sweep(runs, folder, jobs=_count("--jobs", jobs, default=1, what="a number of runs")),
        folder,
    )


def _cells(word: str, options: list[str]) -> list[tuple[str, list[str]]]:
    """Presets and their options of one word of a sweep: a preset, or a study's presets."""
    if word not in preset.studies():
        return [(word, options)]
    device, _ = _taken(options, "--device")
    study = load_study(word, _device_kind(device[0] if device else "auto"))
    own = [part for option in study.options.items() for part in _written(*option)]
    return [(name, own + options) for name in study.presets]


def _written(key: str, value: bool | int | float | str) -> list[str]:
    """An option as the command line has it: --log.no-save-replay for a false log.save_replay."""
    if not isinstance(value, bool):
        return [f"--{key}", str(value)]
    group, dot, name = key.rpartition(".")
    return [f"--{group}{dot}{'' if value else 'no-'}{name}"]


def _device_kind(device: str) -> Literal["cpu", "cuda"]:
    if device != "auto":
        return "cpu" if device == "cpu" else "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leading words (negative numbers too), and everything from the first option on."""
    for index, word in enumerate(arguments):
        if word.startswith("-") and not re.match(r"-\.?\d", word):
            return list(arguments[:index]), list(arguments[index:])
    return list(arguments), []


def _taken(arguments: list[str], flag: str) -> tuple[list[str] | None, list[str]]:
    """Words after `flag` up to the next option (None if it is absent), and the other arguments."""
    if flag not in arguments:
        return None, arguments
    at = arguments.index(flag)
    words, rest = _split(arguments[at + 1 :])
    if not words:
        raise ConfigError(f"{flag}: expected a value, got nothing")
    return words, arguments[:at] + rest


def _flag(arguments: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether an option without a value is given, and the other arguments."""
    return flag in arguments, [word for word in arguments if word != flag]


def _count(flag: str, words: list[str] | None, *, default: int, what: str) -> int:
    """A whole number of at least 1, underscores allowed; the default if the flag is absent."""
    text = " ".join(words or [str(default)]).replace("_", "")
    if words and not (re.fullmatch("[0-9]{1,18}", text) and int(text)):
        raise ConfigError(f"{flag}: expected {what}, at least 1, got {' '.join(words)!r}")
    return int(text)


def _one_folder(command: str, out: list[str] | None, *, default: str) -> Path:
    if out and len(out) > 1:
        raise ConfigError(f"{command} --out: expected one folder, got {' '.join(out)}")
    folder = Path(out[0] if out else default)
    check_out(folder, option=f"{command} --out")
    return folder


def _report(arguments: list[str]) -> None:
    if not arguments or _asks_help(arguments):
        print(REPORT)
        return
    names, options = _split(arguments)
    out, options = _taken(options, "--out")
    last, options = _taken(options, "--last")
    until, options = _taken(options, "--until")
    if options:
        raise ConfigError(f"report: no such option {options[0]!r}; see `cerl report --help`")
    if not names:
        raise ConfigError("report: expected at least one run folder; see `cerl report --help`")
    count = _count("report --last", last, default=1, what="a number of evaluations")
    step = _count("report --until", until, default=0, what="a number of agent steps")
    alone = len(names) == 1 and not Path(names[0]).is_file()
    folder = _one_folder("report", out, default=names[0] if alone else "report")
    from cerl.report import tables

    tables.main([Path(name) for name in names], folder, last=count, until=step)


def _bench(arguments: list[str]) -> None:
    from tyro.extras import subcommand_cli_from_dict

    from cerl.bench import attention, checkpoint, pruning, sac, sequences, tiles
    from cerl.bench import runs as bench

    measures = {name: getattr(bench, name) for name in ("env", "update", "train", "replay")}
    measures["sac"] = sac.sac
    measures["sac-tiles"] = sac.sac_tiles
    measures["attention"] = attention.attention
    measures["attention-tiles"] = tiles.attention_tiles
    measures["acp"] = pruning.acp
    measures["checkpoint"] = checkpoint.checkpoint
    measures["memory-update"] = sequences.memory_update
    measures["memory-acting"] = sequences.memory_acting
    measures["memory-length"] = sequences.memory_length
    subcommand_cli_from_dict(
        measures, args=arguments or ["--help"], prog="cerl bench", description=bench.__doc__
    )


def _list(arguments: list[str]) -> None:
    if _asks_help(arguments):
        print(LIST)
        return
    what = arguments or ["presets", "envs"]
    for word in what:
        if word not in ("presets", "envs"):
            raise ConfigError(f"list: expected presets or envs, got {word!r}")
    if "presets" in what:
        print("\n".join(_preset_lines()))
    if "envs" in what:
        from cerl import envs

        for family, names in envs.available().items():
            print(f"{family}: {' '.join(names)}")


def _preset_lines() -> list[str]:
    names = preset.presets()
    width = max(len(name) for name in names)
    return [f"  {name:{width}}  {preset.description(name)}" for name in names]


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "sweep": _sweep,
    "report": _report,
    "bench": _bench,
    "list": _list,
}

if __name__ == "__main__":
    sys.exit(main())
