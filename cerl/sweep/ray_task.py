"""What a node of a Ray cluster does for a sweep: it trains one run in a process of its own.

Ray sends the functions of this module to the nodes by value (`cerl.sweep.on_ray`). So they can tell
that a node has no cerl, or another version of it. Therefore this module imports nothing of cerl.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

POLL = 0.5  # seconds between two looks at the stop file
PATIENCE = 10.0  # seconds until a file that a shared file system does not show counts as missing
TAIL = 4096  # bytes at the end of the log that are searched for its last line
UNFIT = 1000  # stands for the exit code if the node cannot train a run; no process has this one
# A program between Ray's process and that of the run: it starts the command that its arguments are,
# passes SIGTERM on, and ends as the command does. Ray kills its process's own children at once, and
# so this program, if the node's Ray or the sweep's command dies. Linux then sends SIGTERM to the
# command (PR_SET_PDEATHSIG = 1), which saves and ends instead of being killed, too.
GUARD = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
guard = os.getpid()
command = os.fork()
if not command:
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
        if os.getppid() != guard:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execv(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGTERM, lambda number, frame: os.kill(command, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(guard, -code)
sys.exit(code)
"""


def check(*, out: str, folder: str, version: str, environment: Mapping[str, str]) -> str:
    """Whether this node can train a run.

    Args:    out, folder of the sweep; folder, name of a run folder of its plan; version of cerl
             that made the plan; environment, variables that the process of a run gets.
    Returns: why the node cannot; "" if it can.
    """
    if not _planned(Path(out), folder):
        return (
            f"it does not see {out}: there is no plan.json with {folder} in it; put the sweep on a "
            "file system that all nodes share, under the same path (--out)"
        )
    command = [sys.executable, "-c", "import cerl; print(cerl.__version__)"]
    done = subprocess.run(
        command,
        cwd=_directory("", out),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    found = done.stdout.strip()
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return (
            f"its Python, {sys.executable}, cannot import cerl ({words[-1]}); install cerl "
            f"{version} there"
        )
    if found != version:
        return (
            f"it has cerl {found}, and this command is of cerl {version}; install {version} there "
            f"({sys.executable} -m pip install)"
        )
    return ""


def _planned(out: Path, folder: str) -> bool:
    """Whether this node sees a run of a plan, within some seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            plan = json.loads((out / "plan.json").read_text())
            named = any(run["folder"] == folder for run in plan["runs"])
            if named and (out / folder / "config.yaml").is_file():
                return True
        if time.monotonic() > end:
            return False
        time.sleep(POLL)


def _directory(wanted: str, out: str) -> str:
    """The folder in which the process of a run starts: that of the sweep's command, if this node
    has it, since modules of a user's tasks are looked up there."""
    return wanted if wanted and os.path.isdir(wanted) else out


def train(
    words: Sequence[str],
    *,
    out: str,
    folder: str,
    version: str,
    log: str,
    stop: str,
    directory: str,
    environment: Mapping[str, str],
) -> tuple[str, int, str]:
    """Trains a run: starts a process of this Python and waits for its end.

    The process is told to save and stop (SIGTERM) once the stop file exists, and if Ray cancels the
    task or ends the worker process that carries it out.

    Args:    words, arguments of Python; log, file to which the output is appended; stop, the stop
             file; directory, where the process starts, if the node has it; the others as of
             `check`.
    Returns: name of this node; exit code of the process, negative if a signal killed it; the last
             line of its output. If this node cannot train the run, the code is UNFIT, and the last
             line says why.
    """
    host = os.uname().nodename
    if why := check(out=out, folder=folder, version=version, environment=environment):
        return host, UNFIT, why
    with _told() as told, open(log, "ab") as output:
        begin = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD, sys.executable, *words],
            cwd=_directory(directory, out),
            env={**os.environ, "CUDA_VISIBLE_DEVICES": _gpus(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _waited(process, lambda: told() or os.path.exists(stop))
    return host, code, _last_line(Path(log), begin)


def _gpus() -> str:
    """The GPUs that Ray gave to this task, for CUDA_VISIBLE_DEVICES; "" for none.

    Ray does not always set the variable: for a task without a GPU, older versions clear it and
    newer ones leave it alone.
    """
    import ray

    return ",".join(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def _waited(process: subprocess.Popen, stopped: Callable[[], bool]) -> int:
    """The exit code of a process, which is told once to save and stop if that is asked for."""
    told = False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL)
            if not told and stopped():
                told = True
                process.terminate()
    except BaseException:
        if not told:
            process.terminate()
        process.wait()
        raise


@contextlib.contextmanager
def _told() -> Iterator[Callable[[], bool]]:
    """A context in which Ray's ways to end a task do not interrupt it.

    Ray cancels a task by the handler of SIGINT: the task returns what it has then. It ends a worker
    process by SIGTERM, which is handled as before once the context has ended.

    Yields: a function that returns whether one of them came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in numbers
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    if signal.SIGTERM in came:
        signal.raise_signal(signal.SIGTERM)


def _last_line(log: Path, begin: int) -> str:
    """The last line of a log after byte `begin`: of those that begin with `error:` if there are
    any."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(begin, end - TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1].strip()
