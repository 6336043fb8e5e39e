"""A sweep on Ray in a process of its own, whose runs do what a shell script in their folder says.

    python tests/ray_driver.py FOLDER JSON     JSON holds options of `on_ray.sweep`, and `version`

The process ends with the exit codes of the command `cerl`. The script of a run, `act`, is given the
run folder; the number of runs in the folder's plan is that of such scripts.
"""

import json
import sys
from pathlib import Path

from planned import planned

from cerl.config import load
from cerl.record import finished
from cerl.stop import SAVED, Stopped
from cerl.sweep import on_ray, plan
from cerl.sweep.plan import PlannedRun

SHELL = "import os, sys; os.execvp('sh', ['sh', sys.argv[1] + '/act', sys.argv[1]])"
FINISH = 'cp "$1/whole" "$1/finished"\n'
STARTED = (
    'echo "$(basename $1) gpu=$CUDA_VISIBLE_DEVICES threads=$OMP_NUM_THREADS" >> $1/../started\n'
)


def runs_in(out: Path, *acts: str, **options) -> None:
    """Plans runs that do what shell commands say. Args: options of their config."""
    config = load("catch/ddqn", {"device": "cpu", "schedule.steps": 1000, **options})
    runs = planned([config] * len(acts), out)
    for run, act in zip(runs, acts, strict=True):
        (out / run.folder / "act").write_text(STARTED + act)
        finished.mark(out / run.folder, 1000)
        (out / run.folder / "finished").rename(out / run.folder / "whole")
    (out / plan.FILE).write_text(plan.text(plan.Plan("", {}, tuple(runs))))


def started(out: Path) -> list[dict[str, str]]:
    """What the scripts of runs were started with, in order."""
    path = out / "started"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        {"run": words[0], **dict(word.split("=", 1) for word in words[1:])}
        for words in map(str.split, lines)
    ]


def words(run: PlannedRun, out: Path, *, device: str) -> list[str]:
    return ["-S", "-c", SHELL, str(out / run.folder)]


def main(out: Path, options: dict) -> int:
    on_ray.words = words
    on_ray.__version__ = options.pop("version", on_ray.__version__)
    found = plan.read(out)
    assert found is not None
    try:
        on_ray.sweep(found.runs, out, **options)
    except Stopped:
        return SAVED
    except (ValueError, RuntimeError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
