"""Forks: which options may differ between a run and its fork, and what else has to hold.

`cerl fork` makes a run that goes on from a checkpoint of another one. An option may change if the
state of a run does not depend on it, or if `cerl/fork/` knows how to change that state.
`docs/forks.md` says for each option what happens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cerl.config import preset
from cerl.config.agents import SacConfig
from cerl.config.encoders import AttentionOptions
from cerl.config.errors import ConfigError
from cerl.config.load import settled, validated
from cerl.config.options import Config, OriginConfig

# Options, or groups of options, that may differ between a run and its fork.
FORKABLE = (
    *("preset", "device", "threads", "precision", "compile", "out", "diverged", "env.threads"),
    *("agent.double", "agent.loss", "agent.huber_delta", "agent.gradient_scale"),
    *("agent.mico_beta", "agent.target_critics", "agent.actor_value", "agent.backup_entropy"),
    *("agent.target_entropy", "agent.spread_temperature", "agent.actor_lr"),
    *("agent.temperature_lr", "agent.policy_every", "encoder.cache_refresh"),
    *("ensemble.members", "ensemble.duty", "ensemble.active_probability", "ensemble.switch"),
    *("ensemble.frozen", "loss", "optim.lr", "optim.clip_norm", "optim.eps", "optim.beta1"),
    *("optim.beta2", "optim.decay", "replay.capacity", "replay.batch", "replay.placement"),
    *("replay.candidates", "replay.fixed", "replay.sampler.beta", "schedule.steps"),
    *("schedule.target_every", "schedule.target_rate", "explore", "eval", "log"),
)
WORDS = (
    "ensemble.members, duty, active_probability, switch or frozen, loss.*, replay.capacity, fixed, "
    "batch, placement or candidates, optim.* but its kind, explore.*, schedule.steps, eval.*, log.*"
)


def forkable(key: str) -> bool:
    """Whether an option, given by its dotted key, may differ between a run and its fork."""
    return any(key == name or key.startswith(f"{name}.") for name in FORKABLE)


def unforkable(keys: Sequence[str]) -> str:
    """The error message for options that cannot differ between a run and its fork."""
    return (
        f"fork: {', '.join(keys)} cannot change, since the networks, the episodes or the counters "
        f"of a run depend on it; expected options such as {WORDS} (docs/forks.md has all). To "
        "train with other options from the beginning: cerl train"
    )


def chosen(parent: Config, members: int | None, choice: Sequence[int] | None) -> tuple[int, ...]:
    """For each member of a fork, the member of the parent that it begins as.

    Args:   members, of the fork, None: not given; choice, members of the parent, None: the first
            ones, or copies of the only one.
    Raises: ConfigError if the parent does not have these members, or both numbers disagree.
    """
    there = parent.ensemble.members
    if choice is None:
        count = there if members is None else members
        if count > there > 1:
            raise ConfigError(
                f"ensemble.members: the run has {there} members, so a fork has at most as many; "
                f"expected 1 to {there}, got {count} (--members 0 0 1 1 makes copies)"
            )
        return (0,) * count if there == 1 else tuple(range(count))
    if not choice or members not in (None, len(choice)):
        raise ConfigError(
            f"fork --members: expected {members or 'at least 1'} members, as ensemble.members "
            f"says, got {len(choice)}"
        )
    if wrong := [member for member in choice if not 0 <= member < there]:
        raise ConfigError(f"fork --members: expected 0 to {there - 1}, got {wrong[0]}")
    return tuple(choice)


def forked(
    parent: Config,
    changes: Mapping[str, Any],
    *,
    origin: OriginConfig,
    members: Sequence[int] | None = None,
) -> tuple[Config, tuple[int, ...], list[str]]:
    """The Config of a fork.

    Args:    parent, the config of the run; changes, new values of options by dotted key; origin of
             the fork, without members; members, those of the parent that stay, None: as many as
             ensemble.members says.
    Returns: the Config; for each of its members the one of the parent that it begins as; a sentence
             for each option that has no effect in the fork and therefore returns to its default.
    Raises:  ConfigError if an option cannot change, or the options do not go together.
    """
    if wrong := [key for key in changes if not forkable(key)]:
        raise ConfigError(unforkable(wrong))
    asked = changes.get("ensemble.members")
    picked = chosen(parent, asked, members)
    there = parent.ensemble.members
    usual = (0,) * len(picked) if there == 1 else tuple(range(len(picked)))
    made = origin.model_dump() | {"members": () if picked == usual else picked}
    top = {**changes, "ensemble.members": len(picked)}
    top |= {f"origin.{key}": value for key, value in made.items()}
    where = f"fork of {origin.run}"
    tree, sentences = settled(parent.model_dump(), preset.nested(top), name=where)
    config = validated(tree, where=where)
    if problems := [*_state_of(parent, config), *_equal(config, picked)]:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config, picked, sentences


def _state_of(parent: Config, config: Config) -> Iterator[str]:
    """One sentence for each change that the state of the run cannot follow."""
    steps, at = config.schedule.steps, config.origin.forked_at
    if steps <= at:
        yield (
            f"schedule.steps: the fork begins at agent step {at:,}; expected more, got {steps:,}"
        )
    remembers = isinstance(config.encoder, AttentionOptions)
    if remembers and parent.rows_looked_back_on != config.rows_looked_back_on:
        yield (
            f"loss.n_step: with encoder.cache 0 acting remembers the rows of a window, which has "
            f"n more; expected {parent.loss.n_step}, got {config.loss.n_step}"
        )
    if config.replay.fixed and config.encoder.updates_between_refreshes:
        yield (
            "encoder.cache_refresh: a refresh reads the newest rows, which replay.fixed does not "
            f"store; expected 0, got {config.encoder.updates_between_refreshes}"
        )
    if config.replay.fixed and not parent.log.save_replay:
        yield (
            "replay.fixed: the run has not saved its rows (log.save_replay false), so there is "
            "nothing to learn from; expected false"
        )


def _equal(config: Config, picked: Sequence[int]) -> Iterator[str]:
    """Whether copies of a member would stay equal: they have the same parameters, so the same
    batches change them alike. SAC's members draw noise of their own."""
    learners = [m for place, m in enumerate(picked) if place not in config.ensemble.frozen]
    loss, alike = config.loss, len(set(learners)) < len(learners)
    same = loss.batches == "shared" and loss.mask_probability == 1
    if alike and same and not isinstance(config.agent, SacConfig):
        yield (
            "loss.batches: copies of a member that learn from the same batches stay equal for "
            "ever; expected ensemble.frozen to name all but one of them, other loss.batches, or "
            "loss.mask_probability below 1"
        )


def refuse_unmade(config: Config) -> None:
    """Raises: ConfigError if a config is that of a fork, whose first checkpoint is not there."""
    origin = config.origin
    if origin.forked_at:
        raise ConfigError(
            f"origin.forked_at: this is the config of a fork of {origin.run} at agent step "
            f"{origin.forked_at:,}, which begins with a checkpoint of that run; make it with "
            f"`cerl fork RUN --at {origin.forked_at}`"
        )
