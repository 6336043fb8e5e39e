"""Training: the loop, read from top to bottom, and how a run begins, goes on and ends."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cerl.config import Config, load
from cerl.diagnose import measurements
from cerl.record import finished, trust
from cerl.record.files import sweep_temporaries
from cerl.record.folder import FILE, change, check_out, load_file, new_folder
from cerl.record.lock import held
from cerl.record.versions import record_versions
from cerl.run import Run
from cerl.wiring import assemble, reserved_for


def train(config: Config | str, overrides: Mapping[str, Any] | None = None) -> Path:
    """Trains a population from the start.

    Args:    config, or the name of a preset or path of a YAML file; then overrides are options that
             differ from it, nested or with dotted keys: {"seeds": [0, 1], "schedule.steps": 2_000}.
    Returns: the run folder, a new one in the folder `out` of the config.
    Raises:  ConfigError if the options cannot be read or contradict each other; RuntimeError if the
             run does not fit into memory; Stopped (a KeyboardInterrupt) if it was told to stop, and
             saved.
    """
    if isinstance(config, str):
        config = load(config, overrides)
    elif overrides:
        raise ValueError("overrides: expected with the name of a preset, got them with a Config")
    check_out(config.out)
    with reserved_for(config) as reservation:
        parts, folder = assemble(config), new_folder(config)
        with held(folder):
            record_versions(folder, parts.device)
            return carry_out(Run(config, parts, folder, reservation))


def resume(
    folder: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> Path:
    """Goes on from the newest intact checkpoint of a run folder, or starts the run where it has
    none: bit for bit where the simulator can.

    Args:   changes of options that may change in a run, by dotted key, which are then kept in its
            config.yaml; trusted, the run may import a module even if it is somebody else's.
    Returns: the run folder.
    Raises: ValueError if there is nothing to resume, or another process is training the run;
            Stopped if it was told to stop, and saved.
    """
    folder = Path(folder)
    config = load_file(folder / FILE, changes)
    trust.check(config, folder, trusted=trusted)
    with held(folder), reserved_for(config) as reservation:
        if finished.finished(folder, steps=config.schedule.steps):
            raise ValueError(
                f"{folder}: the run is finished; nothing to resume (cerl report {folder}). To "
                f"train it longer: cerl train --resume {folder} --schedule.steps STEPS"
            )
        sweep_temporaries(folder)
        run = Run(config, assemble(config), folder, reservation)
        run.restore()
        change(folder, changes or {})
        for sentence in record_versions(folder, run.parts.device):
            run.logger.note(sentence)
        return carry_out(run)


def carry_out(run: Run) -> Path:
    """Trains a run to its end. Returns: its folder. Raises: Stopped as `train`."""
    with run.session() as stopped:
        if run.iteration == 0:
            run.save()
        loop(run, stopped)
        run.save(must=True)
    finished.mark(run.folder, run.schedule.steps_at(run.iteration))
    return run.folder


def loop(run: Run, stopped: Callable[[], bool]) -> None:
    """Trains from where the run stands, up to its last iteration or until told to stop."""
    schedule, collector, log = run.schedule, run.parts.collector, run.config.log
    if not run.recorded:  # an earlier session was told to stop in the evaluation that is due here
        record(run, stopped)
    while run.iteration < schedule.last and not stopped():
        # Always: one agent step of every environment, and the updates that are then due.
        number, run.whole = run.iteration + 1, False
        collector.step(partial(run.learn, schedule.updates_in(number, since=run.filled)))
        if schedule.refreshes(number):
            collector.refresh()
        run.count()
        # Now and then: metrics, episodes and scores.
        if not run.recorded:
            record(run, stopped)
        if not run.recorded:  # told to stop, so nothing of this iteration is in the log
            return
        # Now and then: a checkpoint; rows of replay go to the disk all the time.
        run.saver.stream()
        late = run.saver.late(log.checkpoint_minutes)
        if late or schedule.due(number, log.checkpoint_every):
            run.save()
        run.logger.progress(run.steps, run.updates)


def record(run: Run, stopped: Callable[[], bool]) -> None:
    """Metrics, episodes and scores that are due go to the log, all of them or none.

    Told to stop, the evaluation is given up, and made on resuming.
    """
    config, parts, logger, number = run.config, run.parts, run.logger, run.iteration
    metrics, scores = {}, None
    if run.schedule.due(number, config.log.every):
        metrics = measurements(parts.learner, parts.collector)
    if run.reservation is not None and parts.device.type == "cuda":
        run.reservation.write()  # graphs have taken memory since, which nobody else can tell
    if found := parts.watch.look(run.steps, metrics):
        logger.note("\n".join(found))
        run.capture_updates()
    if run.schedule.due(number, config.eval.every):
        scores = parts.evaluator.run(number, stopped=stopped)
        if scores is None:
            return
    at = run.steps, run.updates, parts.collector.real_steps
    if metrics:
        logger.training(*at[:2], metrics)
        logger.episodes(*at, parts.collector.take_finished())
    if scores is not None:
        logger.evaluation(*at, scores)
    run.recorded = True
