"""Rendering: averaging down, a missing library's message, and a quiet exit."""

import os
import subprocess
import sys

import numpy as np
import pytest
from repwam_core.sim.mujoco import FrameRenderer, _averaged

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {absent!r}:
            raise {error}

sys.meta_path.insert(0, Absent())
from repvitok.runtime.errors import UserError
from repwam_core.sim.metaworld import MetaWorldTask
try:
    MetaWorldTask("reach").reset(0)
except UserError as error:
    print(error)
"""


def test_averaging_takes_the_rounded_mean_of_blocks():
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2] = [[[255, 0, 1]], [[255, 0, 2]]]
    assert _averaged(pixels, 2).tolist() == [[[255, 0, 2], [0, 0, 0]]]  # 1.5 is rounded up


@pytest.mark.sim
@pytest.mark.parametrize(
    ("absent", "error", "words"),
    [
        ("mujoco.egl", "ImportError('Unable to load EGL library')", ["libegl1 libgl1-mesa-dri", "MUJOCO_GL=osmesa"]),
        ("mujoco.egl", "AttributeError('NoneType: eglQueryString')", ["libegl1 libgl1-mesa-dri", "libosmesa6"]),
        ("mujoco", "ModuleNotFoundError(name, name=name)", ["pip install 'repwam-core[sim]'"]),
        ("metaworld", "ModuleNotFoundError(name, name=name)", ["pip install 'repwam-core[sim]'"]),
    ],
)
def test_what_is_missing_is_named(absent, error, words):
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    code = WITHOUT.format(absent=absent, error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout


@pytest.mark.sim
@pytest.mark.usefixtures("rendering")
def test_nothing_is_printed_at_exit():
    code = "from repwam_core.sim.metaworld import MetaWorldTask; task = MetaWorldTask('reach'); task.reset(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.sim
@pytest.mark.usefixtures("rendering")
def test_a_renderer_starts_again_after_closing():
    from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask

    renderer = FrameRenderer((32, 32))
    with MetaWorldTask("reach", MetaWorldSettings(size=(32, 32)), renderer) as task:
        before = task.reset(0).frames("observation.images.corner2")
        renderer.close()
        np.testing.assert_array_equal(task.observe().frames("observation.images.corner2"), before)
        renderer.close()
    with pytest.raises(ValueError, match="the settings ask for"):
        MetaWorldTask("reach", MetaWorldSettings(size=(64, 64)), renderer)
