"""The commands of runs that exist: cerl fork | status | report | watch | video | export | import;
and cerl doctor.

They are dataclasses like those of `cerl/__main__.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from cerl import arguments
from cerl.config import ConfigError
from cerl.record.folder import FILE, check_out, load_file
from cerl.terminal import note

# tyro appends "(default: ...)" to the help of an option. This leaves it out where the help text
# says what happens without the option.
UNSAID = arg(help_behavior_hint="")


class Faulty(Exception):
    """Something of this machine or installation is at fault."""


@dataclass(frozen=True)
class Fork:
    """Go on from a checkpoint of a run under other options, in a new run folder.

    E.g. `cerl fork RUN --at 400k --ensemble.members 2 --ensemble.duty tandem --ensemble.frozen 0`.
    A fork has the same rows of replay, parameters, simulators and random numbers, and the run stays
    as it is. `log.keep` says which checkpoints of a run stay; `cerl fork RUN --help` explains the
    options that may differ, with the run's values.
    """

    folder: Annotated[Positional[str], arguments.word("fork", "RUN"), UNSAID] = ""
    """folder of a run"""
    at: Annotated[int, arguments.count("fork --at", "a number of agent steps"), UNSAID] = 0
    """agent steps of one seed after which the fork begins; the run has a checkpoint there"""
    members: Annotated[tuple[str, ...], arguments.some("--members", "NUMBER..."), UNSAID] = ()
    """members of the run, from 0, that the fork begins with; by default the first ones, as many as
    ensemble.members says. A number that comes twice makes copies, as does a run of one member"""
    trust: FlagCreatePairsOff[bool] = False
    """allow a run that another user made to import and run the Python module that its config
    names"""

    def run(self, rest: list[str]) -> None:
        if not self.folder:
            raise ConfigError("fork: expected a run folder first; see `cerl fork --help`")
        folder = arguments.run_folder(Path(self.folder))
        changes = arguments.of_fork(load_file(folder / FILE), rest, folder=folder)
        if not self.at:
            raise ConfigError("fork --at: expected a number of agent steps, e.g. --at 400k")
        if wrong := [word for word in self.members if not word.isdecimal()]:
            raise ConfigError(f"--members: expected numbers of members, got {wrong[0]!r}")
        from cerl import fork, training
        from cerl.record.screen import Screen

        picked = [int(word) for word in self.members] or None
        made = fork.fork(
            folder, at=self.at, changes=changes, picked=picked, trusted=self.trust, note=note
        )
        training.resume(made, trusted=self.trust)
        Screen().line(str(made))


@dataclass(frozen=True)
class Status:
    """Show which runs are done, running, waiting or failed, and the time that is left.

    All is read from the run folders, so it works on any machine that sees them.
    """

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER..."), UNSAID] = ()
    """folders of sweeps or of `cerl train --out`, or run folders"""
    every: Annotated[FlagCreatePairsOff[bool], arg(name="all")] = False
    """show each run, even if there are many"""
    json: FlagCreatePairsOff[bool] = False
    """print JSON"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("status", rest)
        if not self.folders:
            raise ConfigError("status: expected at least one folder; see `cerl status --help`")
        from cerl.sweep import status

        status.main(self.folders, every=self.every, as_json=self.json)


@dataclass(frozen=True)
class Report:
    """Write tables and learning curves of finished or running runs.

    The files are table.md, table.csv, summary.parquet, curves.png, and results.parquet with the
    rows of all runs and the options in which they differ.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), UNSAID] = ()
    """run folders, or folders that hold run folders"""
    out: Annotated[Path | None, arguments.folder("report --out")] = None
    """folder to write the files to; by default RUN if only one is given, else report"""
    last: Annotated[int, arguments.count("report --last", "a number of evaluations")] = 1
    """a score is the mean over this many last evaluations of a run"""
    until: Annotated[int, arguments.count("report --until", "a number of agent steps")] = 0
    """leave out evaluations after this agent step, to compare runs at the same step; 0: use all"""
    at: Annotated[int, arguments.count("report --at", "a number of agent steps"), UNSAID] = 0
    """also state the verdicts at the last evaluation up to this agent step"""
    normalise: Annotated[str, arguments.word("report --normalise", "NAME"), UNSAID] = ""
    """how scores over several tasks are normalised: human (Atari), single (by the single agent's
    score), minmax (over the study), thousand (dm_control) or none; by default as suits the tasks"""
    intervals: Annotated[str, arguments.word("report --intervals", "METHOD"), UNSAID] = "t"
    """method of all intervals: t, where enough seeds make it hold as often as it says; or, for any
    two seeds, studentised, bca, hierarchical or percentile, as rliable has them"""
    mix: FlagCreatePairsOff[bool] = False
    """aggregate over tasks even if runs differ in their protocol, e.g. steps or sticky actions"""
    x: Annotated[str, arguments.word("report --x", "OPTION"), UNSAID] = ""
    """also draw and print the scores against an option in which the runs differ, e.g.
    ensemble.members"""
    figure: Annotated[tuple[str, ...], arguments.some("--figure", "NAME..."), UNSAID] = ()
    """draw more figures: profile, iqm, iqm-time, improvement, own-data, map, diagnostics, or all
    that apply"""
    format: Annotated[tuple[str, ...], arguments.some("--format", "png|pdf|svg...")] = ("png",)
    """formats of the figures: png, pdf, svg"""
    latex: FlagCreatePairsOff[bool] = False
    """write results.tex and hyperparameters.tex, for a paper's appendix"""
    html: FlagCreatePairsOff[bool] = False
    """write report.html: one page that opens in a browser without a network"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("report", rest)
        if not self.runs:
            raise ConfigError("report: expected at least one run folder; see `cerl report --help`")
        alone = len(self.runs) == 1 and not self.runs[0].is_file()
        folder = self.out or (self.runs[0] if alone else Path("report"))
        check_out(folder, option="report --out")
        from cerl.report import tables

        tables.main(
            list(self.runs),
            folder,
            last=self.last,
            until=self.until,
            at=self.at or None,
            x=self.x,
            normalise=self.normalise,
            mix=self.mix,
            figures=self.figure,
            formats=self.format,
            latex=self.latex,
            html=self.html,
            method=self.intervals,
        )


@dataclass(frozen=True)
class Watch:
    """Show the report page of runs while they go on, in a browser on this machine.

    The page is made anew when the run folders change. Ctrl-C ends the command, not the runs.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), UNSAID] = ()
    """run folders, or folders that hold run folders"""
    port: Annotated[int, arguments.count("watch --port", "the number of a port"), UNSAID] = 0
    """port of the page's address; by default any that is free"""
    terminal: FlagCreatePairsOff[bool] = False
    """show the table of `cerl status` in the terminal instead, until all runs have ended"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("watch", rest)
        if not self.runs:
            raise ConfigError("watch: expected at least one folder; see `cerl watch --help`")
        from cerl import watch

        watch.main(self.runs, port=self.port, terminal=self.terminal)


@dataclass(frozen=True)
class Video:
    """Film the newest checkpoint of a run: members and aggregate side by side, as mp4."""

    folder: Annotated[Positional[str], arguments.word("video", "RUN"), UNSAID] = ""
    """folder of a run"""
    seed: Annotated[int | None, arguments.number("video --seed", "a seed"), UNSAID] = None
    """one of the run's seeds; by default the first"""
    members: Annotated[tuple[str, ...], arguments.some("--members", "NUMBER..."), UNSAID] = ()
    """members to show, from 0; by default the first four"""
    policy: Annotated[str, arguments.word("video --policy", "NAME"), UNSAID] = ""
    """the aggregate beside them: vote, mean, mean_mode or none; by default the run's first"""
    episodes: Annotated[int, arguments.count("video --episodes", "a number of episodes")] = 1
    """episodes of each panel"""
    frames: Annotated[int, arguments.count("video --frames", "a number of frames")] = 1_000
    """most frames of the film, one an agent step"""
    fps: Annotated[int, arguments.count("video --fps", "a number of frames")] = 15
    """frames a second"""
    out: Annotated[Path | None, arguments.folder("video --out", "file"), UNSAID] = None
    """mp4 file; by default video-seed-N.mp4 in the run folder"""
    trust: FlagCreatePairsOff[bool] = False
    """allow a run that another user made to import and run the Python module that its config
    names"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("video", rest)
        if not self.folder:
            raise ConfigError("video: expected a run folder first; see `cerl video --help`")
        if wrong := [word for word in self.members if not word.isdecimal()]:
            raise ConfigError(f"--members: expected numbers of members, got {wrong[0]!r}")
        from cerl import video

        video.main(
            arguments.run_folder(Path(self.folder)),
            seed=self.seed,
            members=[int(word) for word in self.members] or None,
            policy=self.policy or None,
            episodes=self.episodes,
            frames=self.frames,
            fps=self.fps,
            out=self.out,
            trusted=self.trust,
        )


@dataclass(frozen=True)
class Export:
    """Write results, or one member of a run, in the format of another program.

    Formats: rliable, csv, dqn_zoo and wandb for results; safetensors for a member, with its config
    and a script that plays it (docs/exchange.md).
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN..."), UNSAID] = ()
    """run folders, or folders that hold run folders"""
    to: Annotated[str, arguments.word("export --to", "FORMAT"), UNSAID] = ""
    """rliable, csv, dqn_zoo, wandb or safetensors"""
    out: Annotated[Path | None, arguments.folder("export --out", "file or folder"), UNSAID] = None
    """file or folder to write to; by default one named export"""
    last: Annotated[int, arguments.count("export --last", "a number of evaluations")] = 1
    """a score is the mean over this many last evaluations of a run"""
    normalise: Annotated[str, arguments.word("export --normalise", "NAME")] = "none"
    """for rliable, how scores are normalised: none, human, single, minmax or thousand, as in
    `cerl report`"""
    member: Annotated[int | None, arguments.number("export --member", "a member"), UNSAID] = None
    """with safetensors: the member, from 0"""
    seed: Annotated[int | None, arguments.number("export --seed", "a seed"), UNSAID] = None
    """with safetensors: the seed; by default the first of the run"""
    trust: FlagCreatePairsOff[bool] = False
    """allow a run that another user made to import and run the Python module that its config
    names"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("export", rest)
        if not self.runs:
            raise ConfigError("export: expected at least one run folder; see `cerl export --help`")
        out = self.out or Path("export")
        check_out(out, option="export --out")
        from cerl.exchange import export

        export.main(
            self.runs,
            out,
            to=self.to,
            last=self.last,
            normalise=self.normalise,
            member=self.member,
            seed=self.seed,
            trusted=self.trust,
        )


@dataclass(frozen=True)
class Import:
    """Turn logs of other programs into result rows, which `cerl report` reads beside our own.

    Programs: cleanrl (TensorBoard events), and authors (the code of Lin et al. 2024).
    """

    folder: Annotated[Positional[str], arguments.word("import", "FOLDER"), UNSAID] = ""
    """folder with the logs, at any depth"""
    source: Annotated[str, arg(name="from"), arguments.word("import --from", "NAME"), UNSAID] = ""
    """cleanrl or authors"""
    out: Annotated[Path, arguments.folder("import --out")] = Path("runs/imported")
    """folder to write run folders to"""
    every: Annotated[int, arguments.count("import --every", "a number of steps"), UNSAID] = 0
    """with cleanrl: agent steps over which returns of episodes are averaged"""
    env: Annotated[str, arguments.word("import --env", "NAME"), UNSAID] = ""
    """environment of all logs, as family/name, where their names do not tell"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("import", rest)
        if not self.folder:
            raise ConfigError("import: expected a folder first; see `cerl import --help`")
        check_out(self.out, option="import --out")
        from cerl.exchange import imports

        folder = Path(self.folder)
        imports.main(folder, self.out, source=self.source, every=self.every, env=self.env)


@dataclass(frozen=True)
class Doctor:
    """Examine this machine: device, versions, extras, the folder for runs; and train a tiny run.

    A fault comes with a sentence that says what to do, and the exit code is then 1. What is called
    an option is not there and need not be.
    """

    out: Annotated[Path, arguments.folder("doctor --out")] = Path("runs")
    """folder for runs, whose disk is examined; it need not exist"""
    quick: FlagCreatePairsOff[bool] = False
    """leave the self-test out, which takes some seconds"""

    def run(self, rest: list[str]) -> None:
        arguments.refuse_unknown("doctor", rest)
        from cerl import doctor

        if faults := doctor.examine(self.out, quick=self.quick):
            raise Faulty(f"{faults} fault{'s' if faults > 1 else ''}, with what to do, above")
        note("no faults")
