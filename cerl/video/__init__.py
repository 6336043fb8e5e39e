"""Films a trained run: `cerl video RUN`. Members and the aggregate play side by side.

Every panel begins the same episode, with the random numbers of `cerl eval`. The episodes are played
twice: first to learn the range of all values and how long they take, then to draw them.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cerl.config import Config, ConfigError, evaluated
from cerl.config.options import INDIVIDUAL
from cerl.device.pick import pick
from cerl.evaluate import AGGREGATES, without_mode
from cerl.policy import of_seed
from cerl.record import trust
from cerl.record.folder import FILE, load_file
from cerl.record.screen import Screen
from cerl.video import film, names
from cerl.video.frame import Panel, Range, Style, compose
from cerl.video.pictures import Drawing
from cerl.video.play import Cast, Moment, Seat, moments
from cerl.video.scene import Scene

FIRST = 4  # members that are shown unless others are asked for


class Facts(NamedTuple):
    """What the first playing of the episodes tells."""

    values: Range
    limit: np.ndarray  # the largest size of every part of an observation
    heads: int  # attention heads with forget gates
    longest: int  # agent steps of the longest episode
    frames: int  # that the video will have
    returns: list[list[float]]  # of every seat's episodes that ended within the video


def main(
    run: str | os.PathLike[str],
    *,
    seed: int | None = None,
    members: Sequence[int] | None = None,
    policy: str | None = None,
    episodes: int = 1,
    frames: int = 1000,
    fps: int = 15,
    epsilon: float | None = None,
    device: str | None = None,
    out: Path | None = None,
    trusted: bool = False,
) -> Path:
    """Films the newest intact checkpoint of a run folder.

    Args:    seed, one of the run's seeds (None: the first); members, the numbers of those shown
             (None: the first four); policy, the aggregate beside them: vote, mean, mean_mode or
             none (None: the first aggregate that the run evaluates); episodes that each panel
             plays; frames, at most, one an agent step; fps, frames a second; epsilon, probability
             of a random action (None: as in the run's evaluations); device, cpu, cuda or cuda:N
             (None: that of the run's config); out, an mp4 file (None: video-seed-N.mp4 in the run
             folder); trusted, the run may import a module even if it is somebody else's.
    Returns: the file.
    Raises:  ConfigError, ValueError or CheckpointError as `cerl.policy.load`, for a number out of
             range, or another suffix than .mp4; ImportError where imageio-ffmpeg is missing;
             RuntimeError where the task needs a renderer and none works.
    """
    for name, value in (("episodes", episodes), ("frames", frames), ("fps", fps)):
        if value < 1:
            raise ConfigError(f"video --{name}: expected 1 or more, got {value}")
    folder = Path(run)
    config = load_file(folder / FILE)
    trust.check(config, folder, trusted=trusted)
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise ConfigError(f"video --seed: expected one of {list(config.seeds)}, got {seed}")
    seats = list(_seats(config, members=members, policy=policy))
    file = out or folder / f"video-seed-{seed}.mp4"
    if file.suffix != ".mp4":
        raise ConfigError(f"video --out: expected a name that ends in .mp4, got {file.name!r}")
    if not file.parent.is_dir():
        raise ConfigError(f"video --out: expected a folder that exists, got {file.parent}")
    chance = config.eval.epsilon if epsilon is None else float(epsilon)
    first = evaluated(config, {"policies": (seats[0].policy,), "epsilon": chance})
    film.codec()  # raises an error before anything slow if it is missing
    place = pick(device or config.device)
    scenes: list[Scene] = []
    try:
        for _ in seats:
            scenes.append(Scene(first, seed=seed, device=place))
        spec = scenes[0].spec
        cast = Cast(*of_seed(first, folder, seed=seed, spec=spec, device=place))
        facts = _facts(cast, seats, scenes, episodes=episodes, frames=frames)
        style = _style(cast, scenes[0], seats, facts, seed=seed)
        pictures = _pictures(cast, seats, scenes, facts, style, episodes=episodes)
        film.write(file, pictures, size=style.size, fps=fps)
    finally:
        for scene in scenes:
            scene.close()
    _tell(file, seats, facts)
    return file


def _seats(config: Config, *, members: Sequence[int] | None, policy: str | None) -> Iterator[Seat]:
    """Who plays, in the order of the panels."""
    count = config.ensemble.members
    chosen = range(min(count, FIRST)) if members is None else members
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"video --members: expected different numbers, got {list(chosen)}")
    played: Any = next((p for p in config.eval.policies if p in INDIVIDUAL), "individual")
    for member in chosen:
        if not 0 <= member < count:
            raise ConfigError(f"video --members: expected 0 to {count - 1}, got {member}")
        yield Seat(f"member {member}" if count > 1 else "agent", played, member)
    if policy is None:
        evaluates = (p for p in config.eval.policies if without_mode(p) in AGGREGATES)
        policy = next(evaluates, "none") if count > 1 else "none"
    if policy == "none":
        if not len(chosen):
            raise ConfigError("video: expected members or a policy to show, got neither")
        return
    if without_mode(policy) not in AGGREGATES:
        known = "vote, mean, mean_mode or none"
        raise ConfigError(f"video --policy: expected {known}, got {policy!r}")
    checked = evaluated(config, {"policies": (policy,)}).eval.policies[0]
    yield Seat(f"{policy} of {count} members", checked, 0)


def _takes(
    cast: Cast, seats: Sequence[Seat], scenes: Sequence[Scene], *, episodes: int
) -> Iterator[tuple[Moment | None, ...]]:
    """The moments of all seats, frame by frame; None where a seat's episodes are over."""
    pairs = zip(seats, scenes, strict=True)
    return zip_longest(*(moments(cast, seat, scene, episodes=episodes) for seat, scene in pairs))


def _facts(
    cast: Cast, seats: Sequence[Seat], scenes: Sequence[Scene], *, episodes: int, frames: int
) -> Facts:
    low, high, heads, longest, count = np.inf, -np.inf, 0, 0, 0
    limit: np.ndarray = np.zeros(())
    returns: list[list[float]] = [[] for _ in seats]
    for take in _takes(cast, seats, scenes, episodes=episodes):
        count += 1
        for own, moment in zip(returns, take, strict=True):
            if moment is None:
                continue
            finite = moment.values[np.isfinite(moment.values)]
            low, high = min(low, *finite, np.inf), max(high, *finite, -np.inf)
            heads, longest = len(moment.gates), max(longest, moment.step)
            limit = np.fmax(limit, np.abs(moment.obs.astype(np.float64)))
            if moment.over:
                own.append(moment.returned)
        if count == frames:
            break
    scale = Range(float(low), float(high)) if low <= high else Range(0.0, 0.0)
    limit = np.where(np.isfinite(limit) & (limit > 0), limit, 1.0)
    return Facts(scale, limit, heads, longest, count, returns)


def _style(cast: Cast, scene: Scene, seats: Sequence[Seat], facts: Facts, *, seed: int) -> Style:
    config = cast.config
    label = config.preset or "run"
    return Style(
        caption=f"{label}, {config.env.title}, seed {seed}",
        planes=names.planes(config.env),
        actions=scene.actions,
        values=facts.values,
        heads=facts.heads,
        longest=facts.longest,
        panels=len(seats),
    )


def _pictures(
    cast: Cast,
    seats: Sequence[Seat],
    scenes: Sequence[Scene],
    facts: Facts,
    style: Style,
    *,
    episodes: int,
) -> Iterator[np.ndarray]:
    """The frames of the video, [H, W, 3] uint8."""
    panels = [Panel(seat.title, style, episodes=episodes) for seat in seats]
    shown: list[Any] = [None] * len(seats)
    takes = _takes(cast, seats, scenes, episodes=episodes)
    for _, take in zip(range(facts.frames), takes, strict=False):
        for k, moment in enumerate(take):
            # A panel whose episodes are over keeps its last picture.
            if moment is not None:
                drawing: Drawing = scenes[k].drawing(moment.obs, limit=facts.limit)
                shown[k] = panels[k].paint(moment, drawing)
        yield compose(shown, style)


def _tell(file: Path, seats: Sequence[Seat], facts: Facts) -> None:
    screen = Screen()
    for seat, returns in zip(seats, facts.returns, strict=True):
        told = ", ".join(f"{value:,.6g}" for value in returns)
        screen.line(f"{seat.title}: {f'return {told}' if told else 'no episode ended'}")
    screen.line(f"{facts.frames:,} frames: {file}")
