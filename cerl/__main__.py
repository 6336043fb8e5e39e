"""The command line: cerl train | eval | sweep | report | bench | list.

Each command is a dataclass: its docstring and fields are its help text, and its method `run`
carries it out. `run` gets the words that are no options of the command as `rest`; most of them are
options of a run (`cerl/config/`). A user's error ends with one paragraph on stderr and exit code 2;
CERL_DEBUG=1 adds the traceback.
"""

import sys

# `python -m cerl` puts the current folder first on sys.path, and the script `cerl` does not. It is
# removed, so that both import the same. Modules of a user's tasks are looked up in the current
# folder anyway (`cerl.envs.task_module`).
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

from cerl.terminal import complain, explained, interrupt_ends, note, reader_may_leave

with interrupt_ends():
    import contextlib
    import os
    from collections.abc import Sequence
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Annotated, Any, Protocol

    from tyro.conf import FlagCreatePairsOff, Positional, arg

    from cerl import __version__, arguments, bench, help
    from cerl.config import ConfigError, errors, preset
    from cerl.config.form import overridden
    from cerl.device.kind import kind_of
    from cerl.record.folder import FILE, check_out, load_file
    from cerl.stop import SAVED, Stopped
    from cerl.sweep.study import load_study

# tyro appends "(default: ...)" to the help of an option. This leaves it out where the help text
# says what happens without the option.
UNSAID = arg(help_behavior_hint="")


class Command(Protocol):
    def run(self, rest: list[str]) -> None: ...


@dataclass(frozen=True)
class Train:
    """Train one population, or resume one that stopped.

    E.g. `cerl train minatar/cerl --env.name asterix --seeds 0 1`. Every option of the preset can be
    overridden; `cerl train PRESET --help` explains them, with their units and the preset's values.

    `cerl train --resume RUN` continues a run from its newest checkpoint. Of its options only
    schedule.steps (longer), log.*, diverged, device, threads and out can change then:
    `cerl train --resume RUN --schedule.steps 2_000_000`.
    """

    preset: Annotated[Positional[str], arguments.word("train", "PRESET"), UNSAID] = ""
    """a preset, or a YAML file of your own (with `base: PRESET` if you like)"""
    resume: Annotated[Path | None, arguments.folder("train --resume", "run folder")] = None
    """folder of a run to resume, instead of a preset"""
    trust: FlagCreatePairsOff[bool] = False
    """with --resume: allow a run that another user made to import and run the Python module that
    its config names"""

    def run(self, rest: list[str]) -> None:
        if self.resume is not None:
            self._resume(self.resume, rest)
            return
        if self.trust or not self.preset:
            got = "--trust, which --resume takes" if self.trust else repr(rest[0])
            raise ConfigError(f"train: expected a preset first, got {got}; see `cerl list`")
        run = overridden(self.preset, rest, prog=f"cerl train {self.preset}", note=note)
        from cerl import training

        _print_folder(training.train(run))

    def _resume(self, path: Path, options: list[str]) -> None:
        if self.preset:
            raise ConfigError(f"train: expected {self.preset} or --resume {path}, got both")
        folder = arguments.run_folder(path)
        changes = arguments.changes(load_file(folder / FILE), options, folder=folder)
        load_file(folder / FILE, changes)  # raises an error before the slow import of torch
        from cerl import training

        training.resume(folder, changes=changes, trusted=self.trust)
        _print_folder(folder)


@dataclass(frozen=True)
class Eval:
    """Evaluate the newest checkpoint of a run: every member, and the aggregate policies.

    Options are --episodes, --policies and --epsilon; `cerl eval RUN --help` explains them and shows
    the run's values.
    """

    folder: Annotated[Positional[str], arguments.word("eval", "RUN"), UNSAID] = ""
    """folder of a run"""
    trust: FlagCreatePairsOff[bool] = False
    """allow a run that another user made to import and run the Python module that its config
    names"""

    def run(self, rest: list[str]) -> None:
        if not self.folder:
            raise ConfigError("eval: expected a run folder first; see `cerl eval --help`")
        folder = arguments.run_folder(Path(self.folder))
        run = load_file(folder / FILE)
        asked = arguments.of_evaluation(run, rest, prog=f"cerl eval {folder}")
        from cerl.evaluate_run import evaluate_run
        from cerl.report import evaluation

        evaluation.show(evaluate_run(folder, trusted=self.trust, **asked))


@dataclass(frozen=True)
class Sweep:
    """Train presets or studies on environments, then write the report.

    Runs are trained one after the other, or --jobs at a time. Started again with the same folder,
    a sweep keeps finished runs and resumes the others. Other options are those of `cerl train
    PRESET --help`, applied to every run.
    """

    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="PRESET..."), UNSAID] = ()
    """presets, YAML files, or studies (several presets and their options)"""
    envs: Annotated[tuple[str, ...], arguments.some("--envs", "NAME..."), UNSAID] = ()
    """environments of the presets' family; each preset's own if none is given"""
    jobs: Annotated[int, arguments.count("--jobs", "a number of runs")] = 1
    """how many runs are trained at the same time, each in a process of its own"""
    device: Annotated[str, arg(metavar="DEVICE"), UNSAID] = ""
    """cpu, cuda, cuda:N or auto, for every run; a study may have other presets for a CPU"""
    out: Annotated[Path, arguments.folder("sweep --out")] = Path("runs/sweep")
    """folder to write the run folders and the report to"""

    def run(self, rest: list[str]) -> None:
        check_out(self.out, option="sweep --out")
        options = [*rest, *(["--device", self.device] if self.device else [])]
        places = [["--env.name", name] for name in self.envs] or [[]]
        cells = [cell for name in self.presets for cell in self._cells(name)]
        notes: list[str] = []
        runs = [
            overridden(
                name,
                [*options, *place],
                prog=f"cerl sweep {name}",
                changes=changes,
                note=notes.append,
            )
            for place in places
            for name, changes in cells
        ]
        if not runs:
            raise ConfigError("sweep: expected at least one preset; see `cerl list presets`")
        for sentence in dict.fromkeys(notes):  # several environments of a preset have equal ones
            note(sentence)
        from cerl.report import tables
        from cerl.sweep import local

        tables.main(local.sweep(runs, self.out, jobs=self.jobs), self.out)

    def _cells(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """The presets that a name stands for, each with the options that a study changes in it."""
        if name not in preset.studies():
            return [(name, {})]
        study = load_study(name, kind_of(self.device or "auto"))
        return [(name, dict(study.options)) for name in study.presets]


@dataclass(frozen=True)
class Report:
    """Write tables and learning curves of finished or running runs.

    The files are table.md, table.csv, summary.parquet and curves.png.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), UNSAID] = ()
    """run folders, or folders that hold run folders"""
    out: Annotated[Path | None, arguments.folder("report --out")] = None
    """folder to write the files to; by default RUN if only one is given, else report"""
    last: Annotated[int, arguments.count("report --last", "a number of evaluations")] = 1
    """a score is the mean over this many last evaluations of a run"""
    until: Annotated[int, arguments.count("report --until", "a number of agent steps")] = 0
    """leave out evaluations after this agent step, to compare runs at the same step; 0: use all"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("report", rest)
        if not self.runs:
            raise ConfigError("report: expected at least one run folder; see `cerl report --help`")
        alone = len(self.runs) == 1 and not self.runs[0].is_file()
        folder = self.out or (self.runs[0] if alone else Path("report"))
        check_out(folder, option="report --out")
        from cerl.report import tables

        tables.main(list(self.runs), folder, last=self.last, until=self.until)


@dataclass(frozen=True)
class Bench:
    """Measure this machine, and compare with stored rows or with another version of cerl.

    `cerl bench NAME --help` explains the options of a benchmark.
    """

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME"), UNSAID] = ()
    """what to measure, or compare"""

    def run(self, rest: list[str]) -> None:
        name, *rest = [*self.words, *rest]
        if name not in bench.BENCHMARKS:
            hint = errors.nearest(name, list(bench.BENCHMARKS))
            raise ConfigError(f"bench: no benchmark {name!r}{hint} (`cerl bench` lists them)")
        bench.run(name, rest)


@dataclass(frozen=True)
class List:
    """List what can be trained: presets, studies, and environments of every family."""

    what: Annotated[Positional[tuple[str, ...]], arg(metavar="{presets,studies,envs}"), UNSAID] = ()
    """everything if nothing is given"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("list", rest)
        known = ("presets", "studies", "envs")
        if wrong := [word for word in self.what if word not in known]:
            raise ConfigError(f"list: expected presets, studies or envs, got {wrong[0]!r}")
        asked = [name for name in known if name in (self.what or known)]
        for name in asked:
            if len(asked) > 1:
                print(f"{name}:")
            print("\n".join(help.listed(name)))


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "eval": Eval,
    "sweep": Sweep,
    "report": Report,
    "bench": Bench,
    "list": List,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: exit code 0; 1 if a benchmark is slower than what it is compared with; 2 after a user's
             error; 75 if a run was told to stop and has saved what resuming needs; 130 if it was
             interrupted before it could save.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    works = words[:1] in (["train"], ["sweep"]) and not arguments.asks_help(words)
    try:
        with interrupt_ends(), contextlib.nullcontext() if works else reader_may_leave():
            _run(words)
        return 0
    except Stopped:
        return SAVED
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except bench.Slower as slower:
        complain("slower: ", str(slower))
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("CERL_DEBUG") == "1":
            raise
        complain("error: ", explained(error))
        return 2


def _run(words: list[str]) -> None:
    name, rest = words[0] if words else "help", words[1:]
    if name in (*arguments.HELP, "help"):
        print(help.usage(COMMANDS))
    elif name in ("--version", "-V", "version"):
        print(f"cerl {__version__}")
    elif name not in COMMANDS:
        hint = errors.nearest(name, list(COMMANDS))
        raise ConfigError(f"no command {name!r}{hint} (`cerl --help` lists them)")
    elif help.wanted(name, rest):
        help.show(name, COMMANDS[name])
    else:
        command, rest = arguments.filled(COMMANDS[name], rest, prog=f"cerl {name}")
        command.run(rest)


def _print_folder(folder: Path) -> None:
    from cerl.record.screen import Screen

    Screen().line(str(folder))


if __name__ == "__main__":
    sys.exit(main())
