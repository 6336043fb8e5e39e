"""SAC updates against values computed by the authors' JAX code (tests/golden/sac.json)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cerl.agents.parity_sac import from_original, run_sac_updates, to_original
from cerl.config import (
    AdamConfig,
    Config,
    EnsembleConfig,
    EvalConfig,
    LossConfig,
    NetConfig,
    PointMassEnv,
    SacConfig,
    ScheduleConfig,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sac.json").read_text())
HYPER = GOLDEN["hyper"]
N, A, DEPTH = HYPER["members"], HYPER["act"], len(HYPER["hidden"])
HEADS: dict[str, Any] = {"q": "cerl", "pi": "own_target"}


def leaves(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((rng.standard_normal(shapes[name]) * 0.2).astype(np.float32))
        for name in sorted(shapes)
    }


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(5)

    def f(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    found = {"states": f(16, 5), "actions": torch.tanh(f(16, 2)), "rewards": f(16) * 20}
    found["terminals"] = 1.0 - torch.from_numpy((rng.random(16) > 0.2).astype(np.float32))
    return found | {"next_states": f(16, 5), "next_noise": f(N, 16, 2), "noise": f(N, 16, 2)}


def config(options):
    return Config(
        agent=SacConfig(
            critics=2,
            log_std="tanh",
            loss="mse_huber" if options["aux_huber"] else "mse",
            huber_delta=options["huber_delta"],
            target_entropy=HYPER["target_entropy"] / A,
        ),
        env=PointMassEnv(),
        net=NetConfig(hidden=tuple(HYPER["hidden"])),
        ensemble=EnsembleConfig(
            members=N, heads=HEADS[options["cel_type"]] if options["cel"] else "own"
        ),
        loss=LossConfig(gamma=HYPER["gamma"]),
        optim=AdamConfig(lr=HYPER["adam_lr"], eps=1e-8),
        schedule=ScheduleConfig(target_rate=HYPER["tau"]),
        eval=EvalConfig(policies=("individual",)),
    )


def assert_fingerprints(found, expected, where):
    for leaf, numbers in expected.items():
        value = found[leaf].detach().numpy().astype(np.float64)
        probe = np.random.default_rng(99).standard_normal(value.shape)
        size, dot = np.sqrt((value**2).sum()), (value * probe).sum()
        assert size == pytest.approx(numbers["l2"], rel=1e-3), (where, leaf)
        assert dot == pytest.approx(numbers["dot"], abs=1e-3 * numbers["l2"]), (where, leaf)


def part(parameters, name):
    return {k.removeprefix(f"{name}."): v for k, v in parameters.items() if k.startswith(name)}


@pytest.mark.parametrize("name", GOLDEN["variants"])
def test_updates_reproduce_the_original(name):
    golden = GOLDEN["variants"][name]
    shapes = golden["shapes"]
    start = {"actor": leaves(shapes["actor"], 1), "critic": leaves(shapes["critic"], 2)}
    rng = np.random.default_rng(4)
    log_temp = torch.from_numpy((rng.standard_normal(N) * 0.2).astype(np.float32))
    parameters = {"log_alpha": log_temp.view(1, N, 1)}
    for module, own in start.items():
        ours = from_original(own, depth=DEPTH)
        parameters |= {f"{module}.{k}": v for k, v in ours.items()}
    done = run_sac_updates(
        parameters,
        from_original(leaves(shapes["critic"], 3), depth=DEPTH),
        **batch(),
        config=config(golden["options"]),
        updates=3,
    )
    for k, (ours, step) in enumerate(zip(done, golden["steps"], strict=True)):
        info, main = step["critic_info"], ours.head_losses[..., 0]
        logged = main.mean() if golden["options"]["cel"] else main.sum()
        own = ours.values[..., 0]
        assert float(logged) == pytest.approx(info["critic_loss"], rel=1e-4)
        assert ours.critic_gradient == pytest.approx(info["critic_gnorm"], rel=1e-4)
        assert float(own.mean()) == pytest.approx(info["q_mean"], abs=1e-5)
        assert float(own.amax(0).mean()) == pytest.approx(info["q_max"], abs=1e-5)
        assert float(own.amin(0).mean()) == pytest.approx(info["q_min"], abs=1e-5)
        assert float(ours.actor_losses.sum()) == pytest.approx(step["actor_loss"], rel=1e-4)
        assert ours.actor_gradient == pytest.approx(step["actor_grad_norm"], rel=1e-4)
        assert ours.entropy.tolist() == pytest.approx(step["entropy"], rel=1e-4)
        temperature = float(ours.temperature_losses.sum())
        assert temperature == pytest.approx(step["temperature_loss"], rel=1e-4)
        after = ours.parameters["log_alpha"].flatten().tolist()
        assert after == pytest.approx(step["log_temp_after"], abs=1e-6)
        for module in ("actor", "critic"):
            names = list(shapes[module])
            now = to_original(part(ours.parameters, module), names, depth=DEPTH)
            change = {leaf: now[leaf] - start[module][leaf] for leaf in names}
            assert_fingerprints(change, step[f"{module}_delta"], (k, module))
        target = to_original(ours.target_parameters, list(shapes["critic"]), depth=DEPTH)
        assert_fingerprints(target, step["target_critic_after"], (k, "target"))


def test_a_wrong_leaf_is_named():
    golden = GOLDEN["variants"]["cerl"]
    with pytest.raises(ValueError, match="target_parameters: expected leaves.*final.weight"):
        shapes = golden["shapes"]
        parameters = {"log_alpha": torch.zeros(1, N, 1)}
        for module, seed in (("actor", 1), ("critic", 2)):
            ours = from_original(leaves(shapes[module], seed), depth=DEPTH)
            parameters |= {f"{module}.{k}": v for k, v in ours.items()}
        wrong = from_original(leaves(shapes["critic"], 3), depth=DEPTH)
        wrong["final.weight"] = wrong["final.weight"][..., :1]
        run_sac_updates(parameters, wrong, **batch(), config=config(golden["options"]))
