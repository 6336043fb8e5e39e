"""Benchmarks: what a machine takes for each part of the work, and whether it got slower.

Every benchmark is a function; its keyword arguments are the options of `cerl bench NAME`, and it
prints one table (`table.py`) of what one stopwatch (`clock.py`) measured.
"""

import importlib

# Name: the module of the function, what it measures.
BENCHMARKS = {
    "update": ("runs", "one update with sampling from a full replay, and its parts"),
    "train": ("runs", "a training step: act, environment, insert, update, and all in one loop"),
    "env": ("runs", "steps of the MinAtar games on the device"),
    "replay": ("runs", "inserting into and sampling from a full replay of frames"),
    "sac": ("sac", "one update of ensembles of SAC"),
    "sac-tiles": ("sac_tiles", "block sizes of SAC's perceptron kernels"),
    "attention": ("attention", "forgetting attention: forward, backward, a step of acting"),
    "attention-tiles": ("tiles", "block sizes of the attention kernels"),
    "acp": ("pruning", "what adaptive computation pruning saves and costs, with a plot"),
    "memory-update": ("sequences", "one update with each sequence network"),
    "memory-acting": ("sequences", "one step of acting, with caches and by reading anew"),
    "memory-length": ("sequences", "time and memory of an update as windows grow"),
    "checkpoint": ("checkpoint", "writing, saving and loading of checkpoints"),
    "compare": ("compare", "a benchmark under two versions of cerl, in turns"),
}


class Slower(Exception):
    """A benchmark took longer than what it is compared with, by more than the tolerance."""


def run(name: str, arguments: list[str]) -> None:
    """Runs one of `BENCHMARKS` with options of the command line.

    Raises: Slower; SystemExit after --help, or where an option cannot be read.
    """
    import tyro

    from cerl.arguments import asks_help, filled

    module = importlib.import_module(f"cerl.bench.{BENCHMARKS[name][0]}")
    function = getattr(module, name.replace("-", "_"))
    prog = f"cerl bench {name}"
    if name != "compare":
        tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    elif asks_help(arguments):
        tyro.cli(module.Plan, args=["--help"], prog=prog)
    else:  # what it does not know is handed to the benchmark that it runs
        function(*filled(module.Plan, arguments, prog=prog))
