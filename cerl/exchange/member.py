"""One member of a run as files that need no run folder: its parameters, the config, and a script.

`export` takes the parameters of one seed and member from the newest checkpoint. `load` makes a
policy of the exported folder. That policy builds the network of the whole population, of which only
the exported member has its trained parameters and only this member acts.
"""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from cerl import __version__
from cerl.config import Config, ConfigError, evaluated
from cerl.device.pick import pick
from cerl.evaluate import evaluation_keys
from cerl.evaluate_run import load_net
from cerl.exchange import tensors
from cerl.exchange.tensors import TensorsError
from cerl.policy import Policy, spec_of
from cerl.record import files, results, trust
from cerl.record.folder import FILE, load_file
from cerl.wiring import make_agent

PARAMETERS, SCRIPT = "member.safetensors", "play.py"
PLAY = '''\
"""Plays one episode with the member of this folder and prints its return."""
import pathlib

import cerl
from cerl.exchange import member

policy = member.load(pathlib.Path(__file__).parent, device="cpu")
env, limit = policy.config.env.for_evaluation(1), policy.config.eval.time_limit
env = cerl.envs.make(env, seeds=policy.config.seeds, salt=1, device="cpu", longest=limit)
step, total, over = env.reset(), 0.0, False
while not over:
    step = env.step(policy.act(step.obs[0], step.reward[0])[None])  # one seed, one environment
    total, over = total + float(step.reward), bool(step.terminated | step.truncated)
print(f"return {total:g}")
'''


def export(
    run: Path, out: Path, *, member: int, seed: int | None = None, trusted: bool = False
) -> list[Path]:
    """Writes a member of a run's newest intact checkpoint into a folder.

    Parameters have the names that they have in the network of the run, without the leading axes of
    seeds and members. Layers that all members share are in the file as well.

    Args:    run, its folder; out, a folder, which is made if it is missing; member, from 0 to
             N - 1; seed, one of the run's (None: the first); trusted, as --trust of `cerl eval`.
    Returns: the files.
    Raises:  ConfigError if the folder holds no run, for an unknown seed or member, or if `out` is
             the run folder; CheckpointError if there is no intact checkpoint; OSError.
    """
    config = load_file(run / FILE)
    trust.check(config, run, trusted=trusted)
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        known = " ".join(map(str, config.seeds))
        raise ConfigError(f"export --seed: expected one of the run's seeds {known}, got {seed}")
    members = config.ensemble.members
    if not 0 <= member < members:
        raise ConfigError(f"export --member: expected 0 to {members - 1}, got {member}")
    if out.resolve() == run.resolve():
        raise ConfigError("export --out: expected another folder than that of the run")
    cpu = torch.device("cpu")
    net = make_agent(config, spec_of(config, cpu), cpu).build(
        keys=evaluation_keys(config.seeds, cpu)
    )
    load_net(net, run)
    own = {}
    for name, tensor in net.state_dict().items():
        values = tensor[config.seeds.index(seed)]  # [N or 1, ...]
        own[name] = values[member if values.shape[0] > 1 else 0]
    facts = {
        "format": "pt",
        "made_by": f"cerl {__version__}",
        "preset": config.preset,
        "env": results.env_name(config),
        "seed": str(seed),
        "member": str(member),
        "members": str(members),
    }
    out.mkdir(parents=True, exist_ok=True)
    tensors.write(out / PARAMETERS, own, facts)
    # The seal of config.yaml tells whose run it is, so the file is copied as it is.
    with files.read(run / FILE) as source:
        files.write_atomically(out / FILE, lambda file: shutil.copyfileobj(source, file))
    files.write_text(out / SCRIPT, PLAY)
    return [out / PARAMETERS, out / FILE, out / SCRIPT]


def load(
    folder: str | os.PathLike[str],
    *,
    policy: Literal["individual", "individual_mode"] = "individual",
    epsilon: float = 0.0,
    device: str | None = None,
    trusted: bool = False,
) -> Policy:
    """The policy of a member that `export` wrote.

    Args:   folder, with config.yaml and member.safetensors; policy, individual_mode (agent sac
            only) plays the modes of the member's distributions instead of samples; epsilon,
            probability of a random action; device, cpu, cuda or cuda:N (None: that of the config);
            trusted, as --trust of `cerl eval`.
    Raises: ConfigError or TensorsError if a file is missing, damaged, or of another run.
    """
    folder = Path(folder)
    config = load_file(folder / FILE)
    trust.check(config, folder, trusted=trusted)
    config = evaluated(config, {"policies": (policy,), "epsilon": float(epsilon)})
    saved, facts = tensors.read(folder / PARAMETERS)
    seed, member = _whose(facts, config, folder / PARAMETERS)
    one = config.model_copy(update={"seeds": (seed,)})
    place = pick(device or config.device)
    spec, keys = spec_of(one, place), evaluation_keys(one.seeds, place)
    agent = make_agent(one, spec, place)
    net = agent.build(keys=keys)
    state = net.state_dict()
    expected = {name: (tuple(t.shape[2:]), t.dtype) for name, t in state.items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in saved.items()}
    if wrong := sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k)):
        name = wrong[0]
        raise TensorsError(
            f"{folder / PARAMETERS}: expected the parameters of the network in {folder / FILE}, "
            f"{name} as {expected.get(name)}, got {found.get(name)} ({len(wrong)} differ); export "
            "the member again"
        )
    for name, tensor in state.items():
        tensor[0, member if tensor.shape[1] > 1 else 0].copy_(saved[name])
    return Policy(one, spec, agent, net, member=member, keys=keys)


def _whose(facts: dict[str, str], config: Config, path: Path) -> tuple[int, int]:
    """The seed and the member whose parameters a file holds. Args: facts, its metadata."""
    try:
        seed, member = int(facts["seed"]), int(facts["member"])
    except (KeyError, ValueError) as error:
        raise TensorsError(
            f"{path}: expected a file of `cerl export --member`, whose metadata name the seed and "
            "the member; got none that do"
        ) from error
    if seed not in config.seeds or not 0 <= member < config.ensemble.members:
        raise TensorsError(
            f"{path}: seed {seed}, member {member} are none of {path.parent / FILE}; expected both "
            "files of one export"
        )
    return seed, member
