"""The documentation site builds, with every warning an error, and its script for HDF5 files does what it says."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from repvitok.data import LeRobotReader
from repwam_core.cli import main as repwam

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv for the tools that build the site")
def test_the_site_builds_strictly(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    # An environment of the documentation's tools alone: the packages are read, not imported.
    tools = ["uv", "run", "--no-project", "--python", sys.executable]
    for requirement in ("mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"):
        tools += ["--with", requirement]
    done = subprocess.run(
        [*tools, "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/api/repwam_core/index.html").read_text()
    for said in ("PolicyClient", "WorldActionModel", "ActionStatistics"):
        assert said in page
    for path in (tmp_path / "site").rglob("*.html"):
        assert "fonts.googleapis" not in path.read_text(), path


def test_the_page_s_simulator_is_the_one_that_is_tested():
    tested = ROOT / "packages/repwam-core/tests/sim/toy_simulator.py"
    assert f"```python\n{tested.read_text()}```" in (ROOT / "docs/own-simulator.md").read_text()


def test_robominds_files_become_a_data_set_in_its_layout(tmp_path, monkeypatch):
    """The script of docs/datasets.md, on files made as RoboMIND's are: JPEG frames, master and puppet arms."""
    rng, shown, frames = np.random.default_rng(0), [40, 120, 200], 9
    arms = {
        f"{who}/joint_position_{side}": rng.normal(size=(2, frames, 7))
        for who in ("master", "puppet") for side in ("left", "right")
    }  # fmt: skip
    for episode in range(2):
        folder = tmp_path / f"13_packbowl/success_episodes/train/episode_{episode}/data"
        folder.mkdir(parents=True)
        with h5py.File(folder / "trajectory.hdf5", "w") as file:
            for name, values in arms.items():
                file[name] = values[episode]
            for grey, camera in zip(shown, ("front", "left_wrist", "right_wrist"), strict=True):
                pictures = file.create_dataset(
                    f"observations/rgb_images/camera_{camera}", (frames,), h5py.vlen_dtype(np.uint8)
                )
                for number in range(frames):
                    encoded = io.BytesIO()
                    Image.new("RGB", (640, 480), (grey, grey, 255 - grey)).save(encoded, "JPEG")
                    pictures[number] = np.frombuffer(encoded.getvalue(), np.uint8)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/datasets.md").read_text()
    script = re.search(r"```python\n(import h5py.*?|from pathlib.*?)```", page, re.DOTALL)
    exec(compile(script.group(1), "docs/datasets.md", "exec"), {})
    assert repwam(["prepare", "--dataset=robomind/pack_bowl", "--layout=robomind_agilex", "--out=prepared"]) == 0
    reader = LeRobotReader("prepared")
    assert len(reader) == 2 * frames
    item = reader[frames + 3]
    assert (item["episode_index"], item["task"]) == (1, "pack the bowl")
    for key, who in (("action", "master"), ("observation.state", "puppet")):
        expected = np.concatenate([arms[f"{who}/joint_position_{side}"][1, 3] for side in ("left", "right")])
        np.testing.assert_allclose(item[key], expected, rtol=1e-6)
    for grey, camera in zip(shown, ("front", "left_wrist", "right_wrist"), strict=True):
        mean = item[f"observation.images.camera_{camera}"].mean((0, 1))
        np.testing.assert_allclose(mean, (grey, grey, 255 - grey), atol=4)
