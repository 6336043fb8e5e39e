"""`cerl bench checkpoint`: what saving replay costs a run, on this machine's device and disk.

No agent trains: the write head of a full replay ring is moved instead, so that new rows appear at
any rate asked for. The rows are noise, which cannot be compressed, or frames, a still picture in
which one bar moves.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from cerl import draw
from cerl.bench import runs
from cerl.bench.clock import device_name, once
from cerl.bench.table import Output, Row, Rows, Table
from cerl.config import AtariEnv, Config, load
from cerl.data import EnvSpec
from cerl.device.pick import prepare
from cerl.envs import make
from cerl.learn import Learner
from cerl.record import checkpoint as checkpoints
from cerl.record import pieces
from cerl.replay import fill_randomly


def checkpoint(
    *,
    preset: str = "atari/paper-ddqn",
    capacity: int = 100_000,
    seeds: int = 1,
    placement: Literal["device", "host"] = "device",
    content: tuple[Literal["frames", "noise"], ...] = ("frames", "noise"),
    pace: tuple[float, ...] = (0.0, 50.0),
    megabytes: float = 2_000.0,
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("."),
    device: str = "auto",
    output: Output = Output(),
) -> Rows:
    """Times writing rows of replay during training, and saving and loading a checkpoint.

    Args:
        preset: the preset whose rows, networks and optimisers are saved
        capacity: rows of the replay, per seed
        seeds: number of seeds, S
        placement: where replay is kept
        content: observations: frames (compressible as those of games) or noise (incompressible)
        pace: MB of new rows a second; 0: as fast as they can be written
        megabytes: MB of new rows in all, at each pace
        folder: a folder on the disk that is measured; the files written are deleted
        device: cpu, cuda or auto
    """
    changes = {
        "device": device,
        "seeds": runs.first_seeds(seeds),
        "replay": {"capacity": capacity, "placement": placement},
    }
    config = load(preset, changes)
    place = prepare(config)
    learner = runs.filled_learner(config, _spec(config, place), place)
    title = f"checkpoints of {preset}, S {seeds}, {capacity:,} rows, replay on the {placement},"
    table = Table("checkpoint", output, device=device_name(place), title=title)
    head: Row = {"preset": preset, "S": seeds, "rows": capacity, "replay": placement}
    for what in content:
        if what == "frames":
            _draw_frames(learner.replay.obs)
        else:
            fill_randomly(learner.replay, _spec(config, place), config.ensemble.members)
        for rate in pace:
            with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as place_:
                measured = _measured(learner, Path(place_), rate, megabytes)
                table.add(head | {"what": what} | measured)
    return table.finished()


def _spec(config: Config, device: torch.device) -> EnvSpec:
    """The spec of a config's environments; Atari's is written down, so that no ROM is needed."""
    if isinstance(config.env, AtariEnv):
        return EnvSpec("atari", (84, 84), torch.uint8, 18, config.env.envs, 4, False, False)
    env = make(config.env, seeds=config.seeds, salt=0, device=device)
    env.close()
    return env.spec


def _draw_frames(obs: Tensor) -> None:
    """Fills observations with one still picture in which a bar moves.

    Args: obs [S, R, E, ...], all rows of a replay. The bar is an eighth of a row's numbers.
    """
    key = draw.seed_keys((0,), device=obs.device)
    zero = torch.zeros((), dtype=torch.int64, device=obs.device)
    flat = obs.flatten(3) if obs.dim() > 3 else obs.unsqueeze(-1)  # [S, R, E, D]
    size = flat.shape[-1]
    picture = draw.uniform(key, draw.ACTION, zero, (size,))[0]
    still = (picture * 255).to(obs.dtype) if obs.dtype == torch.uint8 else picture.round()
    flat.copy_(still.to(obs.dtype))
    span = max(1, size // 8)
    for row in range(flat.shape[1]):
        start = row * 7 % max(1, size - span)
        flat[:, row, :, start : start + span] = 1


def _measured(learner: Learner, folder: Path, pace: float, megabytes: float) -> Row:
    """Measures all columns of one row of the table. Args: as of `checkpoint`."""
    replay, state = learner.replay, {"learner": learner.state_dict()}
    store = checkpoints.Checkpoints(folder, replay)
    assert store.spool is not None
    replay.total.fill_(replay.rows)
    store.save(state)  # writes the rows of the full ring, so that only new rows are timed below
    width = store.spool.width
    steps = int(megabytes * 1e6 / width)
    begin, slept, spent = time.perf_counter(), 0.0, []
    for step in range(steps):
        replay.total += 1
        before = time.perf_counter()
        store.stream()
        after = time.perf_counter()
        spent.append(after - before)
        ahead = step * width / (pace * 1e6) - (after - begin) if pace else 0.0
        if ahead > 0.01:
            time.sleep(ahead)
            slept += ahead
    seconds = time.perf_counter() - begin
    file, saving = once(lambda: store.save(state), replay.total.device)
    names = store.spool.names
    packed = sum((folder / pieces.FOLDER / name).stat().st_size for name in names)
    checking = time.perf_counter()
    loaded = checkpoints.newest(folder)
    checking = time.perf_counter() - checking
    _, loading = once(lambda: store.restore(loaded), replay.total.device)
    store.close()
    return {
        "pace MB/s": f"{pace:g}" if pace else "none",
        "ring MB": replay.rows * width / 1e6,
        "on disk MB": packed / 1e6,
        "streamed MB/s": steps * width / 1e6 / seconds,
        "pause max ms": 1e3 * max(spent),
        "pause %": 100 * sum(spent) / seconds,
        "call us": 1e6 * sorted(spent)[len(spent) // 2],
        "save ms": 1e3 * saving,
        "file MB": file.stat().st_size / 1e6,
        "check ms": 1e3 * checking,
        "load ms": 1e3 * loading,
    }
