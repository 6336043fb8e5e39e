"""Videos of a run: which episodes are played, what panels show, and the file that is written."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from options import encoder

import cerl
from cerl import video
from cerl.config import CatchEnv, ConfigError, evaluated, load, memory_tasks
from cerl.config.envs import AtariEnv, DmcEnv, MemoryEnv, MinAtarEnv
from cerl.envs import make_resident
from cerl.evaluate_run import evaluate_run
from cerl.nets.rings import FoxCarry
from cerl.policy import of_seed
from cerl.record.folder import FILE, load_file
from cerl.video import film, names, pictures, scene
from cerl.video.frame import MARGIN, PICTURE, TITLE, WIDTH
from cerl.video.play import Cast, Judge

SMALL = {
    **{"device": "cpu", "seeds": (3, 5), "net.hidden": (16,), "env.envs": 2},
    **{"replay.start": 40, "replay.batch": 8, "schedule.steps": 160, "explore.hold": 20},
    **{"explore.decay": 40, "eval.every": 160, "eval.episodes": 1, "eval.time_limit": 20},
    "log.every": 80,
}
SEQUENCE = {"width": 16, "heads": 2, "layers": 1, "context": 2, "learnt": 4}
RUNS = {
    "catch": ("catch/cerl", {"ensemble.members": 3, "env.rows": 6, "env.columns": 5}),
    "minatar": ("minatar/cerl", {"ensemble.members": 5, "env.name": "breakout"}),
    "fox": ("catch/cerl", {"ensemble.members": 3, "encoder": encoder("fox", **SEQUENCE)}),
    "mass": ("point_mass/ensemble", {"ensemble.members": 3, "eval.share": False}),
}
LOOKS = 16  # of a colour's 256 levels, by which the lossy file may differ from the frame


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a run of `RUNS` once; returns its folder."""
    folders = {}

    def trained(name):
        if name not in folders:
            preset, options = RUNS[name]
            drop = {"explore.hold", "explore.decay"} if name == "mass" else set()
            small = {key: value for key, value in SMALL.items() if key not in drop}
            out = str(tmp_path_factory.mktemp(name))
            folders[name] = cerl.train(preset, {**small, **options, "out": out})
        return folders[name]

    return trained


@pytest.fixture
def frames(monkeypatch):
    """The frames of a video, without a file: a function with the arguments of `video.main`."""
    taken = []

    def write(path, pictures, *, size, fps):
        taken[:] = [picture.copy() for picture in pictures]
        assert all(picture.shape == (size[1], size[0], 3) for picture in taken)

    monkeypatch.setattr(film, "codec", lambda: None)
    monkeypatch.setattr(film, "write", write)

    def filmed(*args, **options):
        video.main(*args, **options)
        return taken

    return filmed


def decoded(path):
    """The frames of a file, [frames, H, W, 3] uint8."""
    codec = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [codec, "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    (size,) = set(re.findall(r"Video: h264.* (\d+)x(\d+)", done.stderr.decode()))
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, int(size[1]), int(size[0]), 3)


def test_the_file_holds_the_frames_and_is_the_same_every_time(run, frames, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    expected = list(frames(run("catch")))
    monkeypatch.undo()
    file = video.main(run("catch"), out=tmp_path / "a.mp4")
    found = decoded(file)
    # An episode of Catch on 6 rows has 5 agent steps, and so 6 observations.
    assert len(found) == len(expected) == 6
    for mine, drawn in zip(found, expected, strict=True):
        assert mine.shape == drawn.shape
        assert np.abs(mine.astype(float) - drawn).mean() < LOOKS
    # Four panels in two rows; the ball falls, so every panel's picture changes.
    assert found[0].shape[1] == 2 * WIDTH
    for left in (0, WIDTH):
        picture = np.s_[TITLE : TITLE + PICTURE, left + MARGIN : left + WIDTH - MARGIN]
        assert found[0][picture].std() > 5
        assert np.abs(found[0][picture].astype(float) - found[1][picture]).max() > 100
    again = video.main(run("catch"), out=tmp_path / "b.mp4")
    assert again.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("name", ["catch", "fox", "minatar", "mass"])
def test_panels_play_the_episodes_of_an_evaluation(run, frames, capsys, name):
    folder = run(name)
    aggregate = "mean" if name == "mass" else "vote"
    capsys.readouterr()
    frames(folder, members=[0], policy=aggregate, seed=5)
    told = dict(line.split(": return ") for line in capsys.readouterr().out.splitlines()[:-1])
    for title, policy in (("member 0", "individual"), (f"{aggregate} of", aggregate)):
        scores = evaluate_run(folder, policies=(policy,), episodes=1)[policy]
        (mine,) = [value for key, value in told.items() if key.startswith(title)]
        assert float(mine) == pytest.approx(float(scores.returns[1, 0, 0]), rel=1e-5)


def test_a_video_is_cut_after_so_many_frames_and_plays_so_many_episodes(run, frames, capsys):
    assert len(frames(run("minatar"), frames=4)) == 4
    assert capsys.readouterr().out.count("no episode ended") == 5  # four members and the vote
    played = frames(run("catch"), members=[1], policy="none", episodes=3)
    assert len(played) == 18 and played[0].shape[1] == WIDTH
    assert capsys.readouterr().out.splitlines()[-2].count(",") == 2  # three returns


def test_every_panel_begins_the_same_episode(run, frames):
    first = frames(run("minatar"), members=[0, 1], policy="vote")[0]
    panels = [first[TITLE : TITLE + PICTURE, k * WIDTH + MARGIN :][:, :280] for k in range(3)]
    assert all(np.array_equal(panels[0], other) for other in panels[1:])


def test_seeds_and_epsilon_change_the_video(run, frames):
    usual = frames(run("minatar"), frames=10)[-1]
    assert np.array_equal(usual, frames(run("minatar"), frames=10)[-1])
    assert not np.array_equal(usual, frames(run("minatar"), frames=10, seed=5)[-1])
    assert not np.array_equal(usual, frames(run("minatar"), frames=10, epsilon=1.0)[-1])


def test_forget_gates_are_those_of_the_first_layer(run, monkeypatch):
    """Gates that are read from the cache equal those that attention is given."""
    from cerl.nets import fox

    folder = run("fox")
    given, attend = [], fox.forgetting_attention_step

    def noting(q, k, v, log_f, cache, **options):
        given.append(log_f.exp().numpy())
        return attend(q, k, v, log_f, cache, **options)

    monkeypatch.setattr(fox, "forgetting_attention_step", noting)
    config = evaluated(load_file(folder / FILE), {"policies": ("vote",)})
    place = torch.device("cpu")
    shown = scene.Scene(config, seed=3, device=place)
    parts = of_seed(config, folder, seed=3, spec=shown.spec, device=place)
    judge = Judge(Cast(*parts), shown)
    step, seen = shown.restart(), 0
    ring = FoxCarry.of(list(judge._carry)).cache.k.shape[2]
    for _ in range(2 * ring + 3):  # the cache goes round more than once
        fresh = bool(judge._start.all())
        judge.values(step.obs[0, 0], 0.0)
        gates, attended = judge.gates(), given[-1]
        streams = np.arange(3) * (1 if len(attended) == 3 else 4)
        if fresh:
            assert np.isnan(gates).all()
        else:
            seen += 1
            assert np.abs(gates - attended[streams]).max() < 1e-6
        judge.took(torch.tensor(1))
        if step.terminated.any():
            judge.reset()
        step = shown.step(torch.tensor(1))
    assert seen > ring


def test_a_board_shows_each_plane_in_its_colour():
    cells = np.zeros((2, 4, 4), bool)
    cells[0, 0, 0] = cells[1, 3, 2] = True
    image = np.asarray(pictures.Board(cells).paint(80, 80))
    for (row, column), plane in (((0, 0), 0), ((3, 2), 1)):
        colour = tuple(int(pictures.PLANES[plane][k : k + 2], 16) for k in (1, 3, 5))
        assert tuple(image[20 * row + 10, 20 * column + 10]) == colour
    assert image[30, 30].max() < 40  # an empty cell is dark


def test_bars_grow_with_the_numbers_and_bear_what_is_not_finite():
    values = np.array([0.5, -1.0, np.nan], np.float32)
    bars = pictures.Vector(values, ("a", "b", "c"), np.ones(3), flags=False)
    blue = (np.asarray(bars.paint(300, 200)) == [0x56, 0xB4, 0xE9]).all(-1)
    lengths = [int(blue[y].sum()) for y in (75, 101, 127)]  # the middles of three lines of 26
    assert lengths[0] > 0 and lengths[1] == pytest.approx(2 * lengths[0], abs=3)
    assert lengths[2] <= 1


def test_names_are_as_many_as_planes_components_and_actions():
    for game, planes in names.PLANES.items():
        rules = import_module(f"cerl.envs.minatar.{game}")
        assert len(planes) == rules.CHANNELS <= len(pictures.PLANES)
        assert names.MINIMAL[game] == rules.MINIMAL
        env = MinAtarEnv.model_validate({"name": game})
        assert len(names.actions(env, len(rules.MINIMAL))) == len(rules.MINIMAL)
    assert names.actions(CatchEnv(), 3) == ("left", "stay", "right")
    unnamed = {"Concentration"}
    for task in memory_tasks.TASKS:
        env = MemoryEnv(name=task)
        spec = make_resident(env, seeds=(0,), salt=0, device="cpu").spec
        found = names.components(env, spec.observation[0])
        assert len(found) == spec.observation[0]
        numbers = found == tuple(str(k) for k in range(len(found)))
        assert numbers == any(task.startswith(name) for name in unnamed), task


def test_simulators_that_cannot_draw_are_replaced_by_others_of_the_same_task():
    robot = load("mujoco/cerl", {"env.name": "Hopper-v4", "env.observe.noise": 0.1}).env
    drawn = scene.drawable(robot)
    assert (drawn.family, drawn.name) == ("gym", "Hopper-v4")
    assert drawn.observe == robot.observe
    suite = scene.drawable(load("dmc/cerl", {"env.backend": "envpool"}).env)
    assert isinstance(suite, DmcEnv) and suite.backend == "dm_control"
    catch = load("catch/cerl").env
    assert scene.drawable(catch) is catch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, r"--seed: expected one of \[3, 5\], got 4"),
        ({"members": [3]}, "--members: expected 0 to 2, got 3"),
        ({"members": [1, 1]}, "--members: expected different numbers"),
        ({"policy": "votes"}, "--policy: expected vote, mean, mean_mode or none, got 'votes'"),
        ({"policy": "none", "members": []}, "expected members or a policy"),
        ({"frames": 0}, "--frames: expected 1 or more, got 0"),
        ({"out": Path("film.gif")}, "--out: expected a name that ends in .mp4, got 'film.gif'"),
        ({"out": Path("nowhere/film.mp4")}, "--out: expected a folder that exists, got nowhere"),
        ({"epsilon": 2.0}, "epsilon"),
    ],
)
def test_what_cannot_be_filmed_is_refused(run, frames, options, message):
    with pytest.raises(ConfigError, match=message):
        frames(run("catch"), **options)


def test_without_the_codec_the_message_names_the_command(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install 'cerl\[video\]'"):
        video.main(run("catch"), out=tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_a_video_that_fails_leaves_the_old_file(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    old = tmp_path / "film.mp4"
    old.write_bytes(b"old")

    def failing():
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("the simulator failed")

    with pytest.raises(RuntimeError, match="the simulator failed"):
        film.write(old, failing(), size=(32, 32), fps=5)
    assert old.read_bytes() == b"old" and [*tmp_path.iterdir()] == [old]


@pytest.mark.slow
def test_without_a_renderer_the_message_says_what_to_install(monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(RuntimeError, match=r"Hopper-v4: MuJoCo has no renderer.*libosmesa6"):
        scene.find_renderer.__wrapped__("Hopper-v4")
    assert os.environ["MUJOCO_GL"] == "disabled"


def test_the_second_emulator_plays_the_same_game_in_colour():
    pytest.importorskip("ale_py")
    from cerl.envs.atari import Atari

    config = load("atari/cerl", {"env.name": "Breakout", "env.sticky": 0.25}).env
    assert isinstance(config, AtariEnv)
    config = config.for_evaluation(1)
    options = {"seeds": (7,), "salt": 1, "device": "cpu", "longest": 40}
    grey, colour = Atari(config, **options), Atari(config, **options, colour=True)
    first, second = grey.restart(0), colour.restart(0)
    for time in range(90):  # beyond two cuts at 40 agent steps
        assert second.obs.shape == (1, 1, 210, 160, 3)
        for mine, other in zip(first[1:], second[1:], strict=True):
            assert torch.equal(mine, other)
        # The screens show the same: luminance of the large one, averaged to the small one.
        light = second.obs[0, 0].double() @ torch.tensor([0.299, 0.587, 0.114]).double()
        small = torch.nn.functional.interpolate(light[None, None], (84, 84), mode="area")[0, 0]
        assert (small - first.obs[0, 0]).abs().mean() < 2.0
        action = torch.tensor([[(1, 2, 3)[time % 3]]])
        first, second = grey.step(action), colour.step(action)
    grey.close()
    colour.close()
