"""Fault campaigns: kills runs, fills disks, flips bits of files, changes structures of checkpoints.

    python tests/campaign.py --kills 1000 --flips 500 --mutations 300 --disks 20

Runs are started by the command line (`cerl.__main__.main` in a forked process, so that torch is
imported only once; every twentieth kill is of a real `python -m cerl`). A disturbed run is resumed
until it ends, and is then compared bit for bit with an undisturbed one: result rows, metrics, every
leaf of the last checkpoint, every row of replay, TensorBoard's scalars. The exit code is 1 if
anything was lost, differs, or was read as another number.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# One thread, whatever the machine: sums by another number of threads would round differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from mutate import mutations

from cerl.__main__ import main
from cerl.record import checkpoint, pieces
from cerl.record import results as rows
from cerl.record.folder import load_file


def line(**options: Any) -> list[str]:
    """Options as words of the command line; the keyword group_name stands for --group.name."""
    words = []
    for key, value in options.items():
        group, _, name = key.partition("_")
        flag = f"--{group}.{name}".rstrip(".").replace("_", "-")
        words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


SMALL: dict[str, Any] = {
    **{"seeds": (3, 1), "device": "cpu", "net_hidden": (16, 16)},
    **{"schedule_steps": 240, "schedule_update_every": 4},
    **{"replay_capacity": 400, "replay_batch": 8, "replay_start": 40},
    **{"explore_hold": 20, "explore_decay": 100, "eval_every": 80, "eval_episodes": 2},
    **{"log_every": 40, "log_checkpoint_every": 60},
}
COPIES: dict[str, Any] = {"schedule_target_every": 20}  # for presets that copy target networks
WINDOWS = {"encoder_width": 16, "encoder_context": 2, "encoder_learnt": 5}
# The runs of a campaign, by preset: all kinds of agents and encoders, simulators on the host, and
# (the last one) a replay that takes long to write.
SETTINGS: dict[str, list[str]] = {
    "catch/cerl": line(**SMALL, **COPIES, ensemble_members=3),
    "minatar/cerl": line(**SMALL, **COPIES, ensemble_members=2, env_envs=2),
    "memory/gru": line(**SMALL, **WINDOWS, encoder_sampling="uniform", env_length=5, env_envs=2),
    "point_mass/cerl": line(**SMALL, ensemble_members=2),
    "gym/cartpole": line(**SMALL, **COPIES, env_envs=2),
    "minatar/ddqn": line(**SMALL | COPIES | {"replay_capacity": 30_000}, env_envs=8),
}


class Bits(NamedTuple):
    """The contents of a run folder, in a form that is equal if and only if all bits are."""

    rows: dict  # result rows, by column
    metrics: dict  # by column
    state: dict[str, Any]  # leaves of the newest checkpoint and rows of replay, by path
    scalars: dict[str, list]  # of TensorBoard, by seed and tag


def read_all(folder: Path) -> Bits:
    """Reads every number in a run folder, except wall-clock times."""

    def table(name: str, schema: Any) -> dict[str, list[str]]:
        columns = rows.read(folder / f"{name}.parquet", schema).to_pydict()
        columns.pop("wall_seconds", None)
        return {key: list(map(repr, values)) for key, values in columns.items()}

    return Bits(
        table("rows", rows.ROWS),
        table("metrics", rows.METRICS),
        leaves(folder),
        scalars(folder / "tensorboard"),
    )


def leaves(folder: Path) -> dict[str, Any]:
    """Every leaf of the newest checkpoint and every row of replay, tensors as bytes."""
    loaded = checkpoint.newest(folder)
    replay = None if loaded.replay is None else pieces.whole(folder, loaded.replay)
    return dict(flat({"state": loaded.state, "replay": replay}))


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their paths, except wall-clock times."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "wall_seconds":
                yield from flat(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from flat(value, f"{path}.{index}")
    elif isinstance(node, torch.Tensor):
        flags = node.contiguous().view(torch.uint8) if node.dim() else node.reshape(1)
        yield path, (str(node.dtype), tuple(node.shape), flags.numpy(force=True).tobytes())
    else:
        yield path, repr(node)


def scalars(folder: Path) -> dict[str, list]:
    """Steps and values of every tag that TensorBoard shows, except speeds."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every restart of a run
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for seed in sorted(folder.iterdir()) if folder.is_dir() else []:
        events = EventAccumulator(str(seed), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag not in ("charts/SPS", "charts/updates_per_second"):
                values = [(event.step, repr(event.value)) for event in events.Scalars(tag)]
                found[f"{seed.name}/{tag}"] = values
    return found


def differences(one: Bits, other: Bits) -> list[str]:
    """A text for each difference between two runs; empty if every bit is the same."""
    found = []
    for part, a, b in zip(Bits._fields, one, other, strict=True):
        if a.keys() != b.keys():
            found.append(f"{part}: {sorted(a.keys() ^ b.keys())[:3]} in one of the two only")
        found += [f"{part}: {key}" for key in a.keys() & b.keys() if a[key] != b[key]]
    return found


@contextlib.contextmanager
def silent(words: io.StringIO | None = None) -> Iterator[None]:
    """Within the `with` block, prints into `words` (or nowhere) instead of on the screen."""
    out = words or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield


def spawn(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Forks a process that runs cerl with some arguments.

    Args:    log, file to which its output is appended; before, called first in that process.
    Returns: the process id.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        before()
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def die_in_a_write(rng: random.Random) -> Callable[[], None]:
    """A function that makes the process that calls it kill itself within one of its next writes.

    It does so at one of four moments: when half of a file is written; when all of it is written but
    not synced; before the file is renamed; or after that.
    """
    countdown, moment = rng.randint(1, 12), rng.choice(("half", "unsynced", "unnamed", "named"))
    share = rng.random()

    def install() -> None:
        fsync, replace, left = os.fsync, os.replace, [countdown]

        def due() -> bool:
            left[0] -= 1
            return left[0] <= 0

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def dying_fsync(handle: int) -> None:
            if (
                os.path.isfile(f"/proc/self/fd/{handle}")
                and moment in ("half", "unsynced")
                and due()
            ):
                if moment == "half":
                    os.truncate(handle, int(share * os.fstat(handle).st_size))
                die()
            fsync(handle)

        def dying_replace(source: Any, target: Any, **options: Any) -> None:
            last = moment in ("unnamed", "named") and due()
            if last and moment == "unnamed":
                die()
            replace(source, target, **options)
            if last:
                die()

        os.fsync, os.replace = dying_fsync, dying_replace

    return install


class Kills:
    """Kills runs at random moments and resumes them."""

    def __init__(self, work: Path, *, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.whole: dict[str, Bits] = {}
        self.length: dict[str, float] = {}

    def reference(self, name: str) -> None:
        """Trains the undisturbed run of a preset once, and measures how long it takes."""
        if name not in self.whole:
            out, began = self.work / f"whole-{name.replace('/', '-')}", time.monotonic()
            pid = spawn(["train", name, *SETTINGS[name], "--out", str(out)], self.work / "log.txt")
            assert os.waitpid(pid, 0)[1] == 0, (self.work / "log.txt").read_text()
            self.length[name] = time.monotonic() - began
            (folder,) = out.iterdir()
            self.whole[name] = read_all(folder)

    def run(self, kills: int) -> None:
        """Trains runs of all `SETTINGS` in turn, until there were that many kills in all."""
        names = list(SETTINGS)
        number = 0
        while self.counts["kills"] < kills:
            name = names[number % len(names)]
            number += 1
            self.reference(name)
            self.one(name, number, at_most=kills)

    def one(self, name: str, number: int, *, at_most: int) -> None:
        """Trains one run, killing it a few times, and compares it with the undisturbed one.

        Args: number of the run, for its folder; at_most, kills in the whole campaign.
        """
        out, log = self.work / f"run-{number}", self.work / f"run-{number}.txt"
        left = min(self.rng.randint(4, 12), at_most - self.counts["kills"])
        while True:
            folder = next(iter(out.glob("*")), None)
            begun = folder is not None and (folder / "config.yaml").is_file()
            fresh = ["train", name, *SETTINGS[name], "--out", str(out)]
            arguments = ["train", "--resume", str(folder)] if begun else fresh
            self.counts["resumes"] += begun
            code = self.start(arguments, log, name, kill=left > 0)
            if code == -signal.SIGKILL:
                left -= 1
                self.counts["kills"] += 1
                self.counts["before the first checkpoint"] += not self.saved(out)
                continue
            if code != 0:
                finished = folder is not None and "the run is finished" in log.read_text()
                if not finished:
                    self.problems.append(f"{name}: exit code {code}:\n{log.read_text()[-2000:]}")
                    return
            break
        (folder,) = (path.parent for path in out.glob("*/finished"))
        self.counts["runs compared"] += 1
        found = differences(self.whole[name], read_all(folder))
        left_over = [path.name for path in folder.rglob("*.tmp")]
        if found or left_over:
            self.problems.append(f"{name} in {folder}: {found[:5]} {left_over}")
        else:
            shutil.rmtree(out)
            log.unlink()

    def saved(self, out: Path) -> bool:
        return any(checkpoint.files(folder) for folder in out.glob("*"))

    def start(self, arguments: list[str], log: Path, name: str, *, kill: bool) -> int:
        """Starts a run and waits for it. Args: kill, kill it at a random moment of some kind.

        Returns: the exit code, -9 if it was killed.
        """
        if not kill:
            return os.waitstatus_to_exitcode(os.waitpid(spawn(arguments, log), 0)[1])
        if self.rng.random() < 0.05:
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "cerl", *arguments], stdout=file, stderr=file
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.rng.uniform(0, 4 + self.length[name]))
            process.kill()
            self.counts["of them as python -m cerl"] += 1
            return process.wait()
        if self.rng.random() < 0.45:
            pid = spawn(arguments, log, die_in_a_write(self.rng))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            self.counts["of them inside a write"] += code == -signal.SIGKILL
            return code
        pid = spawn(arguments, log)
        until = time.monotonic() + self.rng.uniform(0, self.length[name])
        while time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Flips:
    """Flips single bits in files of a run folder, and reads everything in the folder again."""

    def __init__(self, work: Path, *, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, flips: int) -> None:
        """Flips bits, each in a copy of the folder.

        Each file is chosen with the same probability, so that small files are tested too.
        """
        name = "catch/cerl"
        out = self.work / "flips"
        with silent():
            assert main(["train", name, *SETTINGS[name], "--out", str(out)]) == 0
        (folder,) = out.iterdir()
        whole = self.read(folder)
        assert not isinstance(whole, str), whole
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        paths = [path for path in paths if path.stat().st_size]
        for number in range(flips):
            victim = self.rng.choice(paths)
            bit = self.rng.randrange(8 * victim.stat().st_size)
            copy = self.work / "flipped"
            shutil.copytree(folder, copy)
            file = copy / victim.relative_to(folder)
            content = bytearray(file.read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            self.judge(whole, self.read(copy), f"{number}: bit {bit} of {file.name}")
            shutil.rmtree(copy)

    def read(self, folder: Path) -> tuple | str:
        """The config, all numbers, and which checkpoints are damaged; or the error message."""
        words = io.StringIO()
        try:
            with silent(words), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = load_file(folder / "config.yaml").model_dump()
                loaded = checkpoint.newest(folder)
                return options, read_all(folder), loaded.damaged
        except (ValueError, RuntimeError, OSError) as error:
            return str(error)

    def judge(self, whole: tuple | str, got: tuple | str, what: str) -> None:
        """Counts the consequence of a flipped bit.

        Args: whole, what `read` gave without the flipped bit; got, with it; what was flipped.
        """
        assert not isinstance(whole, str)
        self.counts["flipped bits"] += 1
        if isinstance(got, str):
            self.counts["refused"] += 1
            return
        if got[2]:
            self.counts["an older checkpoint taken, and said"] += 1
            return
        found = differences(whole[1], got[1]) if whole[0] == got[0] else ["config.yaml"]
        # TensorBoard stops reading at a damaged record. Then some values are missing, which is no
        # problem as long as the others are right.
        if found and all(self.shorter(part, whole[1], got[1]) for part in found):
            self.counts["events cut at the damage"] += 1
        elif found:
            self.problems.append(f"{what}: read as other numbers: {found[:5]}")
        else:
            self.counts["without effect"] += 1

    def shorter(self, part: str, whole: Bits, got: Bits) -> bool:
        """Whether a difference is only that TensorBoard's events end earlier."""
        if not part.startswith("scalars: "):
            return False
        key = part.removeprefix("scalars: ")
        if key not in whole.scalars or key not in got.scalars:
            return "in one of the two only" in part and got.scalars.keys() <= whole.scalars.keys()
        mine = got.scalars[key]
        return mine == whole.scalars[key][: len(mine)]


class Mutations:
    """Resumes from checkpoints whose bytes pass all checksums but whose structure was changed."""

    def __init__(self, work: Path, *, seed: int) -> None:
        self.work, self.seed = work, seed
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, mutated: int) -> None:
        """Changes nodes of a checkpoint of each of the `SETTINGS`, `mutated` nodes in all."""
        names = [name for name in SETTINGS if name != "minatar/ddqn"]
        for index, name in enumerate(names):
            out = self.work / f"mutations-{index}"
            options = [*SETTINGS[name], *line(schedule_steps=120, log_checkpoint_every=60)]
            with silent():
                assert main(["train", name, *without_repeats(options), "--out", str(out)]) == 0
            (folder,) = out.iterdir()
            (folder / "finished").unlink()
            *_, newest = checkpoint.files(folder)
            content = torch.load(newest, weights_only=True)
            share = mutated // len(names) + (index < mutated % len(names))
            for what, spoilt in mutations(content, share, seed=self.seed):
                try:
                    torch.save(spoilt, newest)
                except (RuntimeError, NotImplementedError, ValueError):
                    self.counts["of which torch cannot write a file"] += 1
                else:
                    self.resume(folder, f"{name}: {what}")
                torch.save(content, newest)

    def resume(self, folder: Path, what: str) -> None:
        log = self.work / "mutated.txt"
        log.unlink(missing_ok=True)
        copy = self.work / "mutated"
        shutil.copytree(folder, copy)
        pid = spawn(["train", "--resume", str(copy)], log)
        code, text = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text()
        shutil.rmtree(copy)
        self.counts["mutated checkpoints"] += 1
        if code not in (0, 2) or "Traceback" in text:
            self.problems.append(f"{what}: exit code {code}:\n{text[-1500:]}")
        elif code:
            self.counts["refused"] += 1
        else:
            older = "set aside" in text
            self.counts["an older one taken, and said" if older else "without effect"] += 1


def without_repeats(options: list[str]) -> list[str]:
    """Words of the command line without repeated options: the last value given is kept."""
    groups: dict[str, list[str]] = {}
    for word in options:
        if word.startswith("--"):
            groups[word] = key = [word]
        else:
            key.append(word)
    return [word for group in groups.values() for word in group]


class Disks:
    """Trains on a disk that fills up, enlarges the disk, resumes the run, and compares."""

    def __init__(self, work: Path, *, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, disks: int) -> None:
        """Trains on disks of random sizes, from 4 kB to twice of what a run needs.

        The disks are file systems in memory; mounting them needs root.
        """
        name = "catch/cerl"
        with silent():
            assert main(["train", name, *SETTINGS[name], "--out", str(self.work / "roomy")]) == 0
        (folder,) = (self.work / "roomy").iterdir()
        whole = read_all(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for number in range(disks):
            kilobytes = max(4, int(2 * size / 1024 * self.rng.random()))
            with self.disk(kilobytes) as place:
                if place is None:
                    self.counts["file systems that could not be mounted"] += 1
                    return
                self.one(name, place, whole, f"{number}: {kilobytes} kB")

    @contextlib.contextmanager
    def disk(self, kilobytes: int) -> Iterator[Path | None]:
        """Mounts a file system of a size; gives its folder, or None if this user may not mount."""
        place = self.work / "disk"
        place.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            yield None
            return
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def one(self, name: str, place: Path, whole: Bits, what: str) -> None:
        log = self.work / "disk.txt"
        log.unlink(missing_ok=True)
        pid = spawn(["train", name, *SETTINGS[name], "--out", str(place / "out")], log)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.counts["disks"] += 1
        self.counts["of them too small to end on"] += code != 0
        text = log.read_text()
        if code not in (0, 2) or "Traceback" in text:
            self.problems.append(f"{what}: exit code {code}:\n{text[-2000:]}")
            return
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        folder = next(iter(place.glob("out/*/config.yaml")), None)
        again = ["train", name, *SETTINGS[name], "--out", str(place / "again")]
        if code and folder is not None:
            again = ["train", "--resume", str(folder.parent)]
            self.counts["of them gone on with"] += 1
        if code:
            pid = spawn(again, log)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = [path.parent for path in place.glob("*/*/finished")]
        if code or len(ended) != 1:
            self.problems.append(f"{what}: exit code {code} with room:\n{log.read_text()[-2000:]}")
            return
        self.counts["runs compared"] += 1
        if found := differences(whole, read_all(ended[0])):
            self.problems.append(f"{what}: {found[:5]}")


def report(title: str, counts: Counter[str], problems: list[str]) -> bool:
    """Prints counts and problems. Returns: whether there were no problems."""
    print(f"{title}:")
    for name, count in counts.items():
        print(f"  {count:6,} {name}")
    print(f"  {len(problems):6,} problems")
    for problem in problems[:10]:
        print(f"    {problem}")
    return not problems


def campaign(*, kills: int, flips: int, mutations: int, disks: int, seed: int, work: Path) -> bool:
    """Runs all four kinds of faults. Returns: whether nothing was lost, different or misread."""
    well = True
    for kind, count in ((Kills, kills), (Flips, flips), (Mutations, mutations), (Disks, disks)):
        if count:
            one = kind(work, seed=seed)
            began = time.monotonic()
            one.run(count)
            well &= report(
                f"{kind.__name__} ({time.monotonic() - began:,.0f} s)", one.counts, one.problems
            )
    return well


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fault campaigns.")
    for flag, default in (("kills", 30), ("flips", 50), ("mutations", 50), ("disks", 5)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = vars(parser.parse_args())
    print(f"seed {asked['seed']}")
    with tempfile.TemporaryDirectory() as name:
        sys.exit(not campaign(work=Path(name), **asked))
