"""CUDA's multi-process service (MPS): kernels of several processes run on one GPU at the same time.

Without it, processes on one GPU take turns. The service is a program of NVIDIA's driver; a sweep
starts one of its own, in a temporary folder, and ends it again.
Source: https://docs.nvidia.com/deploy/mps
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cerl.sweep.slots import VISIBLE

PROGRAM = "nvidia-cuda-mps-control"
_PATIENCE = 60.0  # seconds to wait for the service to answer


@contextlib.contextmanager
def service(gpus: Sequence[str]) -> Iterator[dict[str, str]]:
    """A context in which the service runs for some GPUs.

    Args:    gpus, their UUIDs. Processes that use the service have to name their GPU by its UUID
             too, since the service numbers GPUs anew.
    Yields:  the environment variables that make a process use the service.
    Raises:  RuntimeError if the service does not start; ValueError if there is no GPU.
    """
    if not gpus:
        raise ValueError("--mps: expected a GPU, found none; leave --mps out on a CPU")
    with tempfile.TemporaryDirectory(prefix="cerl-mps-", ignore_cleanup_errors=True) as folder:
        pipes = {"CUDA_MPS_PIPE_DIRECTORY": folder}
        logs = {"CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **pipes, **logs, VISIBLE: ",".join(gpus)}
        _ask(["-d"], "", environment, folder)
        try:
            _ask([], "get_server_list\n", environment, folder)
            yield pipes
        finally:
            with contextlib.suppress(RuntimeError):
                _ask([], "quit\n", environment, folder)


def _ask(options: list[str], words: str, environment: dict[str, str], folder: str) -> None:
    """Runs the control program. Raises: RuntimeError with what it said, if it fails."""
    advice = "leave --mps out to train without it"
    try:
        # The output goes to a file: the service inherits it and would keep a pipe open for ever.
        with Path(folder, "output.txt").open("w+") as output:
            done = subprocess.run(
                [PROGRAM, *options],
                input=words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                timeout=_PATIENCE,
            )
            output.seek(0)
            said = output.read().strip()
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(f"--mps: {PROGRAM} cannot be started ({reason}); {advice}") from error
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"--mps: {PROGRAM} does not answer; {advice}") from None
    if done.returncode:
        said = said or f"exit code {done.returncode}"
        raise RuntimeError(f"--mps: {PROGRAM} failed ({said}); {advice}")
