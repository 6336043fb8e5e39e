"""Divergence: the seed is named, freezing it leaves the others alone, and a run reacts as told."""

import math

import pyarrow.parquet as pq
import pytest
import torch

from cerl import divergence, training
from cerl.bench import runs
from cerl.config import load, preset
from cerl.data import EnvSpec
from cerl.divergence import Watch
from cerl.graph import captured
from cerl.learn import Learner
from cerl.record import checkpoint

BOARD = EnvSpec("random", (4, 5, 5), torch.bool, 3, 2, 1, True, True)
ROBOT = EnvSpec("random", (5,), torch.float32, 2, 2, 1, True, False, continuous=True)
NAN = math.nan


def learner(name, *, device="cpu", **changes) -> Learner:
    small = {
        "seeds": (7, 3, 5),
        "ensemble": {"members": 2},
        "env": {"envs": 2},
        "replay": {"capacity": 400, "start": 100, "batch": 8},
        "net": {"hidden": (8, 8)},
    }
    spec = ROBOT if name.startswith("mujoco") else BOARD
    config = load(name, preset.merged(small, changes))
    return runs.filled_learner(config, spec, torch.device(device))


def watch_of(one: Learner) -> Watch:
    return Watch(one.config, one)


def host(metrics):
    return {name: value.cpu().clone() for name, value in metrics.items()}


def test_unsound_and_tally_equal_a_loop_over_the_elements():
    generator = torch.Generator().manual_seed(0)
    own, shared, plain = (
        torch.randn(shape, generator=generator) for shape in ((3, 2, 4, 3), (3, 1, 6), (3, 2))
    )
    assert not divergence.unsound([own, shared, plain], members=2).any()
    own[0, 1, 2, 1], shared[1, 0, 5], plain[2, 0] = NAN, -math.inf, math.inf
    own[0, 1, 0, 0] = -math.inf
    tensors = [own, shared, plain]
    found = divergence.unsound(tensors, members=2)
    assert found.tolist() == [[False, True], [True, True], [True, False]]
    for seed in range(3):
        for members in ([0], [1], [0, 1]):
            elements = [
                float(x)
                for tensor in tensors
                for m in (members if tensor.shape[1] > 1 else [0])
                for x in tensor[seed, m].flatten()
            ]
            bad = sum(not math.isfinite(x) for x in elements)
            assert divergence.tally(tensors, seed=seed, members=members) == (bad, len(elements))


def test_seed_member_step_and_quantities_are_named_once():
    one = learner("minatar/bootdqn", optim={"lr": 0.5})
    watch, leaf = watch_of(one), one.net.final.weight
    sound = {name: torch.zeros(3, 2) for name in one.metrics}
    assert watch.look(100, sound) == [] and watch.diverged == {}
    with torch.no_grad():
        leaf[1, 1, 0] = NAN
        one.optimisers[0][0].second[0][1, 1, 0, 0] = math.inf
    metrics = sound | {"loss": torch.tensor([[0.0, 0.0], [0.0, math.inf], [0.0, 0.0]])}
    parameters = sum(x[1, 1].numel() for x in one.leaves)
    (words,) = watch.look(1_200, metrics)
    assert words.startswith(
        f"seed 3, member 1 diverged at 1,200 agent steps: not finite are {leaf[1, 1, 0].numel()} "
        f"of {parameters:,} parameters, 1 of {2 * parameters:,} moments of the optimiser, loss "
        "inf; it is trained no further, and its later rows are marked (diverged: freeze). "
        "Try to lower "
        "optim.lr (0.5), or set optim.clip_norm"
    )
    assert watch.diverged == {1: 1_200}
    assert watch.look(1_300, metrics) == []
    # Diagnostics may be NaN where there is nothing to measure.
    assert watch.look(1_400, metrics | {"cache_error": torch.full((3,), NAN)}) == []


def test_members_that_share_layers_diverge_together():
    one = learner("minatar/bootdqn", ensemble={"shared_layers": 1})
    with torch.no_grad():
        one.leaves[0][2, 0].flatten()[0] = NAN
    (words,) = watch_of(one).look(10, {})
    total = sum(leaf[2].numel() for leaf in one.leaves)
    assert words.startswith(
        f"seed 5, members 0 1 diverged at 10 agent steps: not finite are 1 of {total:,} p"
    )


def test_rewards_too_large_for_the_loss_are_seen_in_it():
    one = learner("minatar/bootdqn", agent={"loss": "mse"})
    one.replay.reward[0] = 1e38
    one.update()
    (words,) = watch_of(one).look(10, host(one.metrics))
    assert words.startswith("seed 7, members 0 1 diverged") and "loss inf" in words


def bits(one: Learner, seed: int) -> list[torch.Tensor]:
    """All that an update changes of a seed, as integers: NaNs are compared too."""
    watched = [tensor for group in divergence.quantities(one).values() for tensor in group]
    return [tensor[seed].clone().view(torch.int32) for tensor in watched]


FROZEN = [
    ("minatar/bootdqn", {}),
    ("minatar/cerl", {"optim": {"name": "rmsprop", "clip_norm": 0.1, "momentum": 0.9}}),
    ("minatar/mico", {"ensemble": {"shared_layers": 1}, "optim": {"name": "adam"}}),
    ("mujoco/cerl", {"agent": {"target_critics": 2}}),
]


@pytest.mark.parametrize(("name", "changes"), FROZEN)
def test_a_frozen_seed_stays_and_the_others_keep_their_bits(name, changes):
    """A seed with NaN beside two sound ones, against the same three without the NaN."""
    clean, poisoned = (learner(name, **changes) for _ in range(2))
    for _ in range(3):
        clean.update()
        poisoned.update()
    with torch.no_grad():
        poisoned.leaves[-2][1].flatten()[0] = NAN
    watch = watch_of(poisoned)
    assert len(watch.look(40, host(poisoned.metrics))) == 1
    frozen = bits(poisoned, 1)
    for _ in range(4):
        clean.update()
        poisoned.update()
    assert all(map(torch.equal, frozen, bits(poisoned, 1)))
    for seed in (0, 2):
        assert all(map(torch.equal, bits(clean, seed), bits(poisoned, seed)))
        for metric in clean.metrics:
            assert torch.equal(clean.metrics[metric][seed], poisoned.metrics[metric][seed])
    assert watch.look(80, host(poisoned.metrics)) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "changes"), FROZEN)
def test_captured_updates_freeze_as_eager_ones_do(name, changes):
    device = torch.device("cuda")
    clean, eager, graph = (learner(name, device="cuda", **changes) for _ in range(3))
    replayed = captured(graph.update, device)
    for k in range(12):
        if k == 6:
            for one in (eager, graph):
                one.leaves[-2].data[1].flatten()[0] = NAN
                assert len(watch_of(one).look(40, {})) == 1
            replayed = captured(graph.update, device)
        clean.update()
        eager.update()
        replayed()
    for seed in range(3):
        assert all(map(torch.equal, bits(eager, seed), bits(graph, seed)))
        if seed != 1:
            assert all(map(torch.equal, bits(clean, seed), bits(graph, seed)))


def test_a_run_that_goes_on_keeps_its_seeds_frozen():
    first, second = (learner("minatar/bootdqn") for _ in range(2))
    first.leaves[0].data[0].flatten()[0] = NAN
    watch, restored = watch_of(first), watch_of(second)
    watch.look(50, {})
    first.update()
    second.load_state_dict(first.state_dict())
    restored.load_state_dict(watch.state_dict())
    assert restored.diverged == watch.diverged == {0: 50}
    for _ in range(3):
        first.update()
        second.update()
    for seed in range(3):
        assert all(map(torch.equal, bits(first, seed), bits(second, seed)))
    other = learner("minatar/bootdqn", seeds=(0, 1))
    with pytest.raises(checkpoint.CheckpointError, match=r"watch\.diverged of 2 seeds, got 3"):
        watch_of(other).load_state_dict(watch.state_dict())


def test_a_run_that_stopped_over_a_seed_goes_on_only_where_told_how():
    first, second = (learner("minatar/bootdqn", diverged=how) for how in ("error", "cut"))
    first.leaves[0].data[0].flatten()[0] = NAN
    watch = watch_of(first)
    with pytest.raises(RuntimeError, match=r"seed 7, members? 0.*\(diverged: error; freeze or cut"):
        watch.look(50, {})
    with pytest.raises(RuntimeError, match="seed 7 at 50 agent steps.*expected diverged freeze or"):
        watch_of(first).load_state_dict(watch.state_dict())
    restored = watch_of(second)
    restored.load_state_dict(watch.state_dict())
    assert restored.diverged == {0: 50} and second.learning is not None
    assert second.learning.tolist() == [[False] * 2, [True] * 2, [True] * 2]


# Whole runs.

TINY = {
    "seeds": (3, 1),
    "device": "cpu",
    "net": {"hidden": (8,)},
    "ensemble": {"members": 2},
    "env": {"rows": 4},
    "replay": {"capacity": 400, "batch": 8, "start": 40},
    "schedule": {"steps": 200, "update_every": 4, "target_every": 20},
    "explore": {"hold": 20, "decay": 100},
    "eval": {"every": 60, "episodes": 1},
    "log": {"every": 40, "checkpoint_every": 200},
}
POISONED = 15  # updates before one of the second seed's parameters is made NaN, at step 100
SEEN = 120  # agent steps at which the evaluation or the log looks next


def run(out, *, poison=None, how="freeze"):
    """A run; `poison` is the pytest fixture by which its second seed diverges."""
    config = load("catch/bootdqn", preset.merged(TINY, {"out": str(out), "diverged": how}))
    if poison is None:
        return training.train(config)
    step = Learner._step

    def poisoned(self, *args):
        step(self, *args)
        if not self.updates.is_meta and int(self.updates) == POISONED:
            self.leaves[0].data[1].flatten()[0] = NAN

    with poison.context() as patch:
        patch.setattr(Learner, "_step", poisoned)
        return training.train(config)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return run(tmp_path_factory.mktemp("clean"))


def recorded(folder, name, seed):
    """Rows of a seed, without the clock."""
    rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
    own = [row | {"wall_seconds": 0, "config_hash": ""} for row in rows if row["seed"] == seed]
    return [{k: "nan" if v != v else v for k, v in row.items()} for row in own]


def parameters(folder, seed):
    state = checkpoint.load(folder, map_location="cpu").state["learner"]
    return {f"{net}.{k}": v[seed] for net in ("net", "target") for k, v in state[net].items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["freeze", "cut"])
def test_a_seed_that_diverges_is_marked_and_leaves_the_other_alone(
    tmp_path, monkeypatch, capsys, clean, how
):
    folder = run(tmp_path, poison=monkeypatch, how=how)
    said = " ".join(capsys.readouterr().out.split())
    for table in ("rows", "metrics"):
        assert recorded(folder, table, 3) == recorded(clean, table, 3)
    mine, theirs = parameters(folder, 0), parameters(clean, 0)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    rows, metrics = recorded(folder, "rows", 1), recorded(folder, "metrics", 1)
    assert {row["step"] for row in rows if not row["diverged"]} == {40, 60, 80}
    marked = {row["step"] for row in rows if row["diverged"]}
    assert marked == ({SEEN} if how == "cut" else {120, 160, 180, 200})
    assert max(row["step"] for row in metrics) == (SEEN if how == "cut" else 200)
    sound = [row for row in rows if not row["diverged"]]
    assert sound == recorded(clean, "rows", 1)[: len(sound)]

    assert f"seed 1, member 0 diverged at {SEEN} agent steps: not finite are " in said
    assert f"done, but seed 1 diverged at {SEEN} agent steps: 200 agent steps of 2 seeds" in said


def test_a_run_stops_where_that_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=f"seed 1, member 0 diverged at {SEEN} agent steps"):
        run(tmp_path, poison=monkeypatch, how="error")
