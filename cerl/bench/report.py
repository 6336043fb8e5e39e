"""`cerl bench report`: seconds that a report of a large study takes, part by part and as a whole.

Nobody trained the study: its run folders hold configs, random returns and random metrics.
"""

import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import tyro

from cerl.bench import by_hand, many_runs
from cerl.bench.rows import Row, Rows
from cerl.bench.table import Output, Table
from cerl.config import Config, load
from cerl.config.lists import expanded
from cerl.device.cores import cores
from cerl.record import folder as run_folder
from cerl.record import results

Result = TypeVar("Result")

METRICS = ("own_data_share", "value_error_individual", "td_error_own", "feature_rank")
LOGGED = 20  # steps at which a run has metrics


def report(
    *,
    parts: tuple[Literal["parts", "whole"], ...] = ("parts", "whole"),
    presets: tuple[str, ...] = (
        "atari/paper-ddqn",
        "atari/paper-bootdqn",
        "atari/paper-cerl",
        "atari/paper-own-batches",
        "atari/paper-tandem",
    ),
    games: str = "atari-55",
    limit: int = 55,
    seeds: int = 5,
    evaluations: int = 200,
    samples: int = 50_000,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("."),
    output: Output = Output(),
) -> Rows:
    """Times the parts of a report, and `cerl report --figure all --html` as a process of its own.

    Args:
        parts: the parts one by one, the whole command, or both
        presets: methods of the study, which are run on all games
        games: a named list of environments
        limit: at most so many of the games
        seeds: seeds of each run
        evaluations: evaluations of each seed
        samples: resamples of intervals by percentiles, which are measured beside those by t
        folder: a folder on the disk that is measured; the files written are deleted
    """
    counts = {"limit": limit, "seeds": seeds, "evaluations": evaluations, "samples": samples}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name}: expected a number from 1 on, got {count}")
    table = Table("report", output, device=f"cpu ({cores()} CPU cores)")
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as fresh:
        out = Path(fresh) / "runs"
        names = expanded([games], family="atari")[:limit]
        head: Row = {"runs": len(names) * len(presets), "seeds": seeds, "points": evaluations}
        _leave(presets, names, out, seeds=seeds, evaluations=evaluations)
        for measured in _parts(out, samples=samples) if "parts" in parts else ():
            table.add(head | measured)
        for measured in _whole(out, Path(fresh) / "report") if "whole" in parts else ():
            table.add(head | measured)
    return table.finished()


def _leave(
    presets: tuple[str, ...], names: list[str], out: Path, *, seeds: int, evaluations: int
) -> None:
    """Writes the run folders of the study."""
    number = 0
    for method in presets:
        for name in names:
            config = load(method, {"env.name": name, "seeds": [*range(seeds)]})
            own = out / f"{number:04d}-{method.rpartition('/')[2]}-{name}"
            own.mkdir(parents=True)
            run_folder.dump(config, own / run_folder.FILE)
            many_runs.leave_rows_of(config, own, evaluations, number)
            _metrics(config, own, evaluations * config.eval.every, number)
            number += 1


def _metrics(config: Config, own: Path, steps: int, number: int) -> None:
    """Writes metrics.parquet into a run folder: random numbers of every member and seed."""
    shape = len(METRICS), LOGGED, len(config.seeds), config.ensemble.members
    name, step, seed, member = (grid.ravel() for grid in np.indices(shape))
    columns = {
        "name": np.array(METRICS)[name],
        "step": (1 + step) * (steps // LOGGED),
        "seed": np.array(config.seeds)[seed],
        "member": member,
        "value": np.random.default_rng(number).random(len(name)),
    }
    rows = results.Rows(own / "metrics.parquet", results.METRICS)
    rows.append(columns)
    rows.flush()


def _parts(out: Path, *, samples: int) -> Iterator[Row]:
    """The rows of the parts, in the order in which a report makes them."""
    from cerl.report import aggregates, curves, summary, tables, verdicts
    from cerl.report import page as pages
    from cerl.report.figures import asked, canvas, catalogue
    from cerl.report.page.runs import runs_of

    table, spent = _timed(lambda: curves.load_rows([out]))
    yield {"what": f"read {table.num_rows:,} rows"} | spent
    (found, notes), spent = _timed(lambda: curves.cells(table))
    yield {"what": "labels and curves"} | spent
    scores, spent = _timed(lambda: summary.summarise(found))
    yield {"what": "scores with intervals by t"} | spent
    how = {"method": "percentile", "samples": samples}
    _, spent = _timed(lambda: summary.summarise(found, **how))
    yield {"what": f"scores with percentiles of {samples:,} resamples"} | spent
    judged, spent = _timed(lambda: verdicts.verdicts(found))
    yield {"what": "verdicts by t"} | spent
    _, spent = _timed(lambda: aggregates.over_tasks(found))
    yield {"what": "aggregates over tasks"} | spent
    wanted = asked.Asked(rows=table, summary=scores, judged=judged)
    for name, entry in catalogue.FIGURES.items():
        with contextlib.suppress(canvas.NoFigure):
            figure, spent = _timed(lambda entry=entry: entry.draw(found, wanted))
            path = out / f"{name}.png"
            _, saved = _timed(lambda figure=figure, path=path: canvas.save(figure, path))
            yield {"what": f"figure {name}"} | {k: spent[k] + saved[k] for k in ("s", "cpu s")}
    told = pages.Scores(*tables.table(scores), tables.caption(scores))
    parts = pages.Parts(found, told, notes, judged, runs_of(table))
    text, spent = _timed(lambda: pages.content(parts, "", folder=out))
    yield {"what": "page without plotly"} | spent | {"file MB": len(text) / 1e6}


def _whole(out: Path, to: Path) -> Iterator[Row]:
    """The row of the whole command, its process started and ended."""
    words = [sys.executable, "-m", "cerl", "report", str(out), "--out", str(to)]
    words += ["--figure", "all", "--html"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, spent = _timed(lambda: by_hand.run(words, stdout=subprocess.DEVNULL))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (to / "report.html").stat().st_size / 1e6
    what = "cerl report --figure all --html, the whole process"
    yield {"what": what, "s": spent["s"], "cpu s": cpu, "file MB": size}


def _timed(call: Callable[[], Result]) -> tuple[Result, Row]:
    """The result of a call, and the seconds that it took of time and of CPU time."""
    begin, used = time.perf_counter(), time.process_time()
    result = call()
    took: Row = {"s": time.perf_counter() - begin, "cpu s": time.process_time() - used}
    return result, took | {"file MB": None}
