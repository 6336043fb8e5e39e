"""What no single option can say: options of a configuration that contradict each other."""

import math
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cerl.config.options import Config


# At most this probability that a slot of an owner-restricted batch finds no row of its member.
MISS = 2e-6
# At most this probability that a slot of a batch finds no episode's start; it then has weight 0.
START_MISS = 0.05
# Learnt rows of a window that nobody asked for by number, at most.
LONGEST = 4096
GRU_WIDEST = 256  # units of the CUDA scan (`kernels/gru_triton.py`)


def contradictions(c: "Config") -> Iterator[str]:
    """What single keys cannot say: one sentence for each conflict, led by the key to change."""
    yield from _name_contradictions(c)
    yield from _run_contradictions(c)
    yield from _net_contradictions(c)
    yield from _ensemble_contradictions(c)
    yield from _batch_contradictions(c)
    yield from _agent_contradictions(c)
    yield from _image_contradictions(c)
    yield from _time_contradictions(c)
    if c.net.encoder != "frames":
        yield from _sequence_contradictions(c)


def _name_contradictions(c: "Config") -> Iterator[str]:
    for key, text in (("preset", c.preset), ("env.name", c.env.name), ("out", c.out)):
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
            yield f"{key}: expected no control characters and no broken ones, got {text!r}"
    if c.preset.startswith((".", "-")):
        yield f"preset: expected a name that begins with a letter or digit, got {c.preset!r}"
    if not c.out:
        yield "out: expected the name of a folder, got an empty one; `.` is the current one"


def _run_contradictions(c: "Config") -> Iterator[str]:
    if not c.seeds:
        yield "seeds: expected at least one seed, got none; e.g. --seeds 0 1 2"
    for seed in sorted({seed for seed in c.seeds if c.seeds.count(seed) > 1}):
        yield (
            f"seeds: {seed} is given {c.seeds.count(seed)} times; every seed trains on its own, "
            "so all must be different"
        )
    for seed in c.seeds:
        if not 0 <= seed < 2**63:
            yield f"seeds: expected whole numbers from 0 to 2**63 - 1, got {seed}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device):
        yield f"device: expected auto, cpu, cuda or cuda:NUMBER, got {c.device!r}"
    if not c.eval.policies:
        yield "eval.policies: expected at least one of individual, vote, mean, random; got none"
    if c.eval.share and c.eval.steps:
        yield (
            "eval.share: shares out a number of episodes, and eval.steps asks for a budget of "
            f"agent steps; expected false or eval.steps 0, got true and {c.eval.steps}"
        )
    most = ("eval.steps", c.eval.steps) if c.eval.steps else ("eval.episodes", c.eval.episodes)
    if c.eval.slots > most[1]:
        yield (
            "eval.slots: every environment plays at least one of the episodes; expected at most "
            f"{most[0]} ({most[1]}), got {c.eval.slots}"
        )
    if len(set(c.eval.policies)) < len(c.eval.policies):
        yield f"eval.policies: expected different policies, got {' '.join(c.eval.policies)}"


def _net_contradictions(c: "Config") -> Iterator[str]:
    net = c.net
    lengths = len(net.channels), len(net.kernels), len(net.strides)
    if len(set(lengths)) > 1:
        yield (
            "net.channels, net.kernels, net.strides: expected the same number of entries, one for "
            f"each convolution, got {lengths[0]}, {lengths[1]} and {lengths[2]}"
        )
    for name in ("channels", "kernels", "strides", "hidden"):
        if any(size < 1 for size in getattr(net, name)):
            yield f"net.{name}: expected sizes of at least 1, got {list(getattr(net, name))}"
    if c.loss.mico_weight > 0 and net.encoder != "frames":
        yield (
            "loss.mico_weight: the MICo distance is defined for convolutions of single "
            f"observations; expected 0 with net.encoder {net.encoder}, got {c.loss.mico_weight:g}"
        )
    elif c.loss.mico_weight > 0 and not net.channels:
        yield (
            "loss.mico_weight: the MICo distance compares outputs of the convolutions, and "
            "net.channels is empty; set mico_weight 0 or a network with convolutions"
        )


def _ensemble_contradictions(c: "Config") -> Iterator[str]:
    e, sequence = c.ensemble, c.net.encoder != "frames"
    below = (1 if sequence else len(c.net.channels)) + len(c.net.hidden)
    first = "the sequence network" if sequence else f"{len(c.net.channels)} convolutions"
    layers = f"{first} and {len(c.net.hidden)} hidden layers"
    if e.heads == "own" and e.shared_layers > below:
        yield (
            f"ensemble.shared_layers: expected at most {below} ({layers}; a shared output layer "
            f"leaves nothing of a member's own), got {e.shared_layers}"
        )
    if e.heads != "own" and e.shared_layers > max(below - 1, 0):
        yield (
            f"ensemble.shared_layers: expected at most {max(below - 1, 0)} with heads {e.heads} "
            f"({layers}; the layer below the heads must be a member's own, else members share all "
            f"features and the extra heads teach them nothing), got {e.shared_layers}"
        )
    if e.fork == "both" and e.shared_layers > 0:
        yield (
            "ensemble.shared_layers: fork both gives every head a last hidden layer of its own and "
            f"is defined without layer sharing; expected 0, got {e.shared_layers}"
        )
    if e.fork == "both" and not c.net.hidden:
        yield "ensemble.fork: both forks the last hidden layer, and net.hidden is empty; use final"
    if e.heads == "multi_horizon":
        yield from _horizon_contradictions(c)
    if e.duty == "tandem" and e.members != 2:
        yield (
            "ensemble.members: a tandem is an active and a passive member; "
            f"expected 2 with duty tandem, got {e.members}"
        )
    if e.duty == "tandem" and e.heads != "own":
        yield f"ensemble.heads: expected own with duty tandem, got {e.heads}"
    if e.heads == "single_actor" and e.duty != "first":
        yield (
            "ensemble.duty: with heads single_actor all targets follow member 0, which alone acts; "
            f"expected first, got {e.duty}"
        )


def _horizon_contradictions(c: "Config") -> Iterator[str]:
    e, gamma = c.ensemble, c.loss.gamma
    if e.members > 1 and e.shared_layers > 0:
        yield (
            "ensemble.shared_layers: multi_horizon needs members 1 or no shared layers; "
            f"expected 0, got {e.shared_layers} with {e.members} members"
        )
    if gamma >= 1:
        yield (
            "loss.gamma: multi_horizon divides the longest horizon 1 / (1 - gamma); "
            f"expected below 1, got {gamma}"
        )
    elif e.horizons * (1 - gamma) > 1 + 1e-9:
        yield (
            f"ensemble.horizons: the shortest of {e.horizons} horizons would be below one agent "
            f"step with gamma {gamma:g}; expected at most {math.floor(1 / (1 - gamma) + 1e-9)}"
        )


def _batch_contradictions(c: "Config") -> Iterator[str]:
    e, loss = c.ensemble, c.loss
    if loss.batches != "shared" and e.heads != "own":
        yield (
            f"loss.batches: heads {e.heads} regress to other members' targets on one batch; "
            f"expected shared, got {loss.batches}"
        )
    if loss.mask_probability < 1 and e.heads != "own":
        yield (
            "loss.mask_probability: bootstrap masks are defined for heads own; "
            f"expected 1 with heads {e.heads}, got {loss.mask_probability:g}"
        )
    if c.agent == "quantile" and loss.kind != "huber":
        yield f"loss.kind: quantile agents have only a Huber loss; expected huber, got {loss.kind}"
    share = smallest_share(c)
    if loss.batches not in ("own", "disjoint") or e.members == 1:
        return
    if share <= 0:
        yield (
            f"loss.batches: with own batches every member has to act, and duty {e.duty} "
            f"(active_probability {e.active_probability:g}) leaves one without data"
        )
    elif (miss := (1 - share) ** c.replay.candidates) > MISS:
        needed = math.ceil(math.log(MISS) / math.log1p(-share))
        yield (
            f"replay.candidates: a member owns {share:.3g} of the rows, so {c.replay.candidates} "
            f"candidates find none of its own with probability {miss:.2g}; expected at most "
            f"{MISS:g}, that is at least {needed} candidates (memory and time grow with them)"
        )


def _image_contradictions(c: "Config") -> Iterator[str]:
    family, channels = c.env.family, list(c.net.channels)
    drawn = getattr(c.env, "pixels", False)
    if drawn and not channels:
        yield (
            "net.channels: env.pixels shows images, which want convolutions; got none. For example "
            "--net.channels 32 32 32 32 --net.kernels 3 3 3 3 --net.strides 2 1 1 1 --net.scale 255"
        )
    if channels and not drawn and family in ("mujoco", "dmc"):
        wish = "set env.pixels (with env.backend dm_control) or " if family == "dmc" else ""
        yield (
            f"net.channels: {family} shows numbers, no images; {wish}leave out net.channels, "
            f"got {channels}"
        )


def _agent_contradictions(c: "Config") -> Iterator[str]:
    """Options that only some agents know, and what no environment of a family can be."""
    sac = c.agent == "sac"
    family = c.env.family
    if sac and family in ("catch", "minatar", "atari"):
        yield (
            f"agent: sac chooses continuous actions, and those of {family} are discrete; "
            "expected dqn or quantile, or an environment of family mujoco, dmc, point_mass or gym"
        )
    if not sac and family in ("mujoco", "dmc", "point_mass"):
        yield (
            f"agent: {c.agent} chooses discrete actions, and those of {family} are continuous; "
            "expected sac"
        )
    yield from _sac_contradictions(c) if sac else _discrete_contradictions(c)


def _discrete_contradictions(c: "Config") -> Iterator[str]:
    if modes := [name for name in c.eval.policies if name.endswith("_mode")]:
        yield (
            f"eval.policies: {' and '.join(modes)}: only agent sac samples its actions; expected "
            f"individual, vote, mean or random with agent {c.agent}"
        )
    if c.loss.kind == "mse_huber":
        yield f"loss.kind: mse_huber is known to agent sac; expected huber or mse with {c.agent}"
    if c.net.init == "orthogonal":
        yield (
            "net.init: orthogonal is known to agent sac; expected fan_in, xavier or variance with "
            f"agent {c.agent}"
        )
    if c.schedule.policy_every > 1:
        yield (
            f"schedule.policy_every: agent {c.agent} has no policy apart from its values; "
            f"expected 1, got {c.schedule.policy_every}"
        )


def _sac_contradictions(c: "Config") -> Iterator[str]:
    net, e, loss = c.net, c.ensemble, c.loss
    if e.shared_layers or e.fork != "final":
        yield (
            "ensemble.shared_layers, ensemble.fork: members of agent sac share no layers and heads "
            f"fork at the output; expected 0 and final, got {e.shared_layers} and {e.fork}"
        )
    if loss.kind == "huber":
        yield "loss.kind: expected mse or mse_huber with agent sac, got huber"
    if loss.mico_weight:
        yield f"loss.mico_weight: unknown to agent sac; expected 0, got {loss.mico_weight:g}"
    if loss.target_critics > net.critics:
        yield (
            f"loss.target_critics: expected at most net.critics ({net.critics}), "
            f"got {loss.target_critics}"
        )
    if loss.spread_temperature and (e.members == 1 or loss.batches != "shared"):
        yield (
            "loss.spread_temperature: weighs rows by how much members disagree about them; "
            f"expected 2 or more members and shared batches, got {e.members} and {loss.batches}"
        )
    if net.log_std_min >= net.log_std_max:
        yield (
            f"net.log_std_min: expected below net.log_std_max ({net.log_std_max:g}), "
            f"got {net.log_std_min:g}"
        )
    if "vote" in c.eval.policies:
        yield "eval.policies: continuous actions have no vote; expected mean with agent sac"


def ending(limit: int | None) -> int | None:
    """A time limit of a memory task. Raises: ValueError where there would be none."""
    if limit is not None and limit < 1:
        raise ValueError(
            "env.time_limit: episodes of memory tasks have to end; expected at least 1 agent step, "
            f"or none for the task's own limit, got {limit}"
        )
    return limit


def smallest_share(c: "Config") -> float:
    """Expected share of the rows that the member with the least of them owns, in [0, 1]."""
    e = c.ensemble
    if c.loss.batches == "disjoint" or e.duty == "uniform":
        return 1 / e.members
    if e.duty == "first":
        return 1.0 if e.members == 1 else 0.0
    return min(e.active_probability, 1 - e.active_probability)


def _time_contradictions(c: "Config") -> Iterator[str]:
    window = c.window
    if c.replay.capacity < c.replay.start:
        yield (
            f"replay.capacity: expected at least replay.start ({c.replay.start}), the steps before "
            f"the first update, got {c.replay.capacity}"
        )
    if c.replay.capacity < c.env.envs * (window + 1):
        yield (
            f"replay.capacity: expected at least {c.env.envs * (window + 1)} rows, one window of "
            f"{window + 1} for each of {c.env.envs} environments, got {c.replay.capacity}"
        )
    sequence = c.net.encoder != "frames"
    least = window + 1 if sequence else c.loss.n_step + 1
    if c.replay.start < c.env.envs * least:
        what = f"{least} (a window and a row)" if sequence else "loss.n_step + 1"
        yield (
            f"replay.start: expected at least {c.env.envs * least}, that is {what} steps of each "
            f"of {c.env.envs} environments, got {c.replay.start}"
        )
    if c.explore.end is None and not c.longest:
        yield (
            "explore.end: none means a random action in the longest episode, and env options of "
            f"family {c.env.family} name none; expected a number from 0 to 1, or an env.time_limit"
        )
    if c.schedule.steps < c.replay.start:
        yield (
            f"schedule.steps: the run would end before its first update; expected at least "
            f"replay.start ({c.replay.start}), got {c.schedule.steps}"
        )


def _sequence_contradictions(c: "Config") -> Iterator[str]:
    """What windows and sequence networks ask for."""
    q = c.sequence
    if c.net.stack > 1:
        yield (
            f"net.stack: net.encoder {c.net.encoder} reads rows one by one; expected 1, "
            f"got {c.net.stack}"
        )
    if c.learnt == 0:
        yield (
            f"sequence.learnt: 0 means the longest episode of the environment, and env options of "
            f"family {c.env.family} name none; expected a number of rows, or an env.time_limit"
        )
    elif q.learnt == 0 and c.longest > LONGEST:
        yield (
            f"sequence.learnt: 0 means the longest episode of the environment, {c.longest} agent "
            f"steps; windows of more than {LONGEST} rows are learnt only where they are asked for: "
            "expected a number of rows"
        )
    if c.net.encoder == "gru" and q.width > GRU_WIDEST and c.device != "cpu":
        yield (
            f"sequence.width: a recurrent unit of the GPU has at most {GRU_WIDEST} features; "
            f"expected these or fewer with net.encoder gru (or device cpu), got {q.width}"
        )
    if q.width % q.heads:
        yield (f"sequence.width: expected a multiple of sequence.heads ({q.heads}), got {q.width}")
    elif c.net.encoder in ("fox", "transformer"):
        head = q.width // q.heads
        if head % 8 or head > 128:
            yield (
                "sequence.heads: a head is 8, 16, 24, ... 128 features wide; expected width "
                f"{q.width} over heads to be one of these, got {head} with {q.heads} heads"
            )
    if q.gate_scales and not (
        len(q.gate_scales) == 2 and 0 < q.gate_scales[0] <= q.gate_scales[1] < math.inf
    ):
        yield (
            "sequence.gate_scales: expected the shortest and the longest time scale in agent "
            f"steps, e.g. [1, 100], or nothing, got {list(q.gate_scales)}"
        )
    if c.loss.batches in ("own", "disjoint") and c.loss.batches_probability < 1:
        yield (
            "loss.batches_probability: windows hold rows of several members, of which own and "
            "disjoint batches take a member's; expected 1 with a sequence network, got "
            f"{c.loss.batches_probability:g}"
        )
    if q.stored_state and (c.net.encoder != "gru" or c.agent == "sac"):
        yield (
            "sequence.stored_state: states of recurrent units are stored with agents dqn and "
            f"quantile; expected false with net.encoder {c.net.encoder} and agent {c.agent}"
        )
    alone = c.ensemble.members == 1 or c.ensemble.shared_layers > 0 or c.loss.batches == "own"
    if q.stored_state and not (alone and c.ensemble.switch == "episode"):
        yield (
            "sequence.stored_state: a state is one member's, that of the row; expected false, or "
            "loss.batches own and ensemble.switch episode, got "
            f"{c.loss.batches} and {c.ensemble.switch} with {c.ensemble.members} members"
        )
    if q.sampling == "episode_start":
        yield from _start_contradictions(c)
    if c.replay.placement == "host" and c.sequence.cache_refresh:
        yield (
            "sequence.cache_refresh: rows in host memory would be copied at every refresh; "
            f"expected 0 with replay.placement host, got {c.sequence.cache_refresh}"
        )


def _start_contradictions(c: "Config") -> Iterator[str]:
    """Windows that begin with an episode are rare among rows, and learn nothing beyond their T."""
    if not c.longest:
        return
    if 0 < c.learnt < c.longest:
        yield (
            f"sequence.learnt: windows that begin with an episode learn from its first rows only, "
            f"and one lasts up to {c.longest} agent steps; expected at least {c.longest} (or 0: "
            f"all) with sampling episode_start, got {c.sequence.learnt}"
        )
    e, apart = c.ensemble, c.loss.batches in ("own", "disjoint") and c.ensemble.members > 1
    rare = (smallest_share(c) if apart else 1.0) / (c.longest + 1)
    if rare > 0 and (miss := (1 - rare) ** c.replay.candidates) > START_MISS:
        needed = math.ceil(math.log(START_MISS) / math.log1p(-rare))
        whose = f" of the least of {e.members} members" if apart else ""
        yield (
            f"replay.candidates: one row in {1 / rare:.0f} begins an episode{whose}, so "
            f"{c.replay.candidates} candidates find none with probability {miss:.2g}; expected at "
            f"most {START_MISS:g}, that is at least {needed} candidates"
        )
