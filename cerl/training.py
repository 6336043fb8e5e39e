"""Training: how a run starts, resumes and ends, and its loop, to be read from top to bottom."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cerl.config import Config, forks
from cerl.diagnose import measurements
from cerl.record import boards, finished, trust
from cerl.record.attended import attended
from cerl.record.files import sweep_temporaries
from cerl.record.folder import FILE, change, check_out, load_file, new_folder
from cerl.record.versions import record_versions
from cerl.run import Run
from cerl.wiring import assemble, reserved_for


def train(config: Config) -> Path:
    """Trains a new run to its end. Returns: its run folder.

    Raises: Stopped if it was told to stop and has saved; errors of what cannot start.
    """
    check_out(config.out)
    forks.refuse_unmade(config)
    boards.check(config)
    with reserved_for(config) as reservation:
        parts, folder = assemble(config), new_folder(config)
        with attended(folder, config) as pulse:
            record_versions(folder, parts.device)
            return carry_out(Run(config, parts, folder, reservation, pulse))


def resume(
    folder: Path, *, changes: Mapping[str, Any] | None = None, trusted: bool = False
) -> Path:
    """Resumes a run from the newest intact checkpoint in its folder and trains it to its end.

    Without any checkpoint, e.g. in a folder that a sweep has planned, it starts anew. A resumed run
    equals an uninterrupted one to the bit, if the state of its simulators can be saved.

    Args:   changes, new values of options by dotted key (`cerl.record.folder.CHANGEABLE`), which
            are written to config.yaml; trusted, also another user's run may import modules.
    Raises: ValueError if nothing is left to do, or another process trains the run; as `train`.
    """
    config = load_file(folder / FILE, changes)
    trust.check(config, folder, trusted=trusted)
    boards.check(config)
    if finished.finished(folder, steps=config.schedule.steps):
        raise ValueError(
            f"{folder}: the run is finished; nothing to resume (cerl report {folder}). To train it "
            f"longer: cerl train --resume {folder} --schedule.steps STEPS"
        )
    with attended(folder, config) as pulse, reserved_for(config) as reservation:
        sweep_temporaries(folder)
        run = Run(config, assemble(config), folder, reservation, pulse)
        run.restore()
        change(folder, changes or {})
        for sentence in record_versions(folder, run.parts.device):
            run.logger.note(sentence)
        return carry_out(run)


def carry_out(run: Run) -> Path:
    """Trains a run to its end and marks it finished. Returns: its folder. Raises: as `train`."""
    with run.session() as stopped:
        if run.iteration == 0:
            run.save()
        loop(run, stopped)
        run.save(must=True)
    finished.mark(run.folder, run.schedule.steps_at(run.iteration))
    return run.folder


def loop(run: Run, stopped: Callable[[], bool]) -> None:
    """Runs iterations until the last one is done or the run is told to stop."""
    schedule, collector = run.schedule, run.parts.collector
    if not run.recorded:  # the run was stopped during the evaluation that is due here
        record(run, stopped)
        run.save_if_due()
    while run.iteration < schedule.last and not stopped():
        # Every iteration: one agent step of every environment, and the updates that are due.
        number, run.whole = run.iteration + 1, False
        collector.step(partial(run.learn, schedule.updates_in(number, since=run.filled)))
        if schedule.refreshes(number):
            collector.refresh()
        run.count()
        # Now and then: metrics, episodes and scores.
        if not run.recorded:
            record(run, stopped)
        if not run.recorded:  # told to stop during the evaluation; resuming repeats it
            return
        # Now and then: a checkpoint. New rows of replay are written to disk all the time.
        run.saver.stream()
        run.save_if_due()
        run.logger.progress(run.steps, run.updates)


def record(run: Run, stopped: Callable[[], bool]) -> None:
    """Logs what is due; nothing if told to stop during the evaluation: resuming repeats it."""
    config, parts, logger, number = run.config, run.parts, run.logger, run.iteration
    metrics, scores = {}, None
    if run.schedule.due(number, config.log.every):
        metrics = measurements(parts.learner, parts.collector)
    if run.reservation is not None and parts.device.type == "cuda":
        run.reservation.write()  # tells other runs how much GPU memory this one still wants
    if found := parts.watch.look(run.steps, metrics):
        logger.note("\n".join(found))
        run.capture_updates()
    if run.schedule.evaluates(number, config.eval.every):
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
