"""dm_control's suite, simulated by EnvPool or by the dm-control package, which also renders pixels.

Source: Tassa et al. 2018 (arXiv:1801.00690). The name of a task is domain-task. The suite has no
terminals: an episode takes 1000 control steps, and its end is a truncation. EnvPool gives every
task of a domain the observation keys of all tasks of that domain. `KEPT` lists the keys that a task
has in dm_control, in dm_control's order, so that observations of both back ends hold the same
numbers in the same places. Differs: observations are float32 here and float64 in dm_control.

A simulator of the package is saved as two states: that of its random generator before the episode
began, and MuJoCo's integration state at the time of saving. Restoring first starts an episode from
the generator's state, because a start may change the model itself (targets, gains, a terrain). Then
it sets the integration state.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cerl.config import DmcEnv
from cerl.envs.mujoco import EnvPoolPhysics
from cerl.envs.simulator_state import (
    array,
    entries,
    load_numbers,
    load_physics,
    refuse,
    save_numbers,
    save_physics,
    set_physics,
)

_LIMIT = 1000  # control steps of an episode

_DOG = (
    "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity "
    "inertial_sensors foot_forces touch_sensors actuator_state"
)
_HUMANOID = "joint_angles head_height extremities torso_vertical com_velocity velocity"
_QUADRUPED = "egocentric_state torso_velocity torso_upright imu force_torque"
KEPT = {
    **{f"dog-{task}": _DOG for task in ("run", "stand", "trot", "walk")},
    "finger-spin": "position velocity touch",
    "fish-swim": "joint_angles upright target velocity",
    "fish-upright": "joint_angles upright velocity",
    **{f"humanoid-{task}": _HUMANOID for task in ("run", "stand", "walk")},
    "humanoid-run_pure_state": "position velocity",
    "quadruped-escape": f"{_QUADRUPED} origin rangefinder",
    "quadruped-fetch": f"{_QUADRUPED} ball_state target_position",
    **{f"quadruped-{task}": _QUADRUPED for task in ("run", "walk")},
}

_INSTALL = (
    "install EGL (apt install libegl1, with a GPU's driver or Mesa) or OSMesa (apt install "
    "libosmesa6) and leave MUJOCO_GL unset, or set it to egl or osmesa before the start"
)


def envpool_suite(
    config: DmcEnv, *, seeds: Sequence[int] | np.ndarray, threads: int
) -> EnvPoolPhysics:
    """Simulators of one of the suite's tasks in EnvPool.

    Args:    seeds [G] of the simulators; threads of the simulators.
    Raises:  ValueError on pixels; ImportError without envpool.
    """
    if config.pixels:
        raise ValueError(
            "env.pixels: EnvPool's images need a display; set env.backend to 'dm_control'"
        )
    words = config.name.replace("-", "_").split("_")
    return EnvPoolPhysics(
        "".join(word[:1].upper() + word[1:] for word in words) + "-v1",
        seeds=seeds,
        threads=threads,
        extra="dmc",
        keys=tuple(KEPT.get(config.name, "").split()),
        repeat=config.repeat,
    )


def _import_suite() -> Any:
    """Imports dm_control's suite, with the first renderer that can be loaded and needs no window.

    Raises:  ImportError without the package, or where the renderer that MUJOCO_GL names cannot be
             loaded.
    """
    try:
        import dm_control  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"backend 'dm_control' needs dm-control ({error}): pip install 'cerl[dmc]' "
            "(Python 3.11 or 3.12; backend 'envpool' runs on 3.13 too)"
        ) from error
    asked = os.environ.get("MUJOCO_GL")
    if asked is not None or sys.platform != "linux" or "dm_control._render" in sys.modules:
        try:
            from dm_control import suite
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ImportError(f"MUJOCO_GL={asked} cannot be used ({error}); {_INSTALL}") from error
        return suite
    try:
        for renderer in ("egl", "osmesa", "disabled"):
            os.environ["MUJOCO_GL"] = renderer
            # If a renderer's library is missing, PyOpenGL raises one of these two errors.
            with contextlib.suppress(ImportError, AttributeError):
                from dm_control import suite

                return suite
    finally:
        del os.environ["MUJOCO_GL"]
    raise ImportError("dm-control cannot be imported: pip install 'cerl[dmc]'")


class DmControl:
    """G simulators of dm_control's suite, one after the other, without a limit on the episode.

    Args:    seeds [G] of the simulators.
    Raises:  ImportError without the package, without a renderer where one is needed, or if its
             MuJoCo is of the wrong version; ValueError on an unknown camera.
    """

    def __init__(self, config: DmcEnv, *, seeds: Sequence[int] | np.ndarray) -> None:
        suite = _import_suite()
        self._config = config
        self._envs = [self._load(suite, int(seed)) for seed in seeds]
        # States that the random generators had before the current episodes began, see `_start`.
        self._drawn = [env.task.random.get_state(legacy=False) for env in self._envs]
        self._over = np.zeros(len(seeds), dtype=bool)  # the last step ended the episode
        actions = self._envs[0].action_spec()
        self.low, self.high = actions.minimum, actions.maximum
        self.limit = -(-_LIMIT // config.repeat)
        self.dtype = torch.uint8 if config.pixels else torch.float32
        if config.pixels:
            self.observation = (3, config.size, config.size)
            self._check_renderer()
        else:
            parts = self._envs[0].observation_spec().values()
            self.observation = (sum(int(np.prod(part.shape)) for part in parts),)
        kind = np.uint8 if config.pixels else np.float32
        self._blank = np.zeros(self.observation, dtype=kind)

    def _load(self, suite: Any, seed: int) -> Any:
        domain, task = self._config.name.split("-")
        options = {"random": seed, "time_limit": float("inf")}
        try:
            return suite.load(domain, task, task_kwargs=options)
        except AttributeError as error:
            raise ImportError(
                f"dm-control does not fit the installed mujoco ({error}): "
                "pip install 'cerl[dmc]' brings versions that fit"
            ) from error

    def _check_renderer(self) -> None:
        physics, camera = self._envs[0].physics, self._config.camera
        cameras = physics.model.ncam
        if camera >= cameras:
            raise ValueError(
                f"env.camera: expected -1 to {cameras - 1} for {self._config.name}, got {camera}"
            )
        try:
            self._image(self._envs[0])
        # OpenGL's bindings raise errors of many classes, which have no common base class but this.
        except Exception as error:
            raise ImportError(
                f"env.pixels: no image can be rendered ({error}); {_INSTALL}"
            ) from error

    def _image(self, env: Any) -> np.ndarray:
        """What the camera sees, [3, size, size] uint8."""
        size = self._config.size
        image = env.physics.render(size, size, camera_id=self._config.camera)  # [size, size, 3]
        return image.transpose(2, 0, 1)

    def picture(self, height: int, width: int) -> np.ndarray:
        """What the camera of the first simulator sees, [height, width, 3] uint8."""
        return self._envs[0].physics.render(height, width, camera_id=self._config.camera)

    def _show(self, env: Any, parts: dict[str, Any]) -> np.ndarray:
        """An observation: an image, or the parts of the state joined to a vector [D] float32."""
        if self._config.pixels:
            return self._image(env)
        with np.errstate(over="ignore"):
            joined = np.concatenate([np.ravel(part) for part in parts.values()])
            return joined.astype(np.float32)

    def reseed(self, seeds: Sequence[int] | np.ndarray) -> None:
        """Gives the simulators new seeds [G]. The caller then has to reset all of them."""
        for env, seed in zip(self._envs, seeds, strict=True):
            env.task.random.seed(int(seed))

    def _start(self, index: int) -> Any:
        """Starts an episode and stores the state that its generator had before.

        Returns: the parts of its first observation.
        """
        env = self._envs[index]
        self._drawn[index] = env.task.random.get_state(legacy=False)
        return env.reset().observation

    def reset(self, which: np.ndarray | None) -> np.ndarray:
        """Starts new episodes in the simulators with the indices `which` (None: in all).

        Returns: observations [len(which), *observation].
        Raises:  ImportError without a renderer where a task needs one (quadruped-escape's terrain).
        """
        indices = range(len(self._envs)) if which is None else which
        self._over[indices] = False
        try:
            starts = [self._start(i) for i in indices]
        except RuntimeError as error:
            if "OpenGL" not in str(error):
                raise
            raise ImportError(
                f"env.name: {self._config.name} needs a renderer to start ({error}); {_INSTALL}; "
                "env.backend 'envpool' needs none"
            ) from error
        envs = (self._envs[i] for i in indices)
        return np.stack([self._show(env, parts) for env, parts in zip(envs, starts, strict=True)])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One agent step: observation [G, ...], reward [G], terminal [G] bool.

        An episode that was over starts anew instead, with reward 0. Where MuJoCo reports that it
        diverged, the reward is NaN.
        """
        results = [self._step_one(i, env, action[i]) for i, env in enumerate(self._envs)]
        obs, reward, self._over = (np.array(part) for part in zip(*results, strict=True))
        return obs, reward, self._over.copy()

    def _step_one(self, index: int, env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        from dm_control.rl.control import PhysicsError

        if self._over[index]:
            return self.reset(np.array([index]))[0], 0.0, False
        reward = 0.0
        try:
            for _ in range(self._config.repeat):
                step = env.step(action)
                reward += step.reward
                if step.last():
                    break
        except PhysicsError:
            return self._blank, float("nan"), False
        # Without a time limit every end is a terminal.
        return self._show(env, step.observation), reward, bool(step.last())

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the current episodes depends on, as plain data."""
        simulators = [
            {
                "drawn": save_numbers(drawn),
                "random": save_numbers(env.task.random.get_state(legacy=False)),
                "physics": save_physics(env.physics.model.ptr, env.physics.data.ptr),
            }
            for env, drawn in zip(self._envs, self._drawn, strict=True)
        ]
        return {"over": torch.from_numpy(self._over.copy()), "simulators": simulators}

    def restore(self, saved: Any, *, where: str) -> None:
        """Checks the saved states of all simulators, then restores all simulators.

        Args:    saved, from `state`; where, the name of the task, for messages.
        Raises:  CheckpointError naming the simulator and the entry that do not fit; no simulator is
                 changed then.
        """
        entries(saved, ["over", "simulators"], where=where)
        over = array(saved["over"], self._over.shape, bool, where=f"{where}.over")
        states = saved["simulators"]
        if type(states) is not list or len(states) != len(self._envs):
            raise refuse(f"{where}.simulators", f"a list of {len(self._envs)}", states)
        checked = []
        for index, (env, state) in enumerate(zip(self._envs, states, strict=True)):
            place = f"{where}.simulators.{index}"
            entries(state, ["drawn", "random", "physics"], where=place)
            like = env.task.random.get_state(legacy=False)
            drawn = load_numbers(state["drawn"], like, where=f"{place}.drawn")
            now = load_numbers(state["random"], like, where=f"{place}.random")
            model = env.physics.model.ptr
            physics = load_physics(state["physics"], model, where=f"{place}.physics")
            checked.append((drawn, now, physics))
        for index, (env, (drawn, now, physics)) in enumerate(zip(self._envs, checked, strict=True)):
            env.task.random.set_state(drawn)
            self._start(index)
            env.task.random.set_state(now)
            set_physics(env.physics.model.ptr, env.physics.data.ptr, physics)
        self._over = over

    def close(self) -> None:
        """Frees the simulators."""
        for env in self._envs:
            env.close()
