"""Measures how fast a config trains on this machine, in a process of its own and a few seconds.

The process trains a run in a temporary folder, with the loop of `cerl/training.py`. Its replay is
full of random rows, so that updates are made from the first step on. The first third of the time is
not counted: kernels are compiled and graphs are captured then. Afterwards one evaluation is timed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cerl.config import Config
from cerl.record.folder import FILE, dump, load_file, new_folder

SECONDS = 20.0  # for a measurement, without the start of the process
# Most seconds that the process may take altogether; the rest is its start and the first updates.
PATIENCE = 300.0
_FIRST, _TRAINING = 0.3, 0.7  # shares of the seconds after which is counted, and evaluated


class Speed(NamedTuple):
    """How fast a config trains."""

    rate: float  # agent steps of one seed per second, without evaluations
    evaluation: float  # seconds of an evaluation, at least

    def hours(self, config: Config) -> float:
        """Hours that a run with this config takes."""
        steps = config.schedule.steps
        evaluations = -(-steps // config.eval.every)
        return (steps / self.rate + evaluations * self.evaluation) / 3600


def measured(config: Config, *, device: str, seconds: float = SECONDS) -> Speed:
    """Measures the speed of a config.

    Args:    device of the measurement; seconds of training and evaluation.
    Raises:  RuntimeError with the last words of the process, if it fails or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="cerl-speed-") as name:
        folder = Path(name)
        dump(config.model_copy(update={"out": name, "device": device}), folder / FILE)
        command = [sys.executable, "-P", "-m", "cerl.sweep.speed", name, str(seconds)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE + seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no result after {PATIENCE + seconds:.0f} seconds") from None
        if done.returncode:
            lines = done.stdout.decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
        return Speed(**json.loads((folder / "speed.json").read_text()))


def _measure(config: Config, *, seconds: float) -> Speed:
    """Trains and evaluates a config in this process."""
    # Imported here, since the command line imports this module and torch takes seconds.
    import torch

    from cerl import training
    from cerl.replay import fill_randomly
    from cerl.run import Run
    from cerl.wiring import assemble, close

    steps = 1 << 40  # so many that none of them is the last one
    config = config.model_copy(
        update={
            "schedule": config.schedule.model_copy(update={"steps": steps}),
            "eval": config.eval.model_copy(update={"every": steps}),
            "replay": config.replay.model_copy(update={"start": 1}),
        }
    )
    parts = assemble(config)
    fill_randomly(parts.replay, parts.env.spec, config.ensemble.members)
    run = Run(config, parts, new_folder(config))
    end = time.monotonic() + seconds

    def after(share: float) -> Callable[[], bool]:
        """A function that tells whether this share of the seconds is over."""
        return lambda: time.monotonic() > end - (1 - share) * seconds

    def trained(share: float) -> tuple[float, int]:
        """Trains until a share of the seconds is over. Returns: the time, and agent steps."""
        before = run.iteration
        training.loop(run, after(share))
        if run.iteration == before:  # one step takes longer than that
            training.loop(run, lambda: run.iteration > before)
        if parts.device.type == "cuda":
            torch.cuda.synchronize(parts.device)
        return time.monotonic(), run.steps

    with run.logger:
        (begin, first), (now, last) = trained(_FIRST), trained(_TRAINING)
        start = time.monotonic()
        parts.evaluator.run(run.iteration, stopped=after(1.0))
        evaluation = time.monotonic() - start
    run.saver.checkpoints.close()
    close(parts)
    return Speed((last - first) / (now - begin), evaluation)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    speed = _measure(load_file(place / FILE), seconds=float(sys.argv[2]))
    (place / "speed.json").write_text(json.dumps(speed._asdict()))
    sys.stdout.flush()
    os._exit(0)  # nothing of this run is kept, so nothing has to end in order
