"""What no section of a configuration can say by itself: options that contradict each other."""

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
from cerl.config.samplers import PrioritisedConfig

# At most this probability that a slot of an owner-restricted batch finds no row of its member.
MISS = 2e-6
# At most this probability that a slot of a batch finds no episode's start; it then has weight 0.
START_MISS = 0.05
MOST_PRIORITIES = 2**24  # rows of a seed, whose priorities add up in 64 bits (`cerl/sampler.py`)
GRU_WIDEST = 256  # units of the CUDA scan (`kernels/gru_triton.py`)


def contradictions(config: Config) -> Iterator[str]:
    """One sentence for each conflict between sections, led by the key to change."""
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
    if isinstance(config.encoder, SequenceOptions):
        yield from _windows(config, config.encoder)
        yield from _states(config, config.encoder)
        yield from _starts(config, config.encoder)
    yield from _without_effect(config)


def _agent_and_env(config: Config) -> Iterator[str]:
    agent, family = config.agent.name, config.env.family
    if agent == "sac" and config.env.actions == "discrete":
        yield (
            f"agent.name: sac chooses continuous actions, and those of {family} are discrete; "
            "expected dqn or quantile, or an environment of family mujoco, dmc, point_mass or gym"
        )
    if agent != "sac" and config.env.actions == "continuous":
        yield (
            f"agent.name: {agent} chooses discrete actions, and those of {family} are continuous; "
            "expected sac"
        )


def _agent_and_rest(config: Config) -> Iterator[str]:
    """What an agent asks of other sections."""
    if isinstance(config.agent, SacConfig):
        yield from _sac_and_rest(config, config.agent)
        return
    name = config.agent.name
    if modes := [policy for policy in config.eval.policies if policy.endswith("_mode")]:
        yield (
            f"eval.policies: {' and '.join(modes)}: only agent sac samples its actions; expected "
            f"individual, vote, mean or random with agent {name}"
        )
    if config.net.init == "orthogonal":
        yield (
            "net.init: orthogonal is known to agent sac; expected fan_in, xavier or variance with "
            f"agent {name}"
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
            "agent.mico_weight: the MICo distance is defined for convolutions of single "
            f"observations; expected 0 with encoder {config.encoder.name}, got "
            f"{agent.mico_weight:g}"
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
            "net.channels: env.pixels shows images, which want convolutions; got none. For example "
            "--net.channels 32 32 32 32 --net.kernels 3 3 3 3 --net.strides 2 1 1 1 --net.scale 255"
        )
    if env.shows == "numbers" and channels:
        drawn = "pixels" in type(env).model_fields
        wish = "set env.pixels (with env.backend dm_control) or " if drawn else ""
        yield (
            f"net.channels: {env.family} shows numbers, no images; {wish}leave out net.channels, "
            f"got {channels}"
        )


def _shared_layers(config: Config) -> Iterator[str]:
    ensemble, net = config.ensemble, config.net
    sequence = isinstance(config.encoder, SequenceOptions)
    below = (1 if sequence else len(net.channels)) + len(net.hidden)
    first = "the sequence network" if sequence else f"{len(net.channels)} convolutions"
    layers = f"{first} and {len(net.hidden)} hidden layers"
    if not ensemble.several_heads and ensemble.shared_layers > below:
        yield (
            f"ensemble.shared_layers: expected at most {below} ({layers}; a shared output layer "
            f"leaves nothing of a member's own), got {ensemble.shared_layers}"
        )
    if ensemble.several_heads and ensemble.shared_layers > max(below - 1, 0):
        yield (
            f"ensemble.shared_layers: expected at most {max(below - 1, 0)} with heads "
            f"{ensemble.heads} ({layers}; the layer below the heads must be a member's own, else "
            "members share all features and the extra heads teach them nothing), got "
            f"{ensemble.shared_layers}"
        )
    if ensemble.fork == "both" and ensemble.shared_layers > 0:
        yield (
            "ensemble.shared_layers: fork both gives every head a last hidden layer of its own and "
            f"is defined without layer sharing; expected 0, got {ensemble.shared_layers}"
        )
    if ensemble.fork == "both" and not net.hidden:
        yield "ensemble.fork: both forks the last hidden layer, and net.hidden is empty; use final"


def _roles(config: Config) -> Iterator[str]:
    """Who acts, and what the others are for."""
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
            "ensemble.duty: with heads single_actor all targets follow member 0, which alone acts; "
            f"expected first, got {ensemble.duty}"
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
            f"loss.gamma: {ensemble.heads} divides the longest horizon 1 / (1 - gamma); expected "
            f"below 1, got {gamma}"
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
            f"loss.batches: heads {heads} regress to other members' targets on one batch; "
            f"expected shared, got {loss.batches}"
        )
    if loss.mask_probability < 1 and heads != "own":
        yield (
            "loss.mask_probability: bootstrap masks are defined for heads own; "
            f"expected 1 with heads {heads}, got {loss.mask_probability:g}"
        )


def _owned_rows(config: Config) -> Iterator[str]:
    """Whether a batch of a member's own rows finds some."""
    ensemble, loss = config.ensemble, config.loss
    if loss.batches not in ("own", "disjoint") or ensemble.members == 1:
        return
    share = smallest_share(config)
    if share <= 0:
        yield (
            "loss.batches: with own batches every member has to act, and duty "
            f"{ensemble.duty} (active_probability {ensemble.active_probability:g}) leaves one "
            "without data"
        )
    elif (miss := (1 - share) ** config.replay.candidates) > MISS:
        needed = math.ceil(math.log(MISS) / math.log1p(-share))
        yield (
            f"replay.candidates: a member owns {share:.3g} of the rows, so "
            f"{config.replay.candidates} candidates find none of its own with probability "
            f"{miss:.2g}; expected at most {MISS:g}, that is at least {needed} candidates (memory "
            "and time grow with them)"
        )


def _sampler(config: Config) -> Iterator[str]:
    """What prioritised sampling cannot do: `replay.candidates` is only known to be enough where
    rows are drawn uniformly, and rows at which no window begins never get a priority of their own.
    """
    sampler, batches = config.replay.sampler, config.loss.batches
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
    """Expected share of the rows that the member with the least of them owns, in [0, 1]."""
    ensemble = config.ensemble
    if config.loss.batches == "disjoint" or ensemble.duty == "uniform":
        return 1 / ensemble.members
    if ensemble.duty == "first":
        return 1.0 if ensemble.members == 1 else 0.0
    return min(ensemble.active_probability, 1 - ensemble.active_probability)


def _capacity(config: Config) -> Iterator[str]:
    """Whether replay holds what the first update takes."""
    replay, envs, window = config.replay, config.env.envs, config.rows_of_window.total
    if replay.capacity < replay.start:
        yield (
            f"replay.capacity: expected at least replay.start ({replay.start}), the steps before "
            f"the first update, got {replay.capacity}"
        )
    if replay.capacity < envs * (window + 1):
        yield (
            f"replay.capacity: expected at least {envs * (window + 1)} rows, one window of "
            f"{window + 1} for each of {envs} environments, got {replay.capacity}"
        )
    sequence = isinstance(config.encoder, SequenceOptions)
    least = window + 1 if sequence else config.loss.n_step + 1
    if replay.start < envs * least:
        what = f"{least} (a window and a row)" if sequence else "loss.n_step + 1"
        yield (
            f"replay.start: expected at least {envs * least}, that is {what} steps of each "
            f"of {envs} environments, got {replay.start}"
        )


def _length_of_run(config: Config) -> Iterator[str]:
    if config.explore.end is None and not config.env.longest:
        yield (
            "explore.end: none means a random action in the longest episode, and env options of "
            f"family {config.env.family} name none; expected a number from 0 to 1, or an "
            "env.time_limit"
        )
    if config.schedule.steps < config.replay.start:
        yield (
            f"schedule.steps: the run would end before its first update; expected at least "
            f"replay.start ({config.replay.start}), got {config.schedule.steps}"
        )


def _windows(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """What windows of rows ask for."""
    longest = config.env.longest
    if not encoder.learnt and not longest:
        yield (
            f"encoder.learnt: 0 means the longest episode of the environment, and env options of "
            f"family {config.env.family} name none; expected a number of rows, or an env.time_limit"
        )
    elif not encoder.learnt and longest > MOST_ROWS:
        yield (
            f"encoder.learnt: 0 means the longest episode of the environment, {longest} agent "
            f"steps; windows of more than {MOST_ROWS} rows are learnt only where they are asked "
            "for: expected a number of rows"
        )
    if config.loss.batches in ("own", "disjoint") and config.loss.batches_probability < 1:
        yield (
            "loss.batches_probability: windows hold rows of several members, of which own and "
            "disjoint batches take a member's; expected 1 with a sequence network, got "
            f"{config.loss.batches_probability:g}"
        )


def _states(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """What networks ask for that remember earlier rows."""
    ensemble, batches = config.ensemble, config.loss.batches
    if config.replay.placement == "host" and encoder.updates_between_refreshes:
        yield (
            "encoder.cache_refresh: rows in host memory would be copied at every refresh; expected "
            f"0 with replay.placement host, got {encoder.updates_between_refreshes}"
        )
    if not isinstance(encoder, GruConfig):
        return
    if encoder.width > GRU_WIDEST and config.device != "cpu":
        yield (
            f"encoder.width: a recurrent unit of the GPU has at most {GRU_WIDEST} features; "
            f"expected these or fewer with encoder gru (or device cpu), got {encoder.width}"
        )
    if encoder.stored_state and isinstance(config.agent, SacConfig):
        yield (
            "encoder.stored_state: states of recurrent units are stored with agents dqn and "
            "quantile; expected false with agent sac"
        )
    alone = ensemble.members == 1 or ensemble.shared_layers > 0 or batches == "own"
    if encoder.stored_state and not (alone and ensemble.switch == "episode"):
        yield (
            "encoder.stored_state: a state is one member's, that of the row; expected false, or "
            "loss.batches own and ensemble.switch episode, got "
            f"{batches} and {ensemble.switch} with {ensemble.members} members"
        )


def _starts(config: Config, encoder: SequenceOptions) -> Iterator[str]:
    """Windows that begin with an episode are rare among rows, and learn nothing beyond their T."""
    longest, replay = config.env.longest, config.replay
    if not encoder.from_episode_start or not longest:
        return
    if 0 < encoder.learnt < longest:
        yield (
            f"encoder.learnt: windows that begin with an episode learn from its first rows only, "
            f"and one lasts up to {longest} agent steps; expected at least {longest} (or 0: "
            f"all) with sampling episode_start, got {encoder.learnt}"
        )
    members = config.ensemble.members
    apart = config.loss.batches in ("own", "disjoint") and members > 1
    rare = (smallest_share(config) if apart else 1.0) / (longest + 1)
    if rare > 0 and (miss := (1 - rare) ** replay.candidates) > START_MISS:
        needed = math.ceil(math.log(START_MISS) / math.log1p(-rare))
        whose = f" of the least of {members} members" if apart else ""
        yield (
            f"replay.candidates: one row in {1 / rare:.0f} begins an episode{whose}, so "
            f"{replay.candidates} candidates find none with probability {miss:.2g}; expected at "
            f"most {START_MISS:g}, that is at least {needed} candidates"
        )


def _without_effect(config: Config) -> Iterator[str]:
    for effect, default, value in idle(config):
        yield (
            f"{effect.option}: has no effect unless {effect.unless}; "
            f"expected its default, {_plain(default)}, got {_plain(value)}"
        )


def _plain(value: object) -> str:
    """A value as a file of options has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
