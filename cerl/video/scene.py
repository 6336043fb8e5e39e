"""The one environment that a panel of a video shows: played by a policy, and drawn for people.

Simulators that cannot draw are replaced by those that can and play the same task: EnvPool's robots
by gymnasium's, EnvPool's suite by the dm-control package, EnvPool's Atari games by ale-py's. Their
episodes start differently from those of the run's evaluations.
"""

import os
import subprocess
import sys
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cerl import envs
from cerl.config import (
    AtariEnv,
    Config,
    DmcEnv,
    EnvConfig,
    GymEnv,
    MujocoEnv,
    ObserveConfig,
    PopgymEnv,
)
from cerl.data import EnvSpec, Step
from cerl.evaluate import EVAL_SALT
from cerl.video import names
from cerl.video.pictures import Board, Drawing, Photo, Vector

SIZE = (240, 320)  # height and width at which simulators draw, pixels
INSTALL = (
    "install EGL (apt install libegl1, with a GPU's driver or Mesa) or OSMesa (apt install "
    "libosmesa6) and leave MUJOCO_GL unset, or set it to egl or osmesa"
)
# Draws one picture. It runs in a process of its own, because a process in which one renderer
# failed cannot load another one.
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody/></mujoco>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
    print("drawn", flush=True)
"""


def drawable(env: EnvConfig) -> EnvConfig:
    """The options of an environment that plays the same task and can be drawn."""
    common = {"observe": env.observe, "envs": 1}
    if isinstance(env, MujocoEnv):
        return GymEnv(
            name=env.name,
            kwargs=(("render_mode", "rgb_array"),),
            time_limit=env.time_limit,
            diverged=env.diverged,
            **common,
        )
    if isinstance(env, GymEnv):
        given = dict(env.kwargs)
        if "render_mode" in given or "rgb_array" not in _render_modes(env.name):
            return env
        kwargs = tuple(sorted({**given, "render_mode": "rgb_array"}.items()))
        return env.model_copy(update={"kwargs": kwargs})
    if isinstance(env, DmcEnv):
        return env.model_copy(update={"backend": "dm_control"})
    if isinstance(env, AtariEnv):
        return env.model_copy(update={"backend": "ale"})
    if isinstance(env, PopgymEnv):
        return env.model_copy(update={"backend": "resident"})
    return env


def _in_mujoco(env: EnvConfig) -> bool:
    """Whether the task is one of gymnasium's own robots."""
    import gymnasium

    if not isinstance(env, GymEnv):
        return False
    known = gymnasium.registry.get(env.name)
    return known is not None and str(known.entry_point).startswith("gymnasium.envs.mujoco")


def _render_modes(name: str) -> list[str]:
    """The render modes that a gymnasium id says it has; [] where it says none."""
    import gymnasium

    from cerl.own_code import import_module

    module, _, task = name.rpartition(":")
    if module:
        import_module(module, key="env.name")
    try:
        entry = gymnasium.spec(task).entry_point
    except gymnasium.error.Error:
        return []  # making the environment raises the error that names the task
    if isinstance(entry, str):
        from gymnasium.envs.registration import load_env_creator

        try:
            entry = load_env_creator(entry)
        except ImportError:
            return []
    return list(getattr(entry, "metadata", {}).get("render_modes", []))


@cache
def find_renderer(name: str) -> None:
    """Chooses the renderer of MuJoCo for this process, by the variable MUJOCO_GL.

    Args:    name of the task, for the message.
    Raises:  RuntimeError where none can draw; the message says what to install.
    """
    asked = os.environ.get("MUJOCO_GL")
    tried = [asked] if asked else ["egl", "osmesa"]
    if sys.platform != "linux" and not asked:
        return  # the system's own renderer
    for renderer in tried:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, "MUJOCO_GL": renderer, "PYOPENGL_PLATFORM": renderer},
            capture_output=True,
            text=True,
        )
        # Some drivers draw, and fail only when the process ends.
        if "drawn" in done.stdout:
            os.environ["MUJOCO_GL"] = renderer
            return
        if "No module named 'mujoco'" in done.stderr:
            raise RuntimeError(
                f"video of {name}: drawing needs mujoco: pip install 'cerl[dmc]' "
                "(gymnasium's robots: pip install 'gymnasium[mujoco]')"
            )
    raise RuntimeError(
        f"video of {name}: MuJoCo has no renderer that works here (tried {' and '.join(tried)}); "
        f"{INSTALL}"
    )


class Scene:
    """A task with one environment, which `play` steps and `picture` draws.

    Args:    config of the run; seed, the user's number; device where observations arrive.
    Raises:  RuntimeError without a renderer where one is needed; errors of `envs.make`.
    """

    def __init__(self, config: Config, *, seed: int, device: torch.device) -> None:
        self.config = env = drawable(config.env).for_evaluation(1)
        if isinstance(config.env, MujocoEnv | DmcEnv) or _in_mujoco(env):
            find_renderer(env.name)
        options: dict[str, Any] = {"seeds": (seed,), "salt": EVAL_SALT, "device": device}
        longest = config.eval.time_limit
        bare = env.model_copy(update={"observe": ObserveConfig()})
        with warnings.catch_warnings():
            # gymnasium recommends newer versions of its tasks; the run was trained on this one.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._bare: Any = envs.make(bare, **options, longest=longest)
        self._env = envs.observed(self._bare, env, **options)
        # A second emulator plays the same game and shows it in colour.
        self._colour: Any = None
        if isinstance(bare, AtariEnv):
            from cerl.envs.atari import Atari

            self._colour = Atari(bare, **options, longest=longest, colour=True)
        self._shown: Tensor | None = None  # the last picture of the second emulator
        self._draws = (isinstance(env, GymEnv) and "render_mode" in dict(env.kwargs)) or (
            isinstance(env, DmcEnv)
        )
        if self._draws:
            self._check_drawing()

    def _check_drawing(self) -> None:
        """Draws one picture. Raises: RuntimeError that says what is missing."""
        try:
            self.restart()
            self._rendered()
        # The drawing code of a task may raise any error, and OpenGL's errors have no common class.
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"video of {self.config.name}: the simulator cannot draw itself ({error}); install "
                "what it names, or where OpenGL is missing: " + INSTALL
            ) from error

    @property
    def spec(self) -> EnvSpec:
        """What an observation and an action are."""
        return self._env.spec

    @property
    def actions(self) -> tuple[str, ...]:
        """What the discrete actions are called; () where actions are continuous."""
        if self.spec.continuous:
            return ()
        if isinstance(self.config, AtariEnv):
            return self._bare.meanings
        return names.actions(self.config, self.spec.actions)

    def restart(self) -> Step:
        """Starts the first episode, always the same one."""
        if self._colour is not None:
            self._shown = self._colour.restart(0).obs
        return self._env.restart(0)

    def step(self, action: Tensor) -> Step:
        """One agent step. Args: action [] int64 or [A] float32."""
        action = action.reshape(1, 1, *action.shape)
        if self._colour is not None:
            self._shown = self._colour.step(action).obs
        return self._env.step(action)

    def drawing(self, obs: np.ndarray, *, limit: np.ndarray) -> Drawing:
        """How people see the environment as it stands.

        Args: obs, its observation, as the agent sees it; limit, the largest size of each component
              in the whole video, where an observation is a vector.
        """
        env = self.config
        if self._shown is not None or self._draws:
            if self._shown is not None:
                pixels = self._shown[0, 0].cpu().numpy()
            else:
                pixels = self._rendered()
            dark = env.observe.flicker > 0 and not obs.any()
            return Photo(pixels // 4 if dark else pixels)
        if obs.ndim == 1:
            return Vector(obs, names.components(env, len(obs)), limit, flags=obs.dtype == bool)
        if obs.dtype == bool and obs.ndim == 3:
            return Board(obs)
        if obs.dtype == np.uint8:
            grey = obs.ndim == 2
            channels = obs if grey or obs.shape[-1] == 3 else obs.transpose(1, 2, 0)
            if grey or channels.shape[-1] == 3:
                return Photo(np.repeat(channels[..., None], 3, 2) if grey else channels)
        return Board(np.asarray(obs > 0).reshape(-1, *obs.shape[-2:]))

    def _rendered(self) -> np.ndarray:
        """What the simulator draws, [H, W, 3] uint8."""
        return (
            self._bare.picture(*SIZE) if isinstance(self.config, DmcEnv) else self._bare.picture()
        )

    def close(self) -> None:
        """Frees the simulators."""
        for env in (self._env, self._colour):
            if env is not None:
                env.close()
