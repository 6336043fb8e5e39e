"""Which options a run does not read because of the values of others, and how a run differs from
the defaults.

An option that means nothing to the chosen kind of agent or encoder does not exist there. The
options of `EFFECTS` exist, but some runs do not read them. Such runs must leave them at their
defaults, so that nobody believes that they have an effect. `differences` lists the options that
make a run differ from the defaults; two runs with the same differences train alike.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cerl.config.agents import DqnConfig, SacConfig, ValueOptions
from cerl.config.encoders import FoxConfig
from cerl.config.envs import DmcEnv, MinAtarEnv, PopgymEnv
from cerl.config.memory_tasks import TASKS
from cerl.config.model import Model, of_kind
from cerl.config.options import Config
from cerl.config.preset import UNIONS

# Queries and keys are pruned in blocks of this many or more (`cerl/kernels/attention/plan.py`).
BLOCK = 64
RAMPED = ("asterix", "seaquest", "space_invaders")  # MinAtar games that become harder with time


class Effect(NamedTuple):
    """The condition under which a run reads an option."""

    option: str  # its dotted key
    unless: str  # the condition in words, which follow "has no effect unless"
    read: Callable[[Config], bool]  # the condition


EFFECTS = (
    Effect(
        "ensemble.active_probability",
        "ensemble.duty is tandem",
        lambda c: c.ensemble.duty == "tandem",
    ),
    Effect(
        "ensemble.horizons",
        "ensemble.heads is multi_horizon",
        lambda c: c.ensemble.several_horizons,
    ),
    Effect(
        "ensemble.fork",
        "ensemble.heads gives a member several heads",
        lambda c: c.ensemble.several_heads,
    ),
    Effect(
        "agent.gradient_scale",
        "ensemble.shared_layers is above 0 or ensemble.heads gives a member several heads",
        lambda c: c.ensemble.shared_layers > 0 or c.ensemble.several_heads,
    ),
    Effect(
        "agent.mico_beta",
        "agent.mico_weight is above 0",
        lambda c: isinstance(c.agent, ValueOptions) and c.agent.mico_weight > 0,
    ),
    Effect(
        "agent.huber_delta",
        "agent.loss is huber (agent dqn) or mse_huber (agent sac)",
        lambda c: not isinstance(c.agent, DqnConfig | SacConfig) or c.agent.loss != "mse",
    ),
    *(
        Effect(
            f"encoder.{name}",
            "encoder.gate is not none",
            lambda c: not isinstance(c.encoder, FoxConfig) or c.encoder.gate != "none",
        )
        for name in ("gate_scales", "prune")
    ),
    Effect(
        "encoder.rule",
        "encoder.prune is below 0",
        lambda c: not isinstance(c.encoder, FoxConfig) or c.encoder.prune < 0,
    ),
    Effect(
        "net.padding",
        "net.channels names convolutions",
        lambda c: len(c.net.channels) > 0,
    ),
    Effect(
        "loss.batches_probability",
        "loss.batches is not shared",
        lambda c: c.loss.batches != "shared",
    ),
    Effect(
        "schedule.target_every",
        "schedule.target_rate is 1",
        lambda c: c.schedule.target_rate == 1,
    ),
    Effect(
        "eval.episodes",
        "eval.steps is 0 (episodes are counted) or eval.slots is 0 (as many as episodes)",
        lambda c: c.eval.steps == 0 or c.eval.slots == 0,
    ),
    Effect(
        "env.diverged",
        "env.backend is package",
        lambda c: not isinstance(c.env, PopgymEnv) or c.env.backend == "package",
    ),
    Effect(
        "env.threads",
        "env.backend is envpool",
        lambda c: not isinstance(c.env, DmcEnv) or c.env.backend == "envpool",
    ),
    *(
        Effect(
            option,
            "env.pixels is true",
            lambda c: not isinstance(c.env, DmcEnv) or c.env.pixels,
        )
        for option in ("env.size", "env.camera")
    ),
)


class Same(NamedTuple):
    """An option whose default (e.g. 0) stands for another number that the config determines."""

    option: str  # its dotted key
    meant: Callable[[Config], Any]  # the number


SAME = (
    Same("encoder.learnt", lambda c: c.env.longest),
    Same("encoder.key_heads", lambda c: of_kind(c.encoder, FoxConfig).heads),
    Same("encoder.cache", lambda c: c.rows_of_window.total),
    Same("eval.slots", lambda c: c.eval.episodes),
    Same("agent.actor_lr", lambda c: c.optim.lr),
    Same("agent.temperature_lr", lambda c: c.optim.lr),
    *(
        Same(f"env.{name}", lambda c, name=name: TASKS[c.env.name].options.get(name))
        for name in ("length", "decks", "k", "noise")
    ),
)


def section_of(config: Model, option: str) -> tuple[Any, str]:
    """The model that holds an option (None if there is no such option), and the option's name.

    Args: option, its dotted key.
    """
    *groups, name = option.split(".")
    section: Any = config
    for group in groups:
        section = getattr(section, group, None)
    if section is None or name not in type(section).model_fields:
        return None, name
    return section, name


def is_read(config: Config, option: str) -> bool:
    """Whether a run reads an option, given by its dotted key."""
    return all(effect.read(config) for effect in EFFECTS if effect.option == option)


def idle(config: Config) -> Iterator[tuple[Effect, Any, Any]]:
    """Options that this run does not read and that are not at their defaults.

    Yields: the entry of `EFFECTS`, the default and the value.
    """
    for effect in EFFECTS:
        section, name = section_of(config, effect.option)
        if section is None:
            continue
        default, value = type(section).model_fields[name].default, getattr(section, name)
        if value != default and not effect.read(config):
            yield effect, default, value


def _harmless(config: Config) -> Iterator[str]:
    """Options that this run does not read, but that may be set nevertheless, so that one command
    line fits several runs: the decay of an epsilon that is constant, the rising difficulty of games
    whose difficulty does not rise, and pruning where all rows that are seen are one block."""
    if config.explore.start == config.explore.end:
        yield from ("explore.hold", "explore.decay")
    if isinstance(config.env, MinAtarEnv) and config.env.name not in RAMPED:
        yield "env.ramping"
    if (
        isinstance(config.encoder, FoxConfig)
        and max(config.rows_of_window.total, config.rows_looked_back_on) <= BLOCK
    ):
        yield from ("encoder.prune", "encoder.rule")


def differences(config: Config) -> dict[str, Any]:
    """The options in which a run differs from the defaults: plain values by dotted key.

    The kinds of all unions at the top of a config, and the name of the task, are always included.
    An option is left out if it has its default, if its value means the same as the default, or if
    this run does not read it. So adding an option to cerl does not change the differences of runs
    that do not set it.
    """
    found: dict[str, Any] = {
        f"{section}.{union.key}": config.kinds[section]
        for section, union in UNIONS.items()
        if "." not in section or config.kinds[section] != union.default
    }
    found["env.name"] = config.env.name
    # `explore.end` may be None; `epsilon_schedule` has the number that this stands for.
    config = config.model_copy(update={"explore": config.epsilon_schedule})
    same = {one.option for one in SAME if _says_the_default(config, one)}
    unread = {effect.option for effect, _, _ in idle(config)} | set(_harmless(config)) | same
    found |= {key: value for key, value in _changed(config, "") if key not in unread}
    return found


def _says_the_default(config: Config, same: Same) -> bool:
    """Whether an option has the number that its default stands for."""
    section, name = section_of(config, same.option)
    return section is not None and getattr(section, name) == same.meant(config)


def _changed(section: Model, prefix: str) -> Iterator[tuple[str, Any]]:
    """The options of a section that do not have their default: dotted keys and plain values."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Model):
            yield from _changed(value, f"{prefix}{name}.")
        elif value != field.default:
            yield f"{prefix}{name}", plain[name]
