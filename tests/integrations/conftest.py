"""Policies of two arms, one that knows what to do and one that is a tiny model, and RoboTwin's folders."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LeRobotReader
from repvitok.encoding import encode_dataset
from repwam_core.data.episodes import EpisodeStore, text_cache
from repwam_core.data.robotwin import prepare_robotwin
from repwam_core.interface import ActionChunk, BasePolicy, Embodiment, two_arm_names
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy.folder import PolicyManifest, write_policy
from repwam_core.policy.serving import PolicyServer, ServerMetadata, ServeSettings
from repwam_core.sampling import SamplingConfig
from robotwin_stand_in import GOALS, StandInTask, task_config
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests/robotwin_stand_in.py"
CAMERAS = ("observation.images.cam_left_wrist", "observation.images.cam_high", "observation.images.cam_right_wrist")
# Another order than RoboTwin's, of channels and cameras, so that what is matched by place comes out wrong.
ACTIONS = tuple(reversed(two_arm_names()))
STATES = (*two_arm_names()[7:], *two_arm_names()[:7])
UNITS = ["1" if name.endswith("gripper") else "rad" for name in ACTIONS]
ROBOT = Embodiment.from_names("aloha-agilex", ACTIONS, STATES, CAMERAS, 50 / 3, UNITS)


class Walker(BasePolicy):
    """Walks every joint to the instruction's goal by 0.1 a step, four steps a chunk, and believes what it sees only.

    It refuses frames that are not the ones since it was last asked, cameras that are exchanged, and a state that does
    not go with its picture. The grippers keep what they are.
    """

    embodiment, frames_per_latent, action_kind = ROBOT, 4, "absolute"

    def __init__(self):
        self.acts = 0

    def reset(self, instruction, seed=0):
        self.goal, self.seed, self.seen, self.acts = GOALS[instruction], seed, -1, 0

    def record(self, actions_si):
        self.recorded = actions_si

    def act(self, observation):
        for camera, number in zip(CAMERAS, (1, 0, 2), strict=True):
            frames = observation.frames(camera)
            assert frames.shape[1:] == (240, 320, 3)
            counts = frames[:, 0, 0, 0].tolist()
            assert counts == [(self.seen + 1 + n) % 256 for n in range(4 if self.acts else 1)], counts
            assert set(frames[..., 1].flat) == {number}
        states = observation.states()
        first = states[:, STATES.index("left_arm_0")]
        np.testing.assert_allclose(frames[:, 0, 0, 2], 128 + 100 * first, atol=1)
        self.seen, self.acts = self.seen + len(frames), self.acts + 1
        now = np.array([states[-1][STATES.index(name)] for name in ACTIONS])
        arms = np.array([not name.endswith("gripper") for name in ACTIONS])
        rows = []
        for _ in range(4):
            now = np.where(arms, now + np.clip(self.goal - now, -0.1, 0.1), now)
            rows.append(now)
        return ActionChunk(np.stack(rows).astype(np.float32), ACTIONS, ROBOT.rate_hz)


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory):
    """Make an environment of some packages and ours, without torch; its folder, and variables for its processes."""

    def make(*packages):
        folder = tmp_path_factory.mktemp("environment") / "venv"
        ours = [ROOT / "packages/repvitok", "-e", ROOT / "packages/repwam-client", "-e", ROOT / "packages/repwam-core"]
        kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        for command in (
            ["uv", "venv", "--quiet", "--python", "3.11", folder],
            ["uv", "pip", "install", "--quiet", "--python", folder, *packages],
            ["uv", "pip", "install", "--quiet", "--python", folder, "--no-deps", "-e", *ours],
        ):
            done = subprocess.run(list(map(str, command)), env=kept, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return folder, {**kept, "PATH": path, "PYTHONPATH": str(ROOT / "tests"), "NO_PROXY": "127.0.0.1"}

    return make


@pytest.fixture
def walker():
    """The class of a policy that solves the stand-in's task."""
    return Walker


@pytest.fixture
def serve():
    """Serve policies of two arms and return the server's address."""
    with ExitStack() as stack:

        def start(make=Walker, robot=ROBOT, action_kind="absolute"):
            metadata = ServerMetadata(robot, (32, 32), 4, 4, "0" * 64, action_kind=action_kind, takes_committed=True)
            server = PolicyServer(make, metadata, ServeSettings(port=0))
            return f"ws://127.0.0.1:{stack.enter_context(server.running())}"

        yield start


@pytest.fixture
def robotwin(tmp_path):
    """RoboTwin's folder: the stand-in as its script, and a copy of the drop-in folder."""
    root = tmp_path / "RoboTwin"
    (root / "script").mkdir(parents=True)
    shutil.copy(STAND_IN, root / "script/eval_policy.py")
    shutil.copytree(ROOT / "integrations/robotwin/repwam", root / "policy/repwam")
    return root


@pytest.fixture
def drop_in():
    """The drop-in folder as RoboTwin imports it."""
    folder = ROOT / "integrations/robotwin/repwam"
    spec = importlib.util.spec_from_file_location(
        "repwam_drop_in", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["repwam_drop_in"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("repwam_drop_in")]:
        del sys.modules[name]


@pytest.fixture
def without_torch(tmp_path):
    """The environment variables of a process in which there is no torch, and our Python is the `python` of scripts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import sys\n\n\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n"
        '        if name.partition(".")[0] == "torch":\n'
        '            raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n\n\n'
        "sys.meta_path.insert(0, Absent())\n"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path / "site"), "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A tiny untrained policy of two arms and three cameras, on episodes of the stand-in in RoboTwin's files."""
    root = tmp_path_factory.mktemp("robotwin-policy")
    _record(root / "data/stand_in/demo_clean")
    prepare_robotwin(root / "data", root / "dataset")
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8, episode_window=2)).eval()
    encode_dataset(tokenizer, LeRobotReader(root / "dataset"), root / "shards", size=(32, 32))
    _write_sentences(root / "shards")
    store = EpisodeStore(root / "shards")
    space = ActionSpace(channels=14, vectors_per_transition=4, state_channels=14)
    config = WAMConfig.preset(
        "tiny", width=32, depth=1, heads=2, ffn=32, action_width=32, action_ffn=32, text_dim=16,
        latent_dim=store.meta.latent_dim, window=2, state_token=True, spaces={"robot": space},
    )  # fmt: skip
    wam = WorldActionModel(config).eval()
    for parameter in wam.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    statistics = store.statistics
    channels = (store.action_channels, store.state_channels, store.meta.cameras, store.meta.frame_rate_hz)
    manifest = PolicyManifest(
        space="robot",
        embodiment=Embodiment.from_names("aloha-agilex", *channels),
        size=(32, 32),
        latents=store.meta,
        text_encoder="minilm",
        plan=SamplingConfig(chunk_frames=2, execute_frames=2, video_steps=1, action_steps=2),
        digests={"wam": wam.digest(), "tokenizer": tokenizer.digest(), "statistics": statistics.digest},
    )
    sentences = text_cache(root / "shards", "minilm")
    write_policy(root / "policy", wam, tokenizer, statistics, manifest, {}, sentences)
    return root / "policy"


def _record(folder):
    """Two expert episodes of the stand-in, in RoboTwin's files."""
    for number, (sentence, goal) in enumerate(GOALS.items()):
        task = StandInTask()
        task.setup_demo(seed=number, is_test=True, **task_config())
        seen = []
        for row in range(14):
            action = np.full(14, goal * row / 13)
            action[[6, 13]] = row / 13
            task.take_action(action)
            seen.append(task.get_obs())
        for name in ("data", "instructions"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / f"data/episode{number}.hdf5", "w") as file:
            file["joint_action/vector"] = np.stack([row["joint_action"]["vector"] for row in seen])
            for camera in seen[0]["observation"]:
                pictures = [_jpeg(row["observation"][camera]["rgb"]) for row in seen]
                file.create_dataset(f"observation/{camera}/rgb", data=pictures, dtype=f"S{max(map(len, pictures))}")
        told = {"seen": [sentence], "unseen": [sentence]}
        (folder / f"instructions/episode{number}.json").write_text(json.dumps(told))


def _jpeg(rgb):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb[..., ::-1])).save(file, "JPEG")
    return file.getvalue()


def _write_sentences(shards):
    """Random hidden states of the two instructions, so that no test loads a text model."""
    states = {str(row): torch.randn(5, 16, generator=torch.Generator().manual_seed(row)) for row in range(len(GOALS))}
    about = {"text_encoder": "minilm", "instructions": json.dumps(sorted(GOALS))}
    save_file(states, shards / "text-minilm.safetensors", about)
