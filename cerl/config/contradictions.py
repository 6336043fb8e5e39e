"""Checks a whole config for options of different sections that contradict each other."""

import math
from collections.abc import Iterator

from cerl.config.agents import SacConfig, ValueOptions
from cerl.config.effects import idle
from cerl.config.encoders import (
    MOST_ROWS,
    FramesConfig,
    GruConfig,
    SequenceOptions,
)
from cerl.config.options import Config
from cerl.config.own import is_own
from cerl.config.samplers import OwnSamplerConfig, PrioritisedConfig

# Largest accepted probability that no candidate for a slot of a batch is a row of the member that
# the batch belongs to (loss.batches own and disjoint). Such a slot is lost: its weight is 0.
MISS = 2e-6
# The same, for candidates that have to be the first row of an episode (sampling episode_start).
START_MISS = 0.05
MOST_PRIORITIES = 2**24  # rows of a seed, whose priorities add up in 64 bits (`cerl/sampler.py`)
GRU_WIDEST = 256  # most units that the CUDA kernel takes (`kernels/gru_triton.py`)


def contradictions(config: Config) -> Iterator[str]:
    """One sentence for each conflict between sections. It starts with the key to change."""
    yield from _agent_and_env(config)
    yield from _agent_and_rest(config)
    yield from _net_and_env(config)
    yield from _shared_layers(config)
    yield from _roles(config)
    yield from _horizons(config)
    yield from _batches(config)
    yield from _owned_rows(config)
    yield from _sampler(config)
    yield from _capacity(config)
    yield from _length_of_run(config)
    yield from _kept(config)
    yield from _at_rest(config)
    if isinstance(config.encoder, SequenceOptions):
        yield from _windows(config, config.encoder)
        yield from _states(config, config.encoder)
        yield from _starts(config, config.encoder)
    yield from _without_effect(config)


def _agent_and_env(config: Config) -> Iterator[str]:
    agent, env, family = config.agent.name, config.env, config.env.family
    kinds, takes = ("discrete", "continuous"), env.actions_of_task
    chooses, suited = kinds[agent == "sac"], ("dqn or quantile", "sac")[takes == "continuous"]
    if takes in ("either", chooses):
        return
    taker, way = family, f"expected {suited}"
    if env.actions == "either":
        taker = env.title
        way += f" (for example a preset {env.examples[takes]}), or another env.name"
    elif agent == "sac":
        way += ", or an environment of family mujoco, dmc, point_mass or gym"
    yield f"agent.name: {agent} chooses {chooses} actions, but {taker} takes {takes} ones; {way}"


def _agent_and_rest(config: Config) -> Iterator[str]:
    """Demands of an agent on other sections."""
    if isinstance(config.agent, SacConfig):
        yield from _sac_and_rest(config, config.agent)
        return
    name = config.agent.name
    if modes := [policy for policy in config.eval.policies if policy.endswith("_mode")]:
        yield (
            f"eval.policies: {' and '.join(modes)}: only policies of agent sac have a mode; "
            f"expected individual, vote, mean or random with agent {name}"
        )
    if config.net.init == "orthogonal":
        yield (
            "net.init: orthogonal works with agent sac only; expected fan_in, xavier or variance "
            f"with agent {name}"
        )
    yield from _mico(config, config.agent)


def _sac_and_rest(config: Config, agent: SacConfig) -> Iterator[str]:
    ensemble, batches = config.ensemble, config.loss.batches
    if ensemble.shared_layers or ensemble.fork != "final":
        yield (
            "ensemble.shared_layers, ensemble.fork: members of agent sac share no layers and heads "
            f"fork at the output; expected 0 and final, got {ensemble.shared_layers} and "
            f"{ensemble.fork}"
        )
    if agent.spread_temperature and (ensemble.members == 1 or batches != "shared"):
        yield (
            "agent.spread_temperature: weighs rows by how much members disagree about them; "
            f"expected 2 or more members and shared batches, got {ensemble.members} and {batches}"
        )
    if "vote" in config.eval.policies:
        yield "eval.policies: continuous actions have no vote; expected mean with agent sac"


def _mico(config: Config, agent: ValueOptions) -> Iterator[str]:
    if not agent.mico_weight:
        return
    if not isinstance(config.encoder, FramesConfig):
        yield (
            "agent.mico_weight: the MICo loss needs features of single observations (encoder "
            f"frames); expected 0 with encoder {config.encoder.name}, got {agent.mico_weight:g}"
        )
    elif not config.net.channels:
        yield (
            "agent.mico_weight: the MICo distance compares outputs of the convolutions, and "
            "net.channels is empty; set mico_weight 0 or a network with convolutions"
        )


def _net_and_env(config: Config) -> Iterator[str]:
    env, channels = config.env, list(config.net.channels)
    if env.shows == "images" and not channels:
        yield (
            "net.channels: env.pixels shows images, which need convolutions; got none. For example "
            "--net.channels 32 32 32 32 --net.kernels 3 3 3 3 --net.strides 2 1 1 1 --net.scale 255"
        )
    if env.shows == "numbers" and channels:
        drawn = "pixels" in type(env).model_fields
        wish = "set env.pixels (with env.backend dm_control) or " if drawn else ""
        yield (
            f"net.channels: observations of {env.family} are vectors, not images; {wish}leave out "
            f"net.channels, got {channels}"
        )


def _shared_layers(config: Config) -> Iterator[str]:
    ensemble, net = config.ensemble, config.net
    sequence = isinstance(config.encoder, SequenceOptions)
    below = (1 if sequence else len(net.channels)) + len(net.hidden)
    first = "the sequence network" if sequence else f"{len(net.channels)} convolutions"
    layers = f"{first} and {len(net.hidden)} hidden layers"
    if not ensemble.several_heads and ensemble.shared_layers > below:
        yield (
            f"ensemble.shared_layers: expected at most {below} ({layers}; with a shared output "
            f"layer all members would be the same), got {ensemble.shared_layers}"
        )
    if ensemble.several_heads and ensemble.shared_layers > max(below - 1, 0):
        yield (
            f"ensemble.shared_layers: expected at most {max(below - 1, 0)} with heads "
            f"{ensemble.heads} ({layers}; each member needs a layer of its own below its heads, "
            "since with all features shared the extra heads have no effect on a member's own "
            f"head), got {ensemble.shared_layers}"
        )
    if ensemble.fork == "both" and ensemble.shared_layers > 0:
        yield (
            "ensemble.shared_layers: fork both, which gives every head a last hidden layer of its "
            f"own, works only without shared layers; expected 0, got {ensemble.shared_layers}"
        )
    if ensemble.fork == "both" and not net.hidden:
        yield "ensemble.fork: both needs a hidden layer, but net.hidden is empty; use final"


def _roles(config: Config) -> Iterator[str]:
    """Which member acts (`duty`), and which heads suit that."""
    ensemble = config.ensemble
    if ensemble.duty == "tandem" and ensemble.members != 2:
        yield (
            "ensemble.members: a tandem is an active and a passive member; "
            f"expected 2 with duty tandem, got {ensemble.members}"
        )
    if ensemble.duty == "tandem" and ensemble.heads != "own":
        yield f"ensemble.heads: expected own with duty tandem, got {ensemble.heads}"
    if ensemble.heads == "single_actor" and ensemble.duty != "first":
        yield (
            "ensemble.duty: with heads single_actor all targets use the actions of member 0, so "
            f"only member 0 may act; expected first, got {ensemble.duty}"
        )


def _horizons(config: Config) -> Iterator[str]:
    ensemble, gamma = config.ensemble, config.loss.gamma
    if not ensemble.several_horizons:
        return
    if ensemble.members > 1 and ensemble.shared_layers > 0:
        yield (
            f"ensemble.shared_layers: {ensemble.heads} needs members 1 or no shared layers; "
            f"expected 0, got {ensemble.shared_layers} with {ensemble.members} members"
        )
    if gamma >= 1:
        yield (
            f"loss.gamma: {ensemble.heads} needs a finite longest horizon 1 / (1 - gamma); "
            f"expected below 1, got {gamma}"
        )
    elif ensemble.horizons * (1 - gamma) > 1 + 1e-9:
        yield (
            f"ensemble.horizons: the shortest of {ensemble.horizons} horizons would be below one "
            f"agent step with gamma {gamma:g}; expected at most "
            f"{math.floor(1 / (1 - gamma) + 1e-9)}"
        )


def _batches(config: Config) -> Iterator[str]:
    heads, loss = config.ensemble.heads, config.loss
    if loss.batches != "shared" and heads != "own":
        yield (
            f"loss.batches: with heads {heads} all members have to learn from the same batch; "
            f"expected shared, got {loss.batches}"
        )
    if loss.mask_probability < 1 and heads != "own":
        yield (
            "loss.mask_probability: bootstrap masks are defined for heads own; "
            f"expected 1 with heads {heads}, got {loss.mask_probability:g}"
        )


def _owned_rows(config: Config) -> Iterator[str]:
    """Whether enough candidates are drawn to find rows of the member that a batch belongs to."""
    ensemble, loss = config.ensemble, config.loss
    if loss.batches not in ("own", "disjoint") or ensemble.members == 1:
        return
    share = smallest_share(config)
    if share <= 0:
        yield (
            "loss.batches: with own batches every member has to act, but with duty "
            f"{ensemble.duty} (active_probability {ensemble.active_probability:g}) one of them "
            "never does; expected shared, independent or disjoint"
        )
    elif (miss := (1 - share) ** config.replay.candidates) > MISS:
        needed = math.ceil(math.log(MISS) / math.log1p(-share))
        yield (
            f"replay.candidates: a member owns {share:.3g} of the rows, so none of "
            f"{config.replay.candidates} candidates is its own with probability {miss:.2g}; "
            f"expected a probability of at most {MISS:g}, i.e. at least {needed} candidates "
            "(memory and time grow with them)"
        )


def _sampler(config: Config) -> Iterator[str]:
    """What prioritised sampling cannot do: `replay.candidates` is only known to be enough where
    rows are drawn uniformly, and rows at which no window begins never get a priority of their own.
    """
    sampler, batches = config.replay.sampler, config.loss.batches
    if isinstance(sampler, OwnSamplerConfig) and not is_own(sampler.by):
        yield (
            "replay.sampler.by: expected MODULE:NAME, the class of your sampler, e.g. "
            f"my_module:MySampler, got {sampler.by!r}"
        )
    if not isinstance(sampler, PrioritisedConfig):
        return
    if batches in ("own", "disjoint"):
        yield (
            f"replay.sampler.name: prioritised draws rows whoever owns them; expected uniform with "
            f"loss.batches {batches}, or shared or independent batches"
        )
    if isinstance(config.encoder, SequenceOptions) and config.encoder.from_episode_start:
        yield (
            "replay.sampler.name: prioritised draws rows, not episodes; expected uniform with "
            "encoder.sampling episode_start, or sampling uniform"
        )
    if config.replay.capacity > MOST_PRIORITIES:
        yield (
            f"replay.capacity: expected at most {MOST_PRIORITIES:,} rows with sampler prioritised, "
            f"got {config.replay.capacity:,}"
        )


def smallest_share(config: Config) -> float:
    """Expected share of rows, in [0, 1], that belong to the member with the fewest rows."""
    ensemble = config.ensemble
    if config.loss.batches == "disjoint" or ensemble.duty == "uniform":
        return 1 / ensemble.members
    if ensemble.duty == "first":
        return 1.0 if ensemble.members == 1 else 0.0
    return min(ensemble.active_probability, 1 - ensemble.active_probability)


def _capacity(config: Config) -> Iterator[str]:
    """Whether replay is large enough, and full enough before the first update."""
    replay, envs, window = config.replay, config.env.envs, config.rows_of_window.total
    # A fork begins with rows, so it does not have to collect them first.
    if replay.capacity < replay.start and config.origin.forked_at < replay.start:
        yield (
            f"replay.capacity: expected at least replay.start ({replay.start}), the steps before "
            f"the first update, got {replay.capacity}"
        )
    if replay.capacity < envs * (window + 1):
        yield (
            f"replay.capacity: expected at least {envs * (window + 1)} rows, a window and one more "
            f"row ({window + 1}) for each of {envs} environments, got {replay.capacity}"
        )
    sequence = isinstance(config.encoder, SequenceOptions)
    least = window + 1 if sequence else config.loss.n_step + 1
    if replay.start < envs * least:
        what = f"{least} (a window and a row)" if sequence else "loss.n_step + 1"
        yield (
            f"replay.start: expected at least {envs * least}, i.e. {what} for each of {envs} "
            f"environments, got {replay.start}"
        )


def _length_of_run(config: Config) -> Iterator[str]:
    if config.explore.end is None and not config.env.longest:
        yield (
            "explore.end: none means 1 / agent steps of the longest episode, but the options of "
            f"family {config.env.family} set no limit; expected a number from 0 to 1, or an "
            "env.time_limit"
        )
    if config.schedule.steps < config.replay.start:
        yield (
            f"schedule.steps: the run would end before its first update; expected at least "
            f"replay.start ({config.replay.start}), got {config.schedule.steps}"
        )


def _kept(config: Config) -> Iterator[str]:
    """Whether the run reaches the agent steps whose checkpoints are to be kept."""
    steps = config.schedule.steps
    wrong = [step for step in config.log.keep if not 1 <= step <= steps]
    if wrong:
        yield (
            f"log.keep: expected agent steps from 1 to schedule.steps ({steps}), got "
            f"{' '.join(map(str, wrong))}"
        )
    if config.log.keep_every > steps:
        yield (
            f"log.keep_every: expected at most schedule.steps ({steps}), got "
            f"{config.log.keep_every}"
        )


def _at_rest(config: Config) -> Iterator[str]:
    """Members that do not learn, and rows that do not change."""
    ensemble, origin = config.ensemble, config.origin
    if wrong := [k for k in ensemble.frozen if not 0 <= k < ensemble.members]:
        yield f"ensemble.frozen: expected members 0 to {ensemble.members - 1}, got {wrong[0]}"
    elif len(set(ensemble.frozen)) < len(ensemble.frozen):
        yield f"ensemble.frozen: expected different members, got {list(ensemble.frozen)}"
    elif len(ensemble.frozen) == ensemble.members:
        yield "ensemble.frozen: expected at least one member that learns, got all of them"
    if ensemble.frozen and ensemble.shared_layers:
        yield (
            "ensemble.frozen: a member that shares layers changes with the others; expected none "
            f"with shared_layers {ensemble.shared_layers}, got {list(ensemble.frozen)}"
        )
    if config.replay.fixed and not origin.forked_at:
        yield (
            "replay.fixed: only a fork has rows when it begins (cerl fork RUN --at STEP); expected "
            "false"
        )


def _windows(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """Demands of windows of rows on other options."""
    longest = config.env.longest
    if not encoder.learnt and not longest:
        yield (
            f"encoder.learnt: 0 means the longest episode of the environment, but the options of "
            f"family {config.env.family} set no limit; expected a number of rows, or an "
            "env.time_limit"
        )
    elif not encoder.learnt and longest > MOST_ROWS:
        yield (
            f"encoder.learnt: 0 means the longest episode of the environment, {longest} agent "
            f"steps; more than {MOST_ROWS} learnt rows have to be asked for: expected a number of "
            "rows"
        )
    if config.loss.batches in ("own", "disjoint") and config.loss.batches_probability < 1:
        yield (
            "loss.batches_probability: a sequence network cannot use own or disjoint batches in "
            "some updates and a shared one in others; expected 1, got "
            f"{config.loss.batches_probability:g}"
        )


def _states(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """Demands of networks that keep a memory of earlier rows on other options."""
    ensemble, batches = config.ensemble, config.loss.batches
    if config.replay.placement == "host" and encoder.updates_between_refreshes:
        yield (
            "encoder.cache_refresh: every refresh would have to copy rows from host memory; "
            f"expected 0 with replay.placement host, got {encoder.updates_between_refreshes}"
        )
    if not isinstance(encoder, GruConfig):
        return
    if encoder.width > GRU_WIDEST and config.device != "cpu":
        yield (
            f"encoder.width: on a GPU encoder gru has at most {GRU_WIDEST} features; "
            f"expected at most that (or device cpu), got {encoder.width}"
        )
    if encoder.stored_state and isinstance(config.agent, SacConfig):
        yield (
            "encoder.stored_state: recurrent states are stored with agents dqn and quantile only; "
            "expected false with agent sac"
        )
    alone = ensemble.members == 1 or ensemble.shared_layers > 0 or batches == "own"
    if encoder.stored_state and not (alone and ensemble.switch == "episode"):
        yield (
            "encoder.stored_state: a stored state is of use only to the member that acted; "
            "expected false, or loss.batches own and ensemble.switch episode, got "
            f"{batches} and {ensemble.switch} with {ensemble.members} members"
        )


def _starts(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """Demands of sampling episode_start: few rows are the first of an episode, so many candidates
    have to be drawn, and rows of an episode beyond the first T are never learnt."""
    longest, replay = config.env.longest, config.replay
    if not encoder.from_episode_start or not longest:
        return
    if 0 < encoder.learnt < longest:
        yield (
            f"encoder.learnt: with sampling episode_start only the first rows of an episode are "
            f"learnt, and episodes last up to {longest} agent steps; expected at least {longest} "
            f"(or 0: the longest episode), got {encoder.learnt}"
        )
    members = config.ensemble.members
    apart = config.loss.batches in ("own", "disjoint") and members > 1
    rare = (smallest_share(config) if apart else 1.0) / (longest + 1)
    if rare > 0 and (miss := (1 - rare) ** replay.candidates) > START_MISS:
        needed = math.ceil(math.log(START_MISS) / math.log1p(-rare))
        whose = f" of the member with the fewest rows (of {members})" if apart else ""
        yield (
            f"replay.candidates: one row in {1 / rare:.0f} starts an episode{whose}, so none of "
            f"{replay.candidates} candidates does with probability {miss:.2g}; expected a "
            f"probability of at most {START_MISS:g}, i.e. at least {needed} candidates"
        )


def _without_effect(config: Config) -> Iterator[str]:
    """Options that this run does not read, but that are not at their defaults."""
    for effect, default, value in idle(config):
        yield (
            f"{effect.option}: has no effect unless {effect.unless}; "
            f"expected its default, {_plain(default)}, got {_plain(value)}"
        )


def _plain(value: object) -> str:
    """A value as one writes it in a YAML file."""
    if isinstance(value, tuple):
        return str([*value])
    return str(value).lower() if isinstance(value, bool) else str(value)
