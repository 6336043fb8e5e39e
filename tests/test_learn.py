"""The update: captured equals eager, seeds are independent, loading keeps tensors in place."""

import pytest
import torch

from cerl import draw, training, wiring
from cerl.agents.dqn import QNet
from cerl.bench import runs
from cerl.collect import Collector
from cerl.config import load
from cerl.data import ActInput, EnvSpec, Previous, Row, Step, Window
from cerl.graph import captured
from cerl.kernels.runtime import streams
from cerl.learn import Learner
from cerl.replay import Replay
from cerl.state import CheckpointError

ATARI = EnvSpec("random", (84, 84), torch.uint8, 6, 1, 4, True, False)
MINATAR = EnvSpec("random", (4, 10, 10), torch.bool, 3, 8, 1, True, True)
ROBOT = EnvSpec("random", (17,), torch.float32, 6, 1, 1, True, False, continuous=True)
CAMERA = EnvSpec("random", (3, 20, 24), torch.uint8, 2, 1, 1, True, False, continuous=True)
IMAGES = {"channels": (8, 8), "kernels": (4, 3), "strides": (2, 1), "scale": 255.0}
PAIR = {"seeds": (0, 1), "ensemble": {"members": 3}}


def learner(name, spec, device, **changes):
    small = {"replay": {"capacity": 2_000, "start": 1_000}, "env": {"envs": spec.envs}}
    return runs.filled_learner(load(name, {**small, **changes}), spec, torch.device(device))


CASES = [
    ("atari/paper-cerl", ATARI, {"ensemble": {"members": 3}}),
    ("atari/paper-bootdqn-l3", ATARI, {"ensemble": {"members": 3}}),
    ("atari/paper-ddqn", ATARI, {}),
    ("minatar/cerl", MINATAR, {"seeds": (0, 1)}),
    ("minatar/mico", MINATAR, {"seeds": (0, 1)}),
    ("minatar/own-batches", MINATAR, {"seeds": (0, 1)}),
    ("minatar/young-tian", MINATAR, {"seeds": (0, 1)}),
    ("minatar/prioritised", MINATAR, {"seeds": (0, 1)}),
    ("minatar/qrdqn", MINATAR, {"seeds": (0,), "ensemble": {"members": 3}}),
    ("minatar/bootdqn", MINATAR, {**PAIR, "ensemble.heads": "mean"}),
    ("mujoco/cerl", ROBOT, PAIR),
    ("mujoco/paper-cerl-own-target", ROBOT, PAIR),
    ("mujoco/cerl", ROBOT, {**PAIR, "replay.sampler.name": "prioritised"}),
    ("mujoco/sunrise", ROBOT, PAIR),
    ("mujoco/redq", ROBOT, {"seeds": (0, 1)}),
    ("mujoco/standard-sac", ROBOT, {"seeds": (0, 1), "agent": {"critic_norm": "layer"}}),
    (
        "gym/pendulum",
        CAMERA,
        {**PAIR, "ensemble.heads": "cerl", "net": IMAGES, "encoder.frames": 2},
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(("name", "spec", "changes"), CASES)
def test_captured_update_equals_eager_bitwise(name, spec, changes, precision):
    device = torch.device("cuda")
    changes = {"precision": precision, **changes}
    eager, graph = (learner(name, spec, device, **changes) for _ in range(2))
    replayed, sync = captured(graph.update, device), captured(graph.sync, device)
    for k in range(10):
        eager.update()
        replayed()
        if k % 4 == 3:
            eager.sync()
            sync()
    for mine, theirs in zip(eager.leaves, graph.leaves, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    assert int(graph.updates) == 10
    for key, value in eager.metrics.items():
        assert torch.equal(value, graph.metrics[key])


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["update", "update_first"])
@pytest.mark.parametrize(("name", "spec", "changes"), CASES)
def test_branches_side_by_side_equal_one_after_the_other_bitwise(
    monkeypatch, name, spec, changes, part
):
    together, alone = (learner(name, spec, "cuda", **changes) for _ in range(2))
    run = captured(getattr(together, part), torch.device("cuda"))
    for _ in range(20):
        run()
    here = torch.cuda.current_stream
    monkeypatch.setattr(streams, "_side_stream", lambda device, *_: here(device))
    for _ in range(20):
        getattr(alone, part)()
    for name, value in alone.metrics.items():
        assert torch.equal(value, together.metrics[name]), name
    for mine, theirs in zip(together.leaves, alone.leaves, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(together.target.parameters(), alone.target.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "spec", "changes"), [case for case in CASES if case[1].continuous]
)
def test_what_a_stage_prepares_is_not_moved_by_the_stages_before(name, spec, changes):
    ours = learner(name, spec, "cpu", **changes)
    with torch.no_grad():
        window, dice = ours.sample(), ours.agent.dice(ours.keys, ours.updates)
    first = ours.prepare(window, 1, dice)
    assert first is not None
    plain, told = (
        ours.grads(window, stage=1, dice=dice, prepared=known)[0] for known in (None, first)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))
    ours.update_first()
    for target in ours.target.parameters():
        target.add_(1.0)
    second = ours.prepare(window, 1, dice)
    assert torch.equal(first.action, second.action) and torch.equal(first.log_p, second.log_p)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "spec", "changes"), CASES)
def test_gpu_update_agrees_with_the_cpu(name, spec, changes):
    changes = {"precision": "fp32", **changes}
    gpu, cpu = learner(name, spec, "cuda", **changes), learner(name, spec, "cpu", **changes)
    cpu.replay.load_state_dict(gpu.replay.state_dict())
    windows = gpu.sample(), cpu.sample()
    for mine, theirs in zip(*windows, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    cpu.load_state_dict(gpu.state_dict())
    dice = tuple(one.agent.dice(one.keys, one.updates) for one in (gpu, cpu))
    for stage in range(len(gpu.stages)):
        grads = tuple(
            one.grads(window, stage=stage, dice=drawn)[0]
            for one, window, drawn in zip((gpu, cpu), windows, dice, strict=True)
        )
        for mine, theirs in zip(*grads, strict=True):
            scale = theirs.abs().max()
            assert (mine.cpu() - theirs).abs().max() <= 1e-4 * scale + 1e-9


@pytest.mark.parametrize(("name", "spec", "changes"), CASES[3:])
def test_update_keeps_its_types_under_autocast(name, spec, changes):
    ours = learner(name, spec, "cpu", precision="bf16", **changes)
    ours.update()
    assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in ours.leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["minatar/cerl", "point_mass/cerl"])
def test_gpu_run_resumes_bitwise(tmp_path, name):
    changes = {
        "seeds": (0, 1),
        "device": "cuda",
        "env": {"envs": 8},
        "ensemble": {"members": 3},
        "replay": {"capacity": 4_000, "start": 200},
        "schedule": {"steps": 1_600},
        "eval": {"every": 800, "episodes": 2, "time_limit": 200},
        "log": {"every": 400, "checkpoint_every": 800},
    }
    from test_train import assert_same, final_state, stop_at_first_checkpoint

    config = load(name, {**changes, "out": str(tmp_path / "whole")})
    whole = training.train(config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_first_checkpoint(patch)
        training.train(config.model_copy(update={"out": str(tmp_path / "halves")}))
    (half,) = (tmp_path / "halves").iterdir()
    training.resume(half)
    assert_same(final_state(whole), final_state(half))


class Frames:
    """Host environments whose 84x84 frames tell environment and time; episodes of 5 and 7 steps."""

    def __init__(self, envs, device):
        self.envs, self.device, self.times, self.note = envs, device, [0] * envs, ""
        self.spec = EnvSpec("frames", (84, 84), torch.uint8, 4, envs, 4, False, False)

    def _step(self, reward, ended):
        frames = torch.zeros(1, self.envs, 84, 84, dtype=torch.uint8)
        for env, time in enumerate(self.times):
            frames[0, env, time : time + 3] = 50 + 10 * env + time
        rows = torch.tensor([reward]), torch.tensor([ended]), torch.zeros(1, self.envs).bool()
        return Step(*(x.to(self.device) for x in (frames, *rows)))

    def reset(self):
        self.times = [0] * self.envs
        return self._step([0.0] * self.envs, [False] * self.envs)

    def step(self, action):
        lengths = [5 + 2 * (env % 2) for env in range(self.envs)]
        fresh = [time == length for time, length in zip(self.times, lengths, strict=True)]
        self.times = [0 if new else time + 1 for new, time in zip(fresh, self.times, strict=True)]
        chosen = action[0].tolist()
        reward = [0.0 if new else float(a) for new, a in zip(fresh, chosen, strict=True)]
        ended = [time == length for time, length in zip(self.times, lengths, strict=True)]
        return self._step(reward, ended)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        return self.reset()

    def restart(self, number):
        return self.reset()

    def close(self):
        pass


def frames_parts(device, eps):
    device = torch.device(device)
    changes = {
        "precision": "fp32",
        "env": {"envs": 4},
        "replay": {"capacity": 400, "start": 100, "reward_clip": 1.0},
        "explore": {"start": eps, "end": eps},
    }
    config, env = load("atari/ddqn-e8", changes), Frames(4, device)
    keys = draw.seed_keys((0,), device=device)
    agent = wiring.make_agent(config, env.spec, device)
    net = agent.build(keys=keys)
    replay = Replay(env.spec, keys=keys, capacity=400, device=device)
    learner = Learner(config, agent, net, replay, keys=keys)
    return Collector(config, env, agent, net, replay, keys=keys), learner


def frames_run(device, steps):
    collector, _ = frames_parts(device, 1.0)  # rounding must not choose actions
    for _ in range(steps):
        collector.step()
    return collector


def test_stack_that_acts_equals_the_stack_that_learns_on_host_environments():
    collector = frames_run("cpu", 40)
    net, replay = collector.player.net, collector.replay
    assert isinstance(net, QNet)
    time = torch.tensor([[[30, 31, 32, 33]]]).view(1, 1, 1, 4)  # one window of context + 1 rows
    for env in range(4):
        fields = {k: getattr(replay, k)[:, time, env][:, 0] for k in Row._fields}
        one = torch.zeros(1, 1, 1)
        window = Window(**fields, row=one.long(), weight=one, state=one.unsqueeze(-1))
        (x,) = net.look(window, torch.full((1, 1, 1, 1), 3))
        carry = net.carry(envs=1, evaluating=False)
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        for t in range(34):
            began = torch.tensor([[t == 0 or not bool(replay.real[0, t - 1, env])]])
            obs = replay.obs[:, t, env : env + 1]
            seen = ActInput(obs, began, Previous(nothing, nothing.float()), nothing)
            (acted,) = net.step(seen, carry, evaluating=False)
        assert torch.equal(x.flatten(), acted.flatten())


@pytest.mark.gpu
def test_gpu_collects_from_host_environments_what_the_cpu_does():
    gpu, cpu = frames_run("cuda", 40), frames_run("cpu", 40)
    for name in Row._fields:
        assert torch.equal(getattr(gpu.replay, name).cpu(), getattr(cpu.replay, name)), name
    assert torch.equal(gpu.player.carry[0].cpu(), cpu.player.carry[0])
    assert torch.equal(gpu.finished[..., :3].cpu(), cpu.finished[..., :3])


@pytest.mark.gpu
def test_updates_beside_host_environments_equal_those_that_wait():
    ours, beside = frames_parts("cuda", 0.1)
    theirs, alone = frames_parts("cuda", 0.1)
    update = captured(beside.update, torch.device("cuda"))
    for step in range(60):
        due = range(2 if step > 25 else 0)

        def learn(due=due):
            for _ in due:
                update()

        ours.step(learn)
        theirs.player.halves.decide()
        torch.cuda.synchronize()
        for _ in due:
            alone.update()
        torch.cuda.synchronize()
        player = theirs.player
        player.next.copy_(player.env.step(player.action.cpu()))
        theirs.player.halves.record()
        torch.cuda.synchronize()
    for name in Row._fields:
        assert torch.equal(getattr(ours.replay, name), getattr(theirs.replay, name)), name
    assert all(map(torch.equal, beside.leaves, alone.leaves))


NOT_ALONE = ["minatar/cerl", "minatar/bootdqn-l1", "minatar/mico", "minatar/prioritised"]


@pytest.mark.parametrize("name", NOT_ALONE)
def test_nan_in_one_seed_leaves_the_others_bitwise_alone(name):
    changes = {"seeds": (0, 1), "ensemble": {"members": 3}, "replay": {"batch": 8}}
    clean, poisoned = (learner(name, MINATAR, "cpu", **changes) for _ in range(2))
    poisoned.replay.reward[1] = float("nan")
    for part in (clean, poisoned):
        for _ in range(3):
            part.update()
    for mine, theirs in zip(clean.leaves, poisoned.leaves, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert theirs[1].isnan().any()


@pytest.mark.parametrize("name", ["minatar/cerl", "minatar/young-tian"])
def test_targets_at_rate_one_wait_for_the_copy(name):
    part = learner(name, MINATAR, "cpu", seeds=(0,), replay={"batch": 4})
    assert part.config.schedule.target_rate == 1.0
    before = [leaf.clone() for leaf in part.target.parameters()]
    part.update()
    online = list(part.net.parameters())
    for target, old, leaf in zip(part.target.parameters(), before, online, strict=True):
        assert torch.equal(target, old) and not torch.equal(target, leaf)
    part.sync()
    assert all(map(torch.equal, part.target.parameters(), online))


def test_loading_copies_in_place():
    changes = {"seeds": (0,), "ensemble": {"members": 2}}
    first, second = (learner("minatar/cerl", MINATAR, "cpu", **changes) for _ in range(2))
    first.update()
    before = [leaf.data_ptr() for leaf in second.leaves]
    second.load_state_dict(first.state_dict())
    assert [leaf.data_ptr() for leaf in second.leaves] == before
    first.update()
    second.update()
    for mine, theirs in zip(first.leaves, second.leaves, strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_another_network_is_named():
    changes = {"seeds": (0,), "ensemble": {"members": 2}}
    part = learner("mujoco/cerl", ROBOT, "cpu", **changes)
    state = part.state_dict()
    before = {name: leaf.clone() for name, leaf in state["net"].items()}
    # Means and log deviations in layers of their own.
    other = {name: leaf for name, leaf in before.items() if "moments" not in name}
    other |= {f"actor.{k}.weight": torch.zeros(1, 2, 256, 6) for k in ("mean", "log_std")}
    with pytest.raises(CheckpointError) as caught:
        part.load_state_dict(state | {"net": other})
    said = str(caught.value)
    assert "expected actor.moments.bias, actor.moments.weight in learner.net" in said
    assert "got actor.log_std.weight, actor.mean.weight instead" in said and "version" in said
    wide = before | {"actor.moments.bias": torch.zeros(1, 2, 14)}
    with pytest.raises(CheckpointError, match=r"learner.net.actor.moments.bias .*\[1, 2, 12\]"):
        part.load_state_dict(state | {"net": wide})


def test_mask_is_a_function_of_row_and_member():
    changes = {"seeds": (0, 1), "loss": {"mask_probability": 0.5}}
    part = learner("minatar/bootdqn", MINATAR, "cpu", **changes)
    window = part.sample()
    mask = part.mask(window)
    assert mask is not None and mask.shape == (2, 10, 32)
    again, moved = part.mask(window), part.mask(window._replace(row=window.row.flip(-1)))
    assert again is not None and torch.equal(mask, again)
    assert moved is not None and torch.equal(moved, mask.flip(-1))
    assert 0.4 < float(mask.mean()) < 0.6
    assert not torch.equal(mask[:, 0], mask[:, 1])
