"""The command line: cerl train | eval | sweep | fork | status | report | watch | video |
export | import | bench | list | doctor.

Each command is a dataclass: its docstring and fields are its help text, and its method `run`
carries it out. `run` gets the words that are no options of the command as `rest`; most of them are
options of a run (`cerl/config/`). A user's error ends with one paragraph on stderr and exit code 2;
CERL_DEBUG=1 adds the traceback.
"""

import sys

# `python -m cerl` puts the current folder first on sys.path, and the script `cerl` does not. It is
# removed, so that both import the same. Modules of a user's tasks are looked up in the current
# folder anyway (`cerl.own_code`).
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

from cerl.terminal import complain, explained, interrupt_ends, note, reader_may_leave

with interrupt_ends():
    import contextlib
    import os
    from collections.abc import Sequence
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Annotated, ClassVar, Protocol

    from tyro.conf import FlagCreatePairsOff, Positional, arg

    from cerl import __version__, arguments, bench, help
    from cerl.commands import (
        UNSAID,
        Doctor,
        Export,
        Faulty,
        Fork,
        Import,
        Report,
        Status,
        Video,
        Watch,
    )
    from cerl.config import ConfigError, errors
    from cerl.config.form import overridden
    from cerl.record.folder import FILE, load_file
    from cerl.stop import SAVED, Stopped


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
    """Train studies, or presets on environments, and write the report.

    E.g. `cerl sweep ensemble-size --envs minatar-5`, or with a grid of one's own: `cerl sweep
    minatar/ddqn minatar/cerl --grid ensemble.members=2,5,10 replay.capacity=25k,100k --seeds 0..4`.

    The same command continues a sweep: finished runs are kept, stopped and failed ones go on, and
    presets, environments, seeds and values that are added since get runs of their own. Other
    options are those of `cerl train PRESET --help`, applied to every run.
    """

    VERBATIM: ClassVar = ("sbatch", "setup", "prefix")

    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="NAME..."), UNSAID] = ()
    """studies (`cerl list studies`), presets, or YAML files of either"""
    envs: Annotated[tuple[str, ...], arguments.some("--envs", "NAME..."), UNSAID] = ()
    """environments of the presets' family, or names of lists of them, e.g. minatar-5
    (`cerl list envs`); each study's or preset's own if none is given"""
    grid: Annotated[tuple[str, ...], arguments.some("--grid", "OPTION=VALUES..."), UNSAID] = ()
    """options with several values, separated by commas: every combination is trained.
    PRESET:OPTION=VALUES holds for one preset only. An axis over ensemble.* leaves presets with one
    member alone"""
    zip: Annotated[tuple[str, ...], arguments.some("--zip", "OPTION=VALUES..."), UNSAID] = ()
    """options whose values advance together: the first of each, the second of each, and so on"""
    dry_run: FlagCreatePairsOff[bool] = False
    """train nothing, but say which runs there would be, what they need, and what is there"""
    calibrate: FlagCreatePairsOff[bool] = False
    """with --dry-run: train a run of each preset for some seconds, to tell the hours"""
    jobs: Annotated[int, arguments.count("--jobs", "a number of runs"), UNSAID] = 0
    """how many runs are trained at the same time; by default one on each GPU, one on a CPU"""
    per_gpu: Annotated[int, arguments.count("--per-gpu", "a number of runs"), UNSAID] = 0
    """how many runs share a GPU at the same time; by default as many as --jobs needs"""
    seeds_per_run: Annotated[int, arguments.count("--seeds-per-run", "a number"), UNSAID] = 0
    """how many seeds train side by side in one run; by default as many as fit the device. The
    report joins the runs of a cell, and the seeds' results do not depend on it"""
    mps: FlagCreatePairsOff[bool] = False
    """start CUDA's multi-process service, with which runs that share a GPU are faster"""
    device: Annotated[str, arg(metavar="DEVICE"), UNSAID] = ""
    """cpu, cuda, cuda:N or auto, for every run; a study may have other presets for a CPU"""
    out: Annotated[Path | None, arguments.folder("sweep --out"), UNSAID] = None
    """folder of the sweep: run folders, plan and report; by default runs/STUDY, and runs/sweep if
    presets are named"""
    launcher: Annotated[str, arguments.word("--launcher", "launcher"), UNSAID] = "here"
    """where runs train: here (this machine), slurm or ray (docs/clusters.md); here by default"""
    per_job: Annotated[int, arguments.count("--per-job", "a number of runs"), UNSAID] = 0
    """slurm: how many runs one job trains at the same time, on its GPU; by default one"""
    sbatch: Annotated[tuple[str, ...], arguments.some("--sbatch", "OPTIONS"), UNSAID] = ()
    """slurm: options of sbatch, as one word: --sbatch "--partition=gpu --time=4:00:00". May be
    repeated"""
    setup: Annotated[tuple[str, ...], arguments.some("--setup", "LINE"), UNSAID] = ()
    """slurm: a line of the job's script before the command, e.g. "module load cuda". May be
    repeated"""
    prefix: Annotated[tuple[str, ...], arguments.some("--prefix", "WORDS"), UNSAID] = ()
    """slurm: words before the command, e.g. those of a container"""
    address: Annotated[str, arguments.word("--address", "address"), UNSAID] = ""
    """ray: the cluster, auto or HOST:PORT; by default one is started on this machine"""
    cpus: Annotated[int, arguments.count("--cpus", "a number of CPU cores"), UNSAID] = 0
    """ray: CPU cores that each run takes"""
    cancel: FlagCreatePairsOff[bool] = False
    """stop the jobs of a sweep, which save: cerl sweep --cancel FOLDER"""

    def run(self, rest: list[str]) -> None:
        from cerl.sweep import command

        if self.cancel:
            self._cancel(rest)
            return
        asked = command.Asked(
            names=self.presets,
            words=tuple(rest),
            envs=self.envs,
            grid=self.grid,
            zip=self.zip,
            device=self.device,
            out=self.out,
            seeds_per_run=self.seeds_per_run,
            jobs=self.jobs,
            per_gpu=self.per_gpu,
            mps=self.mps,
            launcher=self.launcher,
            per_job=self.per_job,
            sbatch=self.sbatch,
            setup=self.setup,
            prefix=self.prefix,
            address=self.address,
            cpus=self.cpus,
        )
        command.check_launcher(asked)
        if self.calibrate and not self.dry_run:
            raise ConfigError("sweep: --calibrate is an option of --dry-run; expected both")
        if self.dry_run:
            command.dry_run(asked, calibrate=self.calibrate, note=note)
        else:
            command.sweep(asked, note=note)

    def _cancel(self, rest: list[str]) -> None:
        from cerl.sweep import slurm

        arguments.refuse_unknown("sweep --cancel", rest)
        if len(self.presets) != 1:
            got = " ".join(self.presets) or "nothing"
            raise ConfigError(f"sweep --cancel: expected one folder of a sweep, got {got}")
        if self != Sweep(presets=self.presets, cancel=True):
            raise ConfigError("sweep --cancel: expected only the folder of a sweep, got options")
        slurm.cancel(Path(self.presets[0]), note=note)


@dataclass(frozen=True)
class SweepRun:
    """Train runs of a planned sweep that are not finished: what every launcher starts.

    Runs that other processes train are waited for, and taken over if those die. Exit codes: 0, all
    runs are finished; 75, stopped and saved; 2, some runs failed.
    """

    folder: Annotated[Positional[str], arguments.word("sweep-run", "FOLDER"), UNSAID] = ""
    """folder of the sweep"""
    runs: Annotated[tuple[str, ...], arguments.some("--runs", "NUMBER..."), UNSAID] = ()
    """numbers of the runs in the plan"""
    per_job: Annotated[int, arguments.count("--per-job", "a number of runs")] = 1
    """how many of them train at the same time"""
    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:N or auto"""
    version: Annotated[str, arguments.word("--version", "version"), UNSAID] = ""
    """the version of cerl that planned the sweep; another one trains nothing"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("sweep-run", rest)
        from cerl.sweep import worker

        worker.work(
            Path(self.folder),
            self.runs,
            per_job=self.per_job,
            device=self.device,
            version=self.version,
        )


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
    "fork": Fork,
    "status": Status,
    "report": Report,
    "watch": Watch,
    "video": Video,
    "export": Export,
    "import": Import,
    "bench": Bench,
    "list": List,
    "doctor": Doctor,
}
HIDDEN: dict[str, type[Command]] = {"sweep-run": SweepRun}  # those that `cerl --help` leaves out
WORKING = ("train", "sweep", "sweep-run", "fork")  # those that go on if nobody reads their output


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: exit code 0; 1 if a benchmark is slower than what it is compared with, or `doctor`
             found a fault; 2 after a user's error; 75 if a run was told to stop and has saved what
             resuming needs; 130 if it was interrupted before it could save.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    works = words[:1] and words[0] in WORKING and not arguments.asks_help(words)
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
    except Faulty as faulty:
        complain("error: ", str(faulty))
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
    elif name not in COMMANDS | HIDDEN:
        hint = errors.nearest(name, list(COMMANDS))
        raise ConfigError(f"no command {name!r}{hint} (`cerl --help` lists them)")
    elif help.wanted(name, rest):
        help.show(name, (COMMANDS | HIDDEN)[name])
    else:
        command, rest = arguments.filled((COMMANDS | HIDDEN)[name], rest, prog=f"cerl {name}")
        command.run(rest)


def _print_folder(folder: Path) -> None:
    from cerl.record.screen import Screen

    Screen().line(str(folder))


if __name__ == "__main__":
    sys.exit(main())
