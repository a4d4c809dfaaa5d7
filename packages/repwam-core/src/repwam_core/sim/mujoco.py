"""What suites on MuJoCo share: settings of cameras and steps, tasks, and fast headless pictures of their models.

There is one GL context per process, without shadows, reflections or multisampling.
"""

from __future__ import annotations

import atexit
import os
import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import Observation
from repwam_core.sim.base import SimSettings, SimTask

OVERSAMPLED_UP_TO_PX = 128
"""Pictures up to this size are drawn at twice their size and averaged down, in place of multisampling. At 64 px that
costs 2.5 ms on top of 10: most of the time goes into the vertices, however large the picture."""
MAX_SIDE = 4096
"""Pixels of a picture's side."""
SHADOW_MAP_PX = 512
MAX_CONTEXTS = 16
"""Models whose meshes and textures stay with the GL library, about 50 MB each; the one made first makes room."""

_NO_GL = (
    "MuJoCo could not start headless rendering (MUJOCO_GL={backend}: {cause}). On Debian or Ubuntu install the "
    "libraries with `apt-get install libegl1 libgl1-mesa-dri`, or use the software renderer: `apt-get install "
    "libosmesa6` and set MUJOCO_GL=osmesa"
)


def not_installed(extra: str) -> UserError:
    """What to tell where the simulator that comes with this extra of the package is missing."""
    return UserError(f"the simulator is not installed; run `pip install 'repwam-core[{extra}]'`")


def import_mujoco(extra: str = "sim") -> ModuleType:
    """MuJoCo's Python package, with EGL chosen for rendering on Linux unless the user has set `MUJOCO_GL`.

    It comes with this `extra` of ours. MuJoCo reads that variable and loads the GL library when it is first imported,
    so this must come before any other import of it.
    """
    if sys.platform.startswith("linux"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: its threads only wait for each other
    try:
        import mujoco
    except ModuleNotFoundError as error:
        if error.name != "mujoco":
            raise _no_gl(error) from error
        raise not_installed(extra) from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise _no_gl(error) from error
    return mujoco


@dataclass(frozen=True)
class CameraView:
    """A camera of the model, possibly moved.

    Attributes:
        name: The camera's name in the model.
        rolled: True for a camera that hangs upside down in the model; its pictures are turned by 180 degrees.
        pos_m: Where to put it, in metres; None leaves it.
        fovy_deg: Vertical field of view in degrees; None leaves it.
    """

    name: str
    rolled: bool = False
    pos_m: tuple[float, float, float] | None = None
    fovy_deg: float | None = None

    def place(self, model: Any) -> None:
        """Move the camera in `model`; seen after the next forward pass of the simulator."""
        camera = model.camera(self.name).id
        if self.pos_m is not None:
            model.cam_pos[camera] = self.pos_m
        if self.fovy_deg is not None:
            model.cam_fovy[camera] = self.fovy_deg


def projection_matrix(model: Any, view: CameraView, size: tuple[int, int]) -> list[list[float]] | None:
    """The 3 x 4 matrix of `HandProjection` of a camera that stands still, placed in `model`; None of one that moves.

    MuJoCo's cameras look along their -z, with x to the right and y up: a point p has the coordinates R^T (p - c), and
    with f = 1 / (2 tan(fovy / 2)) it is seen at right = 1/2 + f x / -z * height / width, down = 1/2 - f y / -z.
    """
    camera = model.camera(view.name).id
    if model.cam_bodyid[camera] != 0:
        return None
    rotation = np.zeros(9)
    import_mujoco().mju_quat2Mat(rotation, model.cam_quat[camera])
    right, up, back = rotation.reshape(3, 3).T
    focal = 0.5 / np.tan(np.radians(model.cam_fovy[camera]) / 2) * (-1 if view.rolled else 1)
    rows = np.array([focal * size[0] / size[1] * right - back / 2, -focal * up - back / 2, -back])
    return np.column_stack([rows, -rows @ model.cam_pos[camera]]).tolist()


class FrameRenderer:
    """Renders any number of models at one size.

    Small pictures are drawn at twice their size and averaged down (`OVERSAMPLED_UP_TO_PX`). What the GL library holds
    for a model (meshes, textures) is made once per `key` and shared by all models of that key, which must come from
    the same file.

    Args:
        size: Height and width of the pictures in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.oversampling = 2 if max(size) <= OVERSAMPLED_UP_TO_PX else 1
        self._mujoco = import_mujoco()
        self._gl: Any = None
        self._contexts: dict[str, tuple[Any, Any]] = {}
        height, width = (side * self.oversampling for side in size)
        self._viewport = self._mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def render(self, key: str, model: Any, data: Any, view: CameraView, markers: bool = True) -> np.ndarray:
        """A picture, uint8 RGB `(H, W, 3)`, right side up.

        Args:
            key: Names the model's file; see the class.
            model: `MjModel`.
            data: `MjData` after a forward pass.
            view: The camera.
            markers: Whether to draw the model's sites, such as the spheres that mark a goal.
        """
        mujoco = self._mujoco
        scene, context = self._context(key, model)
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = model.camera(view.name).id
        options = mujoco.MjvOption()
        if not markers:
            options.sitegroup[:] = 0
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, options, None, camera, everything, scene)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        mujoco.mjr_render(self._viewport, scene, context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, context)
        upright = self._pixels[:, ::-1] if view.rolled else self._pixels[::-1]  # GL's first row is the bottom one
        return _averaged(upright, self.oversampling)

    def close(self) -> None:
        """Free everything the GL library holds. A later `render` starts it again."""
        atexit.unregister(self.close)
        for _, context in self._contexts.values():
            context.free()
        self._contexts.clear()
        if self._gl is not None:
            self._gl.free()
            self._gl = None

    def _context(self, key: str, model: Any) -> tuple[Any, Any]:
        if self._gl is None:
            self._gl = self._start_gl()
            atexit.register(self.close)  # before MuJoCo's own exit handler, which ends EGL under us
        self._gl.make_current()
        if key not in self._contexts:
            if len(self._contexts) >= MAX_CONTEXTS:
                _, oldest = self._contexts.pop(next(iter(self._contexts)))
                oldest.free()
            self._contexts[key] = self._upload(model)
        return self._contexts[key]

    def _start_gl(self) -> Any:
        height, width = self._pixels.shape[:2]
        try:
            from mujoco.gl_context import GLContext  # pyright: ignore[reportAttributeAccessIssue]

            if GLContext.__module__ == "mujoco.glfw" and os.environ.get("MUJOCO_GL") == "egl":
                raise UserError(
                    "mujoco was imported before repwam_core and chose a renderer that needs a display; set "
                    "MUJOCO_GL=egl before Python starts"
                )
            return GLContext(width, height)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            raise _no_gl(error) from error

    def _upload(self, model: Any) -> tuple[Any, Any]:
        mujoco = self._mujoco
        height, width = self._pixels.shape[:2]
        model.vis.quality.shadowsize = SHADOW_MAP_PX
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        scene = mujoco.MjvScene(model, maxgeom=2000)
        scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return scene, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)


@dataclass(frozen=True)
class MujocoSettings(SimSettings):
    """How a suite on MuJoCo is run and seen. The same settings must serve collection and evaluation.

    Attributes:
        views: Camera names a user may give.
        environment_rate_hz: Environment steps per second.
        most_env_steps: The largest `max_env_steps`.
        cameras: Names from `views`.
        size: Height and width of every picture, in pixels, multiples of 16 (the tokenizer's patch).
        act_repeat: Environment steps that one action lasts.
        max_env_steps: Environment steps after which an episode has failed.
    """

    views: ClassVar[Mapping[str, CameraView]]
    environment_rate_hz: ClassVar[int]
    most_env_steps: ClassVar[int]

    cameras: tuple[str, ...] = ()
    size: tuple[int, int] = (64, 64)
    act_repeat: int = 1
    max_env_steps: int = 200

    def __post_init__(self) -> None:
        cameras, most = self.cameras, self.most_env_steps
        if set(cameras) - set(self.views) or not cameras or len(set(cameras)) != len(cameras):
            raise UserError(f"expected distinct cameras out of {sorted(self.views)}, got {list(cameras)}")
        if len(self.size) != 2 or any(not 16 <= side <= MAX_SIDE or side % 16 for side in self.size):
            raise UserError(f"size must be (height, width), multiples of 16 up to {MAX_SIDE}, got {tuple(self.size)}")
        if self.act_repeat < 1:
            raise UserError(f"act_repeat must be at least 1, got {self.act_repeat}")
        if not self.act_repeat <= self.max_env_steps <= most:
            raise UserError(f"max_env_steps must lie in [act_repeat, {most}], got {self.max_env_steps}")

    @property
    def rate_hz(self) -> float:
        """Recorded frames and actions per second."""
        return self.environment_rate_hz / self.act_repeat

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """The cameras' keys in observations and LeRobot data sets."""
        return tuple(f"observation.images.{camera}" for camera in self.cameras)

    def make_renderer(self) -> FrameRenderer:
        return FrameRenderer(self.size)


class MujocoTask(SimTask):
    """A task on MuJoCo.

    Args:
        task: A name of the suite's tasks.
        settings: Cameras, size, rate and length.
        renderer: Shared by all tasks of a process; None makes one of its own on the first `observe`.
    """

    def __init__(self, task: str, settings: MujocoSettings, renderer: FrameRenderer | None) -> None:
        if renderer is not None and renderer.size != settings.size:
            raise UserError(f"the renderer draws {renderer.size}, the settings ask for {settings.size}")
        self.settings, self.name, self.embodiment = settings, settings.task_name(task), settings.embodiment
        self.max_steps = settings.max_env_steps // settings.act_repeat
        self._renderer, self._owns_renderer = renderer, renderer is None
        self._views = {
            key: settings.views[camera] for key, camera in zip(settings.camera_keys, settings.cameras, strict=True)
        }
        self._markers, self._started = True, False

    @property
    @abstractmethod
    def state(self) -> np.ndarray:
        """The robot's state now, float32 `(S,)` in the units of the embodiment's channels."""

    @abstractmethod
    def _drawn(self) -> tuple[str, Any, Any]:
        """What pictures show: `key`, `model` and `data` as `FrameRenderer.render` takes them."""

    def observe(self) -> Observation:
        self._require_started()
        if self._renderer is None:
            self._renderer = FrameRenderer(self.settings.size)
        key, model, data = self._drawn()
        images = {}
        for camera, view in self._views.items():
            view.place(model)  # simulators may share a model, with whatever cameras
            images[camera] = self._renderer.render(key, model, data, view, self._markers)
        return Observation(images, self.state, None, self.steps / self.settings.rate_hz)

    def close(self) -> None:
        if self._owns_renderer and self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _require_started(self) -> None:
        if not self._started:
            raise RuntimeError(f"start the episode of task {self.name!r} with start(seed) or reset(seed) first")

    def _checked(self, action_si: np.ndarray) -> np.ndarray:
        """The action, float64 `(C,)`."""
        self._require_started()
        action, names = np.asarray(action_si, np.float64), self.embodiment.action_names
        if action.shape != (len(names),) or not np.isfinite(action).all():
            raise UserError(f"expected {len(names)} finite numbers {names}, got {action_si!r}")
        return action


def _averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Mean over `factor` x `factor` blocks, uint8 `(H factor, W factor, 3)` -> `(H, W, 3)`, rounded."""
    if factor == 1:
        return np.ascontiguousarray(pixels)
    rows = np.add.reduce([pixels[offset::factor].astype(np.uint16) for offset in range(factor)])
    total = np.add.reduce([rows[:, offset::factor] for offset in range(factor)])
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def _no_gl(cause: BaseException) -> UserError:
    return UserError(_NO_GL.format(backend=os.environ.get("MUJOCO_GL", "unset"), cause=cause))
