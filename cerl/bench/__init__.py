"""Benchmarks: how long each part of the work takes on this machine, and whether it got slower.

Every benchmark is a function whose keyword arguments are the options of `cerl bench NAME`. All of
them measure with one stopwatch (`clock.py`) and print one kind of table (`table.py`).
"""

import importlib
import typing

# For each benchmark: its name on the command line, the module that holds its function (of the same
# name, with underscores), and what it measures.
BENCHMARKS = {
    "update": ("runs", "one update with sampling from a full replay, and its parts"),
    "train": ("runs", "a training step: act, environment, insert, update, and the whole loop"),
    "env": ("runs", "steps of the MinAtar games on the device"),
    "replay": ("runs", "inserting into and sampling from a full replay of frames"),
    "sac": ("sac", "one update of ensembles of SAC"),
    "sb3": ("sb3", "one agent on one CPU thread against Stable-Baselines3"),
    "sac-tiles": ("sac_tiles", "block sizes of SAC's perceptron kernels"),
    "attention": ("attention", "forgetting attention: forward, backward, a step of acting"),
    "attention-tiles": ("tiles", "block sizes of the attention kernels"),
    "acp": ("pruning", "what adaptive computation pruning saves and costs, with a plot"),
    "memory-update": ("sequences", "one update with each sequence network"),
    "memory-acting": ("sequences", "one step of acting, with caches and by recomputing the past"),
    "memory-length": ("sequences", "time and memory of an update by the length of windows"),
    "lm": ("lm", "pruning, memory and speed of forgetting attention in small language models"),
    "lm-recall": ("lm_recall", "multi-query associative recall with each kind of attention"),
    "checkpoint": ("checkpoint", "writing, saving and loading of checkpoints"),
    "sweep": ("sweep", "sweeps against the same runs by hand; status and report of many runs"),
    "report": ("report", "a report of a large study: reading, scores, figures, page"),
    "intervals": ("intervals", "how often 95% intervals of few seeds hold the true value"),
    "compare": ("compare", "a benchmark under two versions of cerl, run alternately"),
}


class Slower(Exception):
    """A measurement is larger than the one it is compared with by more than the tolerance."""


def run(name: str, arguments: list[str]) -> None:
    """Runs one of `BENCHMARKS`.

    Args:    name, a key of `BENCHMARKS`; arguments, the words after it on the command line.
    Raises:  Slower; SystemExit after --help, or where an option cannot be read.
    """
    import tyro

    from cerl.arguments import asks_help, filled
    from cerl.config.form import written_out

    module = importlib.import_module(f"cerl.bench.{BENCHMARKS[name][0]}")
    function = getattr(module, name.replace("-", "_"))
    prog = f"cerl bench {name}"
    if name != "compare":
        arguments = written_out(arguments, typing.get_type_hints(function))
        tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    elif asks_help(arguments):
        tyro.cli(module.Plan, args=["--help"], prog=prog)
    else:  # options that `compare` does not know belong to the benchmark that it runs
        function(*filled(module.Plan, arguments, prog=prog))
