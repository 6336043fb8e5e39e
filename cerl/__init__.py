"""cerl: ensemble exploration with shared experience, whole populations on one GPU.

Dims, the only legend. Tensors keep this order: [S, N, C, B or E, T or W, J, rest].

    S  seeds, trained side by side in one process; they never touch each other
    N  ensemble members of a seed (size 1 on a parameter: shared by all members)
    C  critics of a member
    J  value heads of a member; head 0 is its own
    E  environments per seed
    B  batch
    T  learnt steps of a window
    W  rows of a window = context + T + n
    A  actions (their count, or the components of a continuous one)
    D  features
    H  attention heads

Words that are needed most; docs/glossary.md explains the others:

    row             what replay stores of one environment at one time
    real row        a row whose action was carried out; others hold an episode's last observation
    learnt row      a row of a window for which a loss is computed
    context row     a row of a window that the network reads before the learnt rows
    start           True at a row that is the first of its episode
    seed            one independent repetition of the experiment
    member on duty  the member that chooses the actions of an environment at present
    head            the last layers of a member that output values
    carry           the tensors in which acting remembers earlier rows
    refresh         to recompute the carry from the newest rows with the present parameters
    run             one training by one config, and the folder with its results
    cell            one preset on one environment, in a report

The interface from Python (docs/python.md), imported when it is first used:

    cerl.config.load(name, overrides)   the options of a preset or a YAML file, checked
    cerl.train(config, overrides)       trains a population; returns its run folder
    cerl.resume(run)                    goes on with a run
    cerl.load(run)                      the policy of a run: observations in, actions out
    cerl.envs.make(config.env, ...)     the environments of a config
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cerl import config as config
    from cerl import envs as envs
    from cerl.interface import load as load
    from cerl.interface import resume as resume
    from cerl.interface import train as train

__version__ = "0.2.0"
__all__ = ["config", "envs", "load", "resume", "train"]

_FUNCTIONS = ("load", "resume", "train")  # of cerl/interface.py; other names are modules


def __getattr__(name: str) -> Any:
    """A name of the interface. Raises: AttributeError for any other."""
    if name not in __all__:
        raise AttributeError(f"module 'cerl' has no attribute {name!r}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("cerl.interface"), name)
    return importlib.import_module(f"cerl.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
