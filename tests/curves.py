"""Golden training curves: short runs whose losses are stored, and a comparison of two commits.

    python -m tests.curves check [CASE...]         compare losses with tests/golden/curves
    python -m tests.curves write [CASE...]         store the losses of this code there
    python -m tests.curves run --out FOLDER        store all results of the runs, bit for bit
    python -m tests.curves compare OLD NEW         run two commits and compare them to the bit
    python -m tests.curves compare --folders A B   the same for two source folders, without git
    python -m tests.curves spread                  measure how far rounding alone moves the curves

A case is a preset at a small size that makes 300 updates. In most cases actions are random, so that
the data do not depend on rounding, and the curves agree closely on any CPU. `compare` has no
tolerance. It is for changes that must not change a single bit of training, and both commits run on
the same machine.
"""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import torch

import cerl
from cerl.bench.compare import python_path
from cerl.config import load
from cerl.record import checkpoint
from cerl.record.folder import new_folder
from cerl.run import Run
from cerl.training import carry_out
from cerl.wiring import assemble

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "curves"
UPDATES = 300
# Metrics that are stored, as far as an agent has them.
CURVES = ("loss", "actor_loss", "temperature_loss")
# Columns that are not compared: they depend on the time or the version of cerl.
ASIDE = ("config_hash", "wall_seconds", "version")


class Case(NamedTuple):
    """One small run."""

    preset: str
    options: dict[str, Any]  # its changes of `SMALL`, by dotted key
    # The largest difference allowed in a curve, relative to its largest |value|. On emulated CPUs
    # `spread` measures 2e-6. Sometimes two actions are nearly equally good and rounding decides
    # between them, which moves a curve by up to 2e-4 (4e-4 in popgym_sac_fox). A mistake of 0.1% in
    # gamma moves every curve by at least 5e-4, one of 1% in the learning rate by at least 1e-3.
    tolerance: float = 3e-4


# Options of all cases. An iteration steps four environments and makes one update.
SMALL: dict[str, Any] = {
    **{"seeds": (3, 1), "net.hidden": (16, 16), "env.envs": 4},
    **{"replay.capacity": 2_000, "replay.batch": 8, "replay.start": 80},
    "schedule.update_every": 4,
    **{"explore.start": 1.0, "explore.end": 1.0},
    # With a small epsilon, Adam would make steps of full size even of gradients that are only
    # rounding errors.
    "optim.eps": 1e-3,
    **{"eval.every": 10**9, "eval.episodes": 1, "eval.time_limit": 20, "eval.share": False},
    **{"log.every": 400, "log.checkpoint_every": 10**9, "log.checkpoint_minutes": 0.0},
    "log.save_replay": False,
}
# For presets whose target networks are copied every so many updates.
COPIES = {"schedule.target_every": 40}
ACTING = {"explore.start": 0.1, "explore.end": 0.1}
THREE = {"seeds": (3,), "ensemble.members": 3}
TWO = {"ensemble.members": 2}
# The section `env` for presets of MuJoCo, whose simulators are an optional extra: one point mass.
# With one environment an update takes four iterations.
ONE_POINT = {"family": "point_mass", "name": "point_mass", "envs": 1}
MINATAR = {"net.channels": (4,), "net.hidden": (16,)}
WINDOWS = {"net.hidden": (12,), "encoder.width": 16, "replay.batch": 4}
MAZE = {"seeds": (3,), **WINDOWS, "env.length": 4, "replay.candidates": 128}
# For cases in which two actions are often nearly equally good. Rounding may then change which of
# them is best. The largest value hardly changes by that, but in double Q-learning the value that
# the target network has for the chosen action does. So these cases use no double Q-learning.
MAX = {"agent.double": False}

CASES: dict[str, Case] = {
    "catch_dqn": Case("catch/ddqn", {"agent.double": False, "agent.loss": "mse"}),
    "catch_ddqn_acting": Case("catch/ddqn", {**ACTING}),
    "catch_cerl": Case("catch/cerl", THREE),
    "catch_own_batches": Case(
        "catch/bootdqn",
        {**TWO, "loss.batches": "own", "replay.candidates": 64, "loss.mask_probability": 0.5},
    ),
    "catch_tandem_acting": Case("catch/tandem", {**ACTING, "agent.feature_norm": True}),
    "catch_flicker_fox_cerl": Case("catch/flicker-fox-cerl", {**WINDOWS, **THREE, **MAX}),
    "minatar_young_tian": Case(
        "minatar/young-tian", {**MINATAR, "env.envs": 4, "encoder.frames": 2}
    ),
    "minatar_quantile": Case("minatar/qrdqn", {**MINATAR, **TWO, "agent.quantiles": 5}),
    "minatar_cerl_l1": Case("minatar/cerl-l1", {**MINATAR, **THREE}),
    "minatar_cerl_both": Case("minatar/cerl-both", {**MINATAR, **THREE, "env.name": "asterix"}),
    "minatar_own_target": Case(
        "minatar/cerl-own-target", {**MINATAR, **THREE, "env.name": "freeway"}
    ),
    "minatar_single_actor": Case(
        "minatar/cerl-single-actor", {**MINATAR, **THREE, **ACTING, "env.name": "seaquest"}
    ),
    "minatar_multi_horizon": Case(
        "minatar/multi-horizon", {**MINATAR, **TWO, "env.name": "space_invaders"}
    ),
    "minatar_mico": Case(
        "minatar/mico", {**MINATAR, **TWO, **MAX, "env.name": "asterix", "agent.mico_weight": 0.1}
    ),
    "memory_mlp": Case("memory/mlp", {**MAZE, **MAX}),
    "memory_gru": Case("memory/gru", {**MAZE, **TWO, **MAX}),
    "memory_transformer": Case("memory/transformer", {**MAZE, **TWO, **MAX}),
    "memory_fox_cerl_acting": Case("memory/fox-cerl", {**MAZE, **THREE, **MAX, **ACTING}),
    "point_mass_sac": Case("point_mass/sac", {}),
    "point_mass_ensemble": Case("point_mass/ensemble", THREE),
    "point_mass_cerl_acting": Case("point_mass/cerl", {**THREE, "explore.end": 0.0}),
    "point_mass_tandem": Case("point_mass/tandem", {"seeds": (3,)}),
    "redq": Case(
        "mujoco/redq",
        {
            **{"seeds": (3,), "env": ONE_POINT},
            **{"agent.critics": 4, "schedule.updates": 1, "agent.policy_every": 2},
        },
    ),
    "sunrise": Case("mujoco/sunrise", {**TWO, "env": ONE_POINT}),
    "popgym_sac_fox": Case("popgym/sac-fox", {**WINDOWS, "seeds": (3,), "env.time_limit": 6}, 1e-3),
    "gym_cartpole": Case("gym/cartpole", TWO),
    "gym_pendulum_acting": Case("gym/pendulum", {"explore.end": 0.0}),
}


class Made(NamedTuple):
    """The results of a run, in which two commits have to agree."""

    curves: dict[str, list[float]]  # by "metric/seed/member", one value for each update
    state: dict[str, torch.Tensor]  # parameters, target networks, optimisers, by path
    tables: dict[str, dict[str, list]]  # result rows and metrics, by column


def trained(name: str, *, device: str = "cpu", threads: int = 1) -> Made:
    """Trains a case. This is the only function of this file that uses internals of the package.

    Raises: RuntimeError if a run on a GPU captured no CUDA graph.
    """
    case = CASES[name]
    curves: dict[str, list[float]] = {}
    captures = 0

    class Counted(torch.cuda.graph):
        def __enter__(self) -> None:
            nonlocal captures
            captures += 1
            super().__enter__()

    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        copies = COPIES if case.preset.startswith(("catch/", "minatar/", "gym/cartpole")) else {}
        options = SMALL | copies | case.options | {"out": out, "device": device, "threads": threads}
        every = options["schedule.update_every"] = options["env.envs"]
        options["schedule.steps"] = options["replay.start"] + every * UPDATES
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(torch.cuda, "graph", Counted))
        config = load(case.preset, options)
        parts, folder = assemble(config), new_folder(config)
        one = Run(config, parts, folder)

        def recorded(update: Callable[[], None]) -> Callable[[], None]:
            def updated() -> None:
                update()
                for metric in (name for name in CURVES if name in parts.learner.metrics):
                    for seed, values in zip(
                        config.seeds, parts.learner.metrics[metric].tolist(), strict=True
                    ):
                        for member, value in enumerate(values):
                            curves.setdefault(f"{metric}/{seed}/{member}", []).append(value)

            return updated

        one.update, one.update_first = recorded(one.update), recorded(one.update_first)
        carry_out(one)
        tables = {
            kind: pq.read_table(folder / f"{kind}.parquet").to_pydict()
            for kind in ("rows", "metrics")
        }
        learner = checkpoint.load(folder).state["learner"]
    if device.startswith("cuda") and not captures:
        raise RuntimeError(f"{name}: nothing was captured as a CUDA graph")
    assert curves and all(len(values) == UPDATES for values in curves.values())
    tables = {
        kind: {key: values for key, values in table.items() if key not in ASIDE}
        for kind, table in tables.items()
    }
    learnt = {key: learner[key] for key in ("net", "target", "optimisers")}
    return Made(curves, dict(leaves(learnt)), tables)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every number of a tree as a tensor on the CPU, with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}.{index}")
    elif node is not None:
        yield path, torch.as_tensor(node).detach().cpu()


# Comparison with the golden files


def golden(name: str) -> dict[str, list[float]]:
    """The stored curves of a case, rounded to float32, in which they were computed."""
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    return {key: np.array(values, np.float32).tolist() for key, values in stored.items()}


def store(name: str, curves: dict[str, list[float]]) -> None:
    """Writes the golden file of a case; nine digits are enough to restore every float32 number."""
    lines = [
        f'"{key}": [{",".join(f"{value:.9g}" for value in values)}]'
        for key, values in curves.items()
    ]
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def distance(got: dict[str, list[float]], want: dict[str, list[float]]) -> float:
    """The largest difference between the curves of two runs.

    Each difference is relative to the largest |value| in `want` of the same metric. The result is
    infinite if a number is not finite, or if one run has curves that the other has not.
    """
    if got.keys() != want.keys():
        return math.inf
    largest: dict[str, float] = {}
    for key, values in want.items():
        metric = key.partition("/")[0]
        largest[metric] = max(largest.get(metric, 0.0), *map(abs, values))
    found = 0.0
    for key, values in want.items():
        if len(got[key]) != len(values) or not np.isfinite(got[key]).all():
            return math.inf
        apart = float(np.abs(np.subtract(got[key], values)).max())
        found = max(found, apart / largest[key.partition("/")[0]])
    return found


# Comparison of two commits


def bits(tensor: torch.Tensor) -> tuple:
    """A tensor in a form that is equal if and only if all of its bits are."""
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


class Verdict(NamedTuple):
    """How two runs of a case differ."""

    losses: bool  # all losses are equal to the bit
    state: bool  # every tensor of one run has an equal tensor in the other run
    by_content: int  # tensors whose equal has another name in the other run
    tables: bool  # all columns of the old run are in the new run and equal
    largest: float  # largest absolute difference of two numbers of the same name
    notes: list[str]  # texts on differences, for the reader

    @property
    def equal(self) -> bool:
        return self.losses and self.state and self.tables


def apart(old: Iterable[Any], new: Iterable[Any]) -> float:
    """The largest |difference| between the numbers of two lists.

    It is infinite if the lists have different lengths, or if only one of two numbers is NaN.
    """
    old, new = np.asarray(old, dtype=float).ravel(), np.asarray(new, dtype=float).ravel()
    if old.shape != new.shape:
        return math.inf
    both = np.isnan(old) & np.isnan(new)
    difference = np.where(both | (old == new), 0.0, np.abs(old - new))
    return float(np.nan_to_num(difference, nan=math.inf).max(initial=0.0))


def compared(old: Made, new: Made) -> Verdict:
    """Compares two runs. Tensors are matched by name, and those without an equal by content."""
    notes, largest = [], 0.0
    losses = repr(old.curves) == repr(new.curves)
    for key in old.curves.keys() & new.curves.keys():
        largest = max(largest, apart(old.curves[key], new.curves[key]))
    if lost := sorted(old.curves.keys() ^ new.curves.keys()):
        notes.append(f"curves in one of the two only: {', '.join(lost[:3])}")

    one, other = ({k: bits(v) for k, v in made.state.items()} for made in (old, new))
    named = {key for key in one.keys() & other.keys() if one[key] == other[key]}
    left, found = (
        Counter(value for key, value in part.items() if key not in named) for part in (one, other)
    )
    state, by_content = left == found, left.total() if left == found else 0
    if not state:
        for key in sorted(one.keys() & other.keys() - named):
            largest = max(largest, apart(old.state[key].double(), new.state[key].double()))
        lost = sorted(key for key in one if key not in named and one[key] not in found)
        come = sorted(key for key in other if key not in named and other[key] not in left)
        notes.append(
            f"{len(lost)} of {len(one)} tensors without an equal one ({', '.join(lost[:3])}), "
            f"{len(come)} of {len(other)} new ones ({', '.join(come[:3])})"
        )

    tables = True
    for kind, table in old.tables.items():
        columns = new.tables[kind]
        if missing := sorted(table.keys() - columns.keys()):
            tables = False
            notes.append(f"{kind}: no column {', '.join(missing)} in the new one")
        if more := sorted(columns.keys() - table.keys()):
            notes.append(f"{kind}: column {', '.join(more)} in the new one only, not compared")
        for key in sorted(table.keys() & columns.keys()):
            if list(map(repr, table[key])) == list(map(repr, columns[key])):
                continue
            tables = False
            notes.append(f"{kind}: column {key} differs")
            with contextlib.suppress(TypeError, ValueError):
                largest = max(largest, apart(table[key], columns[key]))
    return Verdict(losses, state, by_content, tables, largest, notes)


def read(path: Path) -> Made:
    return Made(**torch.load(path, weights_only=True))


def compare(old: Path, new: Path) -> bool:
    """Prints how the runs in two folders of `run` differ. Returns: whether all are equal."""
    before, after = ({p.stem: p for p in folder.glob("*.pt")} for folder in (old, new))
    equal = bool(before) and before.keys() <= after.keys()
    width = max([4, *map(len, before | after)])
    print(f"{'case':{width}}  losses  tensors           rows    largest difference")
    for name in sorted(before | after):
        if name not in before or name not in after:
            print(f"{name:{width}}  in the {'old' if name in before else 'new'} one only")
            continue
        verdict = compared(read(before[name]), read(after[name]))
        equal &= verdict.equal
        words = ["equal" if same else "DIFFER" for same in verdict[:2]]
        words[1] += f" ({verdict.by_content} renamed)" if verdict.by_content else ""
        rows = "equal" if verdict.tables else "DIFFER"
        print(f"{name:{width}}  {words[0]:6}  {words[1]:16}  {rows:6}  {verdict.largest:.3g}")
        for note in verdict.notes:
            print(f"{'':{width}}  {note}")
    print("all equal" if equal else "NOT EQUAL")
    return equal


def started(source: Path, out: Path, arguments: Sequence[str]) -> subprocess.Popen:
    """Starts the command `run` with the code and the cases of a source folder."""
    if not (source / "tests" / "curves.py").is_file():
        sys.exit(f"error: {source} has no tests/curves.py, so its runs cannot be compared")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.curves", "run", "--out", str(out), *arguments],
        cwd=source,
        env=os.environ | {"PYTHONPATH": python_path(source)},
    )


def compare_sources(old: Path, new: Path, *, device: str, cases: Sequence[str]) -> bool:
    """Runs the cases of two source folders and compares them."""
    with tempfile.TemporaryDirectory() as work:
        outs = [Path(work) / "old", Path(work) / "new"]
        arguments = ["--device", device, *cases]
        running: list[subprocess.Popen] = []
        try:
            for source, out in zip((old, new), outs, strict=True):
                running.append(started(source.resolve(), out, arguments))
                if device != "cpu":  # the two would compete for the memory of the GPU
                    running[-1].wait()
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
        if any(codes):
            sys.exit(f"error: the runs of {(old, new)[codes[0] == 0]} failed")
        return compare(*outs)


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the files of a commit, which is removed after the `with` block."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


# How far rounding moves the curves

# Environment variables and numbers of threads with which libraries take sums in another order, as
# they do on other CPUs.
CPUS: dict[str, tuple[dict[str, str], int]] = {
    "no vectors": (
        {
            **{"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
            **{"MKL_CBWR": "COMPATIBLE", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
        },
        1,
    ),
    "avx2": (
        {
            **{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
        1,
    ),
    "avx2, 2 threads": (
        # Threads that wait without spinning: on a busy machine the others take minutes.
        {"ATEN_CPU_CAPABILITY": "avx2", "OMP_WAIT_POLICY": "PASSIVE"},
        2,
    ),
}


def spread(names: Sequence[str]) -> None:
    """Prints, for each case, the distance from the golden curves on emulated other CPUs."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as work:
        for cpu, (variables, threads) in CPUS.items():
            out = Path(work) / cpu
            arguments = ["--out", str(out), "--threads", str(threads), *names]
            command = [sys.executable, "-m", "tests.curves", "run", *arguments]
            subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)
            for name in names:
                curves = read(out / f"{name}.pt").curves
                found[name][cpu] = distance(curves, golden(name))
    for name, distances in found.items():
        words = ", ".join(f"{cpu} {far:.1e}" for cpu, far in distances.items())
        print(f"{name:24} {words}; tolerance {CASES[name].tolerance:.0e}")


# Command line


def run(names: Sequence[str], out: Path, *, device: str, threads: int) -> None:
    """Trains cases and writes the results of each to a file CASE.pt in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        torch.save(trained(name, device=device, threads=threads)._asdict(), out / f"{name}.pt")


def check(names: Sequence[str]) -> bool:
    """Prints the distance of every case from its golden file. Returns: whether all are within
    their tolerance."""
    good = True
    for name in names:
        far, bound = distance(trained(name).curves, golden(name)), CASES[name].tolerance
        good &= far <= bound
        word = "equal" if far == 0 else "ok" if far <= bound else "DIFFERS"
        print(f"{name:24} {word:7} {far:.2e} of {bound:.0e}", flush=True)
    return good


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.curves", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "write", "run", "spread", "compare"):
        command = commands.add_parser(name)
        if name == "compare":
            command.add_argument("old", help="a commit")
            command.add_argument("new", help="a commit")
            command.add_argument("--folders", action="store_true", help="two source folders")
        if name == "run":
            command.add_argument("--out", type=Path, required=True, help="receives CASE.pt files")
            command.add_argument("--threads", type=int, default=1)
        if name in ("run", "compare"):
            command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args(arguments)
    if given.command == "compare":
        options = {"device": given.device, "cases": given.cases}
        if given.folders:
            return not compare_sources(Path(given.old), Path(given.new), **options)
        with checked_out(given.old) as old, checked_out(given.new) as new:
            return not compare_sources(old, new, **options)
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    if not Path(cerl.__file__).resolve().is_relative_to(ROOT):
        parser.error(f"expected the cerl of {ROOT}, got {cerl.__file__}; set PYTHONPATH={ROOT}")
    names = given.cases or list(CASES)
    with tempfile.TemporaryDirectory() as state:
        # The key that seals runs is kept in XDG_STATE_HOME. These runs must not use the user's key.
        os.environ["XDG_STATE_HOME"] = state
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if given.command == "check":
            return not check(names)
        if given.command == "spread":
            spread(names)
        elif given.command == "write":
            for name in names:
                store(name, trained(name).curves)
        else:
            run(names, given.out, device=given.device, threads=given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
