"""Evaluates the newest checkpoint of a run: `cerl eval`."""

from pathlib import Path

from torch import nn

from cerl.config import evaluated
from cerl.device.pick import prepare
from cerl.evaluate import Evaluator, Result, evaluation_keys
from cerl.footprint.estimate import estimate
from cerl.footprint.reservation import check_fits
from cerl.record import checkpoint, trust
from cerl.record.folder import FILE, check_fixed, load_file
from cerl.record.screen import Screen
from cerl.state import match, put_net
from cerl.wiring import evaluation_env, make_agent


def evaluate_run(
    folder: Path,
    *,
    episodes: int | None = None,
    policies: tuple[str, ...] | None = None,
    epsilon: float | None = None,
    trusted: bool = False,
) -> dict[str, Result]:
    """Evaluates the newest intact checkpoint of a run folder.

    It is evaluation number 0; those of training have the number of their iteration, from 1 on.

    Args:    episodes, policies, epsilon replace the options of `eval` in the run's config; trusted,
             the run may import modules even if another user made it.
    Returns: {policy: Result}.
    Raises:  CheckpointError or ConfigError if the folder holds nothing to evaluate; RuntimeError if
             the evaluation does not fit into memory.
    """
    config = load_file(folder / FILE)
    trust.check(config, folder, trusted=trusted)
    changes = {"episodes": episodes, "policies": policies, "epsilon": epsilon}
    asked = {name: value for name, value in changes.items() if value is not None}
    config = evaluated(config, asked)
    device = prepare(config)
    check_fits(estimate(config, device=device, agent=make_agent, evaluating=True))
    keys = evaluation_keys(config.seeds, device)
    env = evaluation_env(config, device)
    agent = make_agent(config, env.spec, device)
    net = agent.build(keys=keys)
    try:
        load_net(net, folder)
        results = Evaluator(config, env, agent, net, keys=keys).run(0)
        assert results is not None, "nothing told the evaluation to stop"
        return results
    finally:
        env.close()


def load_net(net: nn.Module, folder: Path) -> None:
    """Loads the network of a run's newest intact checkpoint into `net`, in place.

    Raises: CheckpointError or ConfigError if it is the checkpoint of another run or network.
    """
    loaded = checkpoint.load(folder)
    for sentence in loaded.damaged:
        Screen().line(sentence)
    state = loaded.state
    # Only the parts that an evaluation reads are checked. Others may differ between versions.
    expected = {"config": "", "learner": {"net": dict(net.state_dict())}}
    found = {key: state[key] for key in expected if key in state}
    if isinstance(found.get("learner"), dict):
        found["learner"] = {k: v for k, v in found["learner"].items() if k == "net"}
    match(expected, found)
    check_fixed(folder, state["config"], where=str(loaded.file))
    put_net(net, state["learner"]["net"], what="learner.net")
