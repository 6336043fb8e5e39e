"""The estimate of a run's memory: compared with its real parts, made for every preset, refusals."""

import gc

import pytest
import torch

from cerl import training, wiring
from cerl.config import Config, load, preset
from cerl.device import free
from cerl.device.pick import prepare
from cerl.diagnose import diagnose
from cerl.footprint.estimate import (
    BEYOND,
    HOST,
    Needs,
    Part,
    _sizes,
    estimate,
    explained,
    explaining,
    refusal,
)

CPU = torch.device("cpu")
SMALL = {"replay.capacity": 2_000, "replay.start": 1_000}


def needs(config: Config, **options) -> Needs:
    return estimate(config, device=CPU, agent=wiring.make_agent, **options)


def sizes(found: Needs) -> dict[str, int]:
    return {part.name: part.size for part in found.parts}


@pytest.mark.parametrize("name", ["catch/cerl", "minatar/qrdqn", "memory/fox", "point_mass/cerl"])
def test_what_a_run_keeps_is_what_its_parts_hold(name):
    cache = {"encoder.cache": 30} if name == "memory/fox" else {}
    config = load(name, {**SMALL, "device": "cpu", "seeds": (0, 1), **cache})
    found, parts = sizes(needs(config)), wiring.assemble(config)
    rings = parts.replay.state_dict().values()
    assert found["replay"] == sum(ring.nbytes for ring in rings)
    net = sum(leaf.nbytes for leaf in parts.learner.net.state_dict().values())
    assert 0 <= found["networks"] - net < 0.1 * net + 10_000  # and what heads regress to
    optimisers = [one for stage in parts.learner.optimisers for one in stage]
    moments = [moment for one in optimisers for moment in (*one.first, *one.second)]
    moments += parts.learner.target.parameters()
    kept = sum(moment.nbytes for moment in moments)
    assert 0 <= found["optimiser"] - kept < 10_000
    carried = sum(part.nbytes for part in parts.collector.player.carry)
    assert 0 <= found["acting"] - carried < 0.2 * carried + 20_000
    wiring.close(parts)


EVERY_KIND = (
    *("atari/paper-cerl", "atari/flicker-transformer", "catch/flicker-fox-cerl", "dmc/sac"),
    *("gym/pendulum", "memory/gru", "minatar/mico", "minatar/multi-horizon", "mujoco/sunrise"),
    *("popgym/sac-fox", "point_mass/tandem"),
)


def has_an_estimate(name: str, kind: str) -> None:
    package = {"atari": "ale_py", "mujoco": "envpool", "dmc": "envpool"}.get(name.split("/")[0])
    if package:
        pytest.importorskip(package)
    found = estimate(load(name), device=torch.device(kind), agent=wiring.make_agent)
    parts = {part.name: part for part in found.parts if part.name != "environments"}
    assert set(parts) >= {"networks", "replay", "optimiser", "acting", "evaluation"}
    assert all(0 < part.size < 10**12 and part.place == kind for part in parts.values())


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("kind", ["cpu", "cuda:0"])
def test_every_kind_of_run_has_an_estimate(name, kind):
    has_an_estimate(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", preset.presets())
def test_every_preset_has_an_estimate(name):
    has_an_estimate(name, "cpu")
    has_an_estimate(name, "cuda:0")


def test_long_windows_of_recurrent_units_are_judged_by_short_ones():
    options = {"device": "cpu", "encoder.sampling": "uniform", "env.length": 120}
    config = load("memory/gru", options)
    longer = config.encoder.model_copy(update={"learnt": 24})
    config = config.model_copy(update={"encoder": longer})
    told = needs(config)
    exact = _sizes(config, None, kind="cpu", agent=wiring.make_agent, evaluating=False)
    assert sizes(told)["batches"] == pytest.approx(exact["batches"], rel=0.02)
    assert sizes(told)["networks"] == exact["networks"]


def test_rows_in_host_memory_and_simulators_count_on_the_host():
    config = load("gym/cartpole", {"replay.placement": "host", "env.envs": 4})
    found = estimate(config, device=torch.device("cuda:0"), agent=wiring.make_agent)
    places = {(part.name, part.place) for part in found.parts}
    assert {("replay", HOST), ("environments", HOST), ("networks", "cuda:0")} <= places
    assert ("replay", "cuda:0") not in places
    assert found.total().keys() == {HOST, "cuda:0"}


def test_an_evaluation_alone_needs_networks_and_its_lanes():
    few, many = (
        sizes(needs(load("catch/cerl", {"eval.episodes": n}), evaluating=True))
        for n in (1_000, 10_000)
    )
    assert set(few) == set(many) == {"networks", "evaluation"}
    assert 5 < many["evaluation"] / few["evaluation"] < 20


HUGE = {
    "rows": ("minatar/ddqn", {"replay.capacity": 10**8}, "replay", "the number of seeds (5)"),
    "members": ("catch/cerl", {"ensemble.members": 10_000}, "evaluation", "ensemble.members"),
    "more members": ("catch/cerl", {"ensemble.members": 10**6}, "evaluation", "ensemble.members"),
    "hidden": ("catch/ddqn", {"net.hidden": (10**5, 10**5)}, "networks", "net.hidden"),
    "critics": ("point_mass/sac", {"agent.critics": 10**7}, "networks", "agent.critics"),
    "quantiles": ("minatar/qrdqn", {"agent.quantiles": 10**9}, "batches", "agent.quantiles"),
    "episodes": ("catch/ddqn", {"eval.episodes": 10**8}, "evaluation", "eval.episodes"),
    "batch": ("catch/ddqn", {"replay.batch": 10**11}, "batches", "replay.batch"),
    "candidates": ("catch/ddqn", {"replay.candidates": 10**9}, "batches", "replay.candidates"),
    "board": ("catch/ddqn", {"env.rows": 10**6, "env.columns": 10**6}, "replay", "env.rows"),
    "width": (
        *("memory/fox", {"encoder.width": 65_536, "encoder.heads": 512}),
        *("batches", "encoder.width"),
    ),
    "environments": (
        "catch/ddqn",
        {
            "env.envs": 10**7,
            "replay": {"capacity": 10**8, "start": 10**8},
            "schedule.steps": 10**9,
        },
        "acting",
        "env.envs",
    ),
}


@pytest.mark.parametrize(("name", "options", "part", "culprit"), HUGE.values(), ids=HUGE)
def test_what_cannot_fit_is_refused_with_its_option_before_anything_is_allocated(
    name, options, part, culprit, monkeypatch
):
    config = load(name, {**options, "device": "cpu"})
    limit = free.Limit(20 * 10**9, free.MACHINE)
    monkeypatch.setattr(free, "free_bytes", lambda device, root: [limit])
    monkeypatch.setattr(wiring, "draw", None)  # with which making the parts begins
    with pytest.raises(RuntimeError, match=f"Most goes to {part}") as error:
        training.train(config)
    text = str(error.value)
    assert culprit in text.split("Most goes")[1]
    assert "20.0 GB are free on cpu" in text and "make one of them smaller" in text


def test_a_size_that_no_integer_counts_is_told_too():
    found = needs(load("minatar/qrdqn", {"agent.quantiles": 10**15}))
    assert found.total()[HOST] >= BEYOND
    assert "more than a 64-bit number of bytes" in refusal(found, HOST, free=10**9)


def test_words_of_needs():
    config = load("atari/cerl", {"seeds": (0, 1)})
    million = 10**6
    parts = (
        Part("networks", "cpu", 600 * million),
        Part("replay", "cpu", 7_100 * million),
        Part("acting", "cpu", million),
        Part("replay", "cuda:1", 5 * million),
    )
    found = Needs(parts, config)
    assert found.listed("cpu") == "7.7 GB: replay 7.1, networks 0.6"
    assert found.listed("cuda:1") == "5.0 MB: replay 5.0"
    text = refusal(found, "cpu", free=2 * 10**9, reserved=3 * 10**9)
    assert "2.0 GB are free on cpu (3.0 GB more are reserved by other runs)" in text
    culprits = "replay.capacity (1000000), the number of seeds (2)"
    assert text.endswith(f"{culprits}: make one of them smaller")
    assert "replay.placement to host" in refusal(found, "cuda:1", free=1)


def test_an_allocators_words_are_never_shown():
    found = needs(load("catch/ddqn", {"device": "cpu"}))
    refused = pytest.raises(RuntimeError, match=r"did not succeed on cpu.*replay\.capacity")
    with refused as error, explaining(found):
        torch.empty(2**60, dtype=torch.uint8)
    assert "Allocator" not in str(error.value)
    with pytest.raises(RuntimeError, match="^another$"), explaining(found):
        raise RuntimeError("another")
    assert explained(ValueError("x"), None) is None
    on_gpu = Needs((Part("replay", "cuda:0", 5), Part("environments", "cpu", 5)), found.config)
    told = explained(torch.OutOfMemoryError("CUDA out of memory"), on_gpu)
    assert "on cuda:0" in str(told)
    assert "smaller replay.capacity" in str(explained(MemoryError(), None))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["minatar/cerl", "memory/fox-tandem", "point_mass/cerl"])
def test_a_gpu_takes_about_as_much_as_was_told(name):
    config = load(name, {"replay.batch": 128, "replay.start": 1_000, "device": "cuda"})
    device = prepare(config)
    told = estimate(config, device=device, agent=wiring.make_agent).total()
    gc.collect()  # what earlier tests left in circles must not be freed in between
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    parts = wiring.assemble(config)
    for _ in range(-(-config.replay.start // config.env.envs)):
        parts.collector.step()
    for _ in range(3):
        parts.learner.update()
    diagnose(parts.learner.agent, parts.learner)
    parts.evaluator.player.step()
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    assert 0.4 * told[f"cuda:{torch.cuda.current_device()}"] < taken
    assert taken < 1.6 * told[f"cuda:{torch.cuda.current_device()}"] + 64e6
    wiring.close(parts)
