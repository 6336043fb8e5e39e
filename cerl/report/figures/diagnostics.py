"""Draws diagnostics over training, from the metrics that runs record beside their rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cerl.record import results
from cerl.record.results import RowsError
from cerl.report.curves import Cell
from cerl.report.figures import canvas
from cerl.report.figures.asked import Asked
from cerl.report.figures.look import legend_of, looks, title_of
from cerl.text import few

# Metrics in the order of the rows of panels: name in metrics.parquet, what its axis is called.
METRICS = {
    "own_data_share": "own rows in replay, share",
    "value_error_individual": "value error, return",
    "value_error_rms_individual": "value error (RMS), return",
    "td_error": "TD error, return",
    "td_error_own": "TD error on own rows",
    "td_error_others": "TD error on others' rows",
    "greedy_agreement_own": "greedy action is own\nreplayed one, share",
    "greedy_agreement_others": "greedy action is others'\nreplayed one, share",
    "vote_disagreement": "vote in a minority, share",
    "vote_entropy_individual": "entropy of votes, nats",
    "value_spread": "spread of members' values,\nreturn",
    "feature_rank": "feature rank",
    "dormant_share": "dormant units, share",
    "action_variance": "variance of actions\nbetween members",
    "log_prob_own": "log-probability of\nown actions",
    "log_prob_others": "log-probability of\nothers' actions",
    "auxiliary_loss": "loss of auxiliary heads",
    "target_value": "target value, return",
    "gradient_norm": "gradient norm",
    "gate_half_life": "half-life of gates,\nagent steps",
    "gate_half_life_spread": "half-life of gates,\ninterquartile range",
    "prunable_share": "prunable attention, share",
    "skipped_share": "skipped attention, share",
    "self_share": "attention to the row itself,\nshare",
}
ENVS = canvas.ACROSS  # most environments, which have a column each
ROWS = 8  # most metrics of a figure


def draw(found: Sequence[Cell], asked: Asked, *, names: Sequence[str] = ()) -> Figure:
    """A row of panels for each metric, a column for each environment, a line for each setting: the
    mean over members and seeds, with the least and the greatest seed as a band.

    Args: names of metrics (none: the first of `METRICS` that there are).
    """
    if asked.rows is None:
        raise canvas.NoFigure("the rows, which tell where the metrics are, were not given")
    values = read(asked.rows, names or [*METRICS])
    own = {(c.env, c.preset, c.config_hash): c for c in found}
    lines = {k: v for k, v in values.items() if k[:3] in own}
    there = [name for name in names or METRICS if any(key[3] == name for key in lines)]
    drawn = there[: len(names) or ROWS]
    if not there:
        raise canvas.NoFigure("no run has metrics.parquet with a diagnostic beside its rows")
    look = looks(found)
    every = [*dict.fromkeys(c.env for c in found if any(key[0] == c.env for key in lines))]
    envs = every[:ENVS]
    settings = [n for n in look if any(own[key[:3]].name == n for key in lines)]
    handles = legend_of(found, look, settings)
    titles = [title_of(env, found) for env in envs]
    figure, axes = canvas.grid([""] * len(drawn), titles, handles, sharey="row", height=1.15)
    for row, name in enumerate(drawn):
        for column, env in enumerate(envs):
            axis = axes[row, column]
            for key, (steps, seeds) in lines.items():
                if key[0] != env or key[3] != name:
                    continue
                setting = look[own[key[:3]].name]
                mean = _mean(seeds)
                axis.plot(steps, mean, markevery=max(len(steps) // 5, 1), **setting.line())
                if seeds.shape[1] > 1 and len(settings) <= 8:
                    low, high = np.fmin.reduce(seeds, 1), np.fmax.reduce(seeds, 1)
                    axis.fill_between(
                        steps, low, high, color=setting.colour, alpha=0.12, linewidth=0
                    )
            if not axis.lines:
                canvas.blank(axis)
                continue
            canvas.label(axis, x="agent steps of one seed", y=METRICS.get(name, name))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
    canvas.inner([*axes.ravel()])
    said = []
    if lost := there[len(drawn) :]:
        said.append(f"diagnostics that are not drawn, for want of room: {few(lost)}")
    if lost := every[len(envs) :]:
        said.append(f"environments that are not drawn: {few(lost)}")
    canvas.remark(figure, "; ".join(said))
    return canvas.dress(figure)


def _mean(seeds: np.ndarray) -> np.ndarray:
    """Mean of the finite values of each row of [T, S]; NaN where there is none."""
    there = np.isfinite(seeds)
    total = np.where(there, seeds, 0.0).sum(1)
    return np.divide(total, there.sum(1), out=np.full(len(seeds), np.nan), where=there.any(1))


def read(
    rows: pa.Table, names: Sequence[str]
) -> Mapping[tuple[str, str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Metrics of all runs of some rows.

    Args:    rows, from `curves.load_rows`; names of metrics.
    Returns: {(env, preset, config_hash, name): (steps [T] int64, means over members [T, S])}; NaN
             where a seed has no finite value. Runs without metrics, or with a damaged file, have
             none.
    """
    keys = ["env", "preset", "config_hash", "run"]
    runs = rows.group_by(keys, use_threads=False).aggregate([]).select(keys).to_pylist()
    tables: dict[tuple[str, str, str], list[pa.Table]] = {}
    for run in runs:
        file = Path(run["run"]).parent / "metrics.parquet"
        if not file.is_file():
            continue
        try:
            table = results.read(file, results.METRICS)
        except RowsError:
            continue
        kept = pc.is_in(table["name"], value_set=pa.array([*names], pa.string()))  # pyright: ignore
        table = table.filter(kept).replace_schema_metadata()
        key = run["env"], run["preset"], run["config_hash"]
        finite = pc.is_finite(table["value"])  # pyright: ignore
        tables.setdefault(key, []).append(table.filter(finite))
    out = {}
    for key, own in tables.items():
        whole = pa.concat_tables(own).group_by(["name", "seed", "step"], use_threads=False)
        means = whole.aggregate([("value", "mean")])
        for name in names:
            mine = means.filter(pc.field("name") == name)
            if mine.num_rows:
                out[*key, name] = _by_seed(mine)
    return out


def _by_seed(mine: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and values [T, S] of rows with a seed, a step and a mean value."""
    steps, at = np.unique(mine["step"].to_numpy(), return_inverse=True)
    seeds, which = np.unique(mine["seed"].to_numpy(), return_inverse=True)
    values = np.full((len(steps), len(seeds)), np.nan)
    values[at, which] = mine["value_mean"].to_numpy()
    return steps, values
