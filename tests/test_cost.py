"""What runs will cost: memory that is shared soundly, disk, hours, seeds that fit, the dry run."""

import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from cerl import training
from cerl.config import Config, load
from cerl.footprint.estimate import HOST, estimate
from cerl.record.folder import FILE, dump
from cerl.record.results import config_hash, env_name
from cerl.sweep import cost
from cerl.sweep.cost import CONTEXT, Cost, Memory, estimates, fitting_seeds
from cerl.sweep.dry import dry
from cerl.sweep.plan import PlannedRun
from cerl.sweep.speed import Speed, measured
from cerl.sweep.state import RunState, states
from cerl.wiring import make_agent

NAN = math.nan


class Asked(NamedTuple):
    run: PlannedRun
    config: Config


def asked(name: str, number: int = 1, **changes: Any) -> Asked:
    options = {key.replace("__", "."): value for key, value in changes.items()}
    config = load(name, {"device": "cpu", **options})
    cell = config_hash(config)
    steps, title = config.schedule.steps, name.rpartition("/")[2]
    folder = f"{number:04d}-{title}"
    env = env_name(config)
    run = PlannedRun(number, folder, name, env, title, config.seeds, steps, cell, {})
    return Asked(run, config)


def own(config: Config, device: str) -> dict[tuple[str, str], int]:
    """The estimate of a config by itself."""
    parts = estimate(config, device=torch.device(device), agent=make_agent).parts
    return {(part.name, part.place): part.size for part in parts}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs whose memory was estimated, in a process that knows none yet."""
    found = []

    def count(config: Config, **options: Any) -> Any:
        found.append(config)
        return estimate(config, **options)

    monkeypatch.setattr(cost, "estimate", count)
    cost.shared_memory.cache_clear()
    return found


PRIORITISED = {"replay.sampler.name": "prioritised", "replay.capacity": 30_000}


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    "name, first, second",
    [
        ("minatar/cerl", {}, {"replay.capacity": 300_000, "optim.lr": 1e-3, "explore.decay": 10}),
        ("catch/flicker-fox-cerl", {}, {"replay.capacity": 3_000, "loss.gamma": 0.9}),
        ("point_mass/cerl", {}, {"replay.capacity": 70_000, "replay.start": 30, "optim.lr": 1e-3}),
        ("gym/pendulum", {}, {"replay.capacity": 30_000, "eval.every": 7_000}),
        ("memory/gru", {}, {"explore.hold": 7, "schedule.steps": 7_000, "seeds": (5, 6, 7, 8, 9)}),
        ("catch/bootdqn", {}, {"schedule.target_every": 7, "eval.time_limit": 7}),
        ("minatar/bootdqn", PRIORITISED, PRIORITISED | {"replay.capacity": 70_000}),
        ("minatar/bootdqn", {}, PRIORITISED),
    ],
)
def test_a_shared_estimate_is_that_of_each_config(name, first, second, device):
    memory = Memory(device.partition(":")[0])
    for changes in (first, second):
        config = load(name, changes)
        expected, got = own(config, device), memory.of(config)
        assert got.keys() == expected.keys()
        for part, size in expected.items():
            assert abs(got[part] - size) < 100, part  # bytes: a few counters do not grow


def test_few_estimates_do_for_many_configs(counted):
    runs = [
        asked("catch/cerl", replay__capacity=capacity, optim__lr=lr, ensemble__members=members)
        for capacity in (2_000, 4_000)
        for lr in (1e-3, 1e-4)
        for members in (2, 3)
    ]
    found = estimates(runs, Path("nowhere"), device="cpu")
    assert len(counted) == 2  # one for each number of members
    assert found[0].host < found[1].host < found[-1].host
    assert all(one.gpu == 0 and math.isnan(one.hours) and one.basis == "" for one in found)


def test_simulators_of_one_shape_share_an_estimate(counted):
    names = ("Ant-v4", "HalfCheetah-v4")
    pytest.importorskip("envpool")
    runs = [
        asked("mujoco/sac", env__name=name, replay__capacity=1_000 * number)
        for name in names
        for number in (20, 30)
    ]
    estimates(runs, Path("nowhere"), device="cpu")
    assert len(counted) == 2  # the two have other numbers of joints


def test_on_a_gpu_the_context_counts_and_simulators_are_on_the_host():
    pytest.importorskip("envpool")
    [found] = estimates([asked("mujoco/sac")], Path("nowhere"), device="cuda")
    parts = own(asked("mujoco/sac").config, "cuda:0")
    assert found.gpu == CONTEXT + sum(size for (_, at), size in parts.items() if at != HOST)
    assert found.host == sum(size for (_, at), size in parts.items() if at == HOST) > 0


@pytest.mark.parametrize(
    "name, changes",
    [
        ("catch/cerl", {"schedule.steps": 2_000, "eval.every": 1_000, "eval.episodes": 2}),
        ("point_mass/cerl", {"schedule.steps": 1_500, "replay.capacity": 1_200}),
        (
            "minatar/bootdqn",
            {"schedule.steps": 1_500, "replay.capacity": 4_000, "seeds": (0,)}
            | {"eval.every": 1_500, "eval.episodes": 1, "eval.time_limit": 50},
        ),
    ],
)
def test_the_disk_space_is_that_of_a_real_run(tmp_path, name, changes):
    config = load(name, {**changes, "device": "cpu", "out": str(tmp_path), "replay.start": 1_000})
    folder = training.train(config)
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    expected = cost.disk(config, Memory("cpu").of(config))
    assert 0.7 < expected / taken < 1.3, (expected, taken)


def test_hours_come_from_earlier_runs_with_the_same_options(tmp_path):
    small = {"schedule__steps": 1_500, "eval__every": 500}
    config = asked("catch/ddqn", **small).config.model_copy(update={"out": str(tmp_path)})
    begin = time.monotonic()
    training.train(config)
    spent = time.monotonic() - begin
    runs = [
        asked("catch/ddqn", **{**small, "schedule__steps": 150_000}),
        asked("catch/ddqn", **{**small, "seeds": (7, 8, 9, 10), "optim__lr": 0.1}),
        asked("catch/ddqn", **{**small, "seeds": (0,)}),
        asked("catch/bootdqn", **small),
    ]
    found = estimates(runs, tmp_path, device="cpu")
    assert 0.2 * spent < found[0].hours * 3600 / 100 < spent
    assert found[0].basis == "earlier runs"
    # Other seeds and another learning rate are as fast; another number of seeds may not be.
    assert found[1].hours == pytest.approx(found[0].hours / 100)
    assert [math.isnan(one.hours) for one in found[2:]] == [True, True]
    # A GPU is not as fast as the CPU that these were trained on.
    assert math.isnan(estimates(runs[:1], tmp_path, device="cuda")[0].hours)


def test_calibrating_measures_the_costliest_run_of_each_preset(tmp_path, monkeypatch):
    trained = []

    def fake(config: Config, *, device: str) -> Speed:
        trained.append((config.preset, config.ensemble.members, device))
        if config.preset == "catch/ddqn":
            raise RuntimeError("no memory")
        return Speed(10.0, 60.0)

    monkeypatch.setattr(cost, "measured", fake)
    options = {"schedule__steps": 72_000, "eval__every": 36_000}
    runs = [asked("catch/cerl", ensemble__members=members, **options) for members in (2, 5, 3)]
    notes = []
    found = estimates(
        [*runs, asked("catch/ddqn", **options)],
        tmp_path,
        device="cpu",
        calibrate=True,
        note=notes.append,
    )
    assert trained == [("catch/cerl", 5, "cpu"), ("catch/ddqn", 1, "cpu")]
    assert [one.basis for one in found] == ["at most", "measured", "at most", ""]
    # 72,000 steps at 10 a second are 2 hours; the two evaluations are 2 minutes.
    assert found[1].hours == pytest.approx(2 + 2 / 60)
    assert notes == ["catch/ddqn: its speed could not be measured: no memory"]


def test_a_measured_speed_is_that_of_training(tmp_path):
    config = load("catch/ddqn", {"device": "cpu", "out": str(tmp_path), "schedule.steps": 100_000})
    found = measured(config, device="cpu", seconds=3.0)
    assert found.evaluation > 0
    assert list(tmp_path.iterdir()) == []  # the run that was measured left nothing
    # The same part of a run, in this process: 1,000 steps beyond those before the first update.
    begun: list[float] = []
    short = load(
        "catch/ddqn",
        {"device": "cpu", "out": str(tmp_path), "replay.start": 200, "schedule.steps": 2_000}
        | {"eval.every": 1_000_000, "eval.episodes": 1},
    )
    begun.append(time.monotonic())
    training.train(short)
    rate = 2_000 / (time.monotonic() - begun[0])
    assert 0.3 < found.rate / rate < 6, (found, rate)  # starting a run takes a part of its time


def test_a_run_that_cannot_be_measured_says_why(tmp_path):
    config = load("catch/ddqn", {"replay.capacity": 10**15, "out": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"(?i)memory|alloc|bytes"):
        measured(config, device="cpu", seconds=1.0)


@pytest.mark.parametrize("share", [1, 3])
def test_the_most_seeds_that_fit_are_found(monkeypatch, share):
    config = load("catch/cerl", {"seeds": tuple(range(40))})

    def needed(count: int) -> int:
        return sum(own(config.model_copy(update={"seeds": config.seeds[:count]}), "cpu").values())

    room = share * needed(7) / cost.SHARE * 1.001
    monkeypatch.setattr(cost, "_room", lambda device: {True: room})
    assert fitting_seeds(config, device="cpu", share=share) == 7
    assert needed(7) <= cost.SHARE * room / share < needed(8)
    monkeypatch.setattr(cost, "_room", lambda device: {True: 1e15})
    assert fitting_seeds(config, device="cpu", share=share) == 40
    monkeypatch.setattr(cost, "_room", lambda device: {True: 1.0})
    assert (
        fitting_seeds(config, device="cpu", share=share) == 1
    )  # the run itself says what it needs


def test_a_gpu_too_small_for_all_seeds_gets_fewer(monkeypatch):
    config = load("atari/paper-bootdqn", {"seeds": (0, 1, 2, 3, 4), "env.name": "Pong"})
    pytest.importorskip("ale_py")
    monkeypatch.setattr(cost, "_room", lambda device: {True: 1e12, False: 24e9})
    assert fitting_seeds(config, device="cuda") == 2  # 7.5 GB each, most of it replay
    monkeypatch.setattr(cost, "_room", lambda device: {True: 1e12, False: 80e9})
    assert fitting_seeds(config, device="cuda") == 5


def test_the_memory_of_gpus_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '12288\\n81920\\n24576\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for visible, device, expected in (
        ("", "cuda", 12288),  # it may be any of them
        ("", "cuda:1", 81920),
        ("2,1", "cuda", 24576),
        ("2,1", "cuda:1", 81920),
    ):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        cost.gpu_memory.cache_clear()
        assert cost.gpu_memory(device) == expected * 2**20
    cost.gpu_memory.cache_clear()


def printed(runs: list[Asked], costs: list[Cost], *rest: Any, **options: Any) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(dry(runs, costs, *rest, **options))
    return capture.get()


def test_the_dry_run_shows_costs_and_what_is_there():
    runs = [asked("catch/ddqn", number) for number in (1, 2, 3)]
    costs = [Cost(0, 3 * 10**9, 2 * 10**6, hours, "earlier runs") for hours in (2.0, 4.0, NAN)]
    half = runs[1].run.steps // 2
    there = [
        RunState(runs[0].run, "done", runs[0].run.steps, runs[0].run.steps, 0.0, "", "", ""),
        RunState(runs[1].run, "stopped", half, runs[1].run.steps, NAN, "", "", ""),
    ]
    text = printed(runs, costs, there, at_once=2)
    first, second, third = text.splitlines()[1:4]
    assert first.split()[0] == "0001" and first.endswith("done") and "3.0 GB" in first
    assert "4.0 h" in second and second.endswith("stopped, 50%")
    assert third.split()[-2:] == ["-", "new"]
    assert "3 runs with 12 seeds in all (each with seeds 0..3 and 40,000 agent steps):" in text
    assert "1 done, 1 begun, 1 new; 6.0 MB on disk" in text
    assert "2.0 h one after the other, 2.0 h if 2 runs" in text  # half of 4 hours; nothing of 2
    assert "without 1 run whose" in text and "--calibrate" in text
    assert "GPU" not in text  # nobody needs one


def test_a_large_dry_run_has_a_line_for_each_name():
    runs = [asked("catch/ddqn")] * 50 + [asked("catch/cerl")] * 50
    costs = [Cost(10**9, 1, 10**9, hours, "at most") for hours in (*[1.0] * 50, *[2.0] * 50)]
    costs[0] = costs[0]._replace(gpu=5 * 10**9)
    lines = printed(runs, costs).splitlines()
    [line] = [line for line in lines if line.startswith("ddqn")]
    assert " 5.0 GB" in line and "50.0 GB" in line and "<= 60 min" in line
    assert len([line for line in lines if line.startswith(("ddqn", "cerl"))]) == 2
    assert any("6.2 days one after the other" in line for line in lines)


def test_states_of_a_folder_fit_the_dry_run(tmp_path):
    """The folder of a planned run names its line, whatever else is in the sweep's folder."""
    one = asked("catch/ddqn")
    (tmp_path / one.run.folder).mkdir()
    dump(one.config, tmp_path / one.run.folder / FILE)
    text = printed([one], estimates([one], tmp_path, device="cpu"), states(tmp_path))
    assert "waiting, 0%" in text
