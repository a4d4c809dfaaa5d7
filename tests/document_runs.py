"""Documents run as a reader would, one block after the other in one folder, each command made small by a rule."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from contextlib import redirect_stdout
from importlib import invalidate_caches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from documents import Block, Call, Parser, calls, make_sandbox
from latent_action.cli import main as latent_action
from repvitok.cli import main as repvitok
from repwam_core import ActionChunk, Observation, Policy
from repwam_core.cli import main as repwam
from repwam_core.interface import BasePolicy

ELSEWHERE = {
    "pip": "installs from an index; tests/test_wheels.py installs the wheels",
    "uv": "makes environments; tests/test_wheels.py installs the wheels",
    "git": "fetches the repository that is here already",
    "tar": "unpacks an sdist; the release workflow runs the sdists' tests",
    "curl": "asks a server's health; packages/repwam-core/tests/policy/serving does",
    "sbatch": "needs Slurm; tests/slurm submits both scripts",
    "pytest": "is the suite",
    "python": "a benchmark or the suite; the benchmarks' small forms have tests of their own",
    "tensorboard": "waits for a browser",
    "mkdocs": "builds the site; tests/test_docs.py does",
    "lerobot-eval": "in an environment of LeRobot's; tests/integrations/test_lerobot.py runs it there",
    "lerobot-rollout": "likewise",
}
"""Programs of the documents that no test of a document runs, and why. Their commands are read all the same."""
NOT_RUN = {
    "--preset mt50": "hours; the chain of its commands, in docs/mt50.md, is run",
    "repwam prepare --dataset dataset --layout layout.yaml": "for a data set whose columns have other names",
    "repwam prepare --layout agibot": "the collection has terms of its own; tests/data/test_layout.py of repwam-core",
    "repwam prepare --dataset SOURCE": "likewise",
    "-c recipes/3_repwam/adapt_": "likewise",
    "--ckpt runs/repwam-adapt-all": "likewise",
    "--dataset prepared/task_327": "likewise",
    "--execute 4 --delay 2": "for a policy of Meta-World's; tests/policy/test_delayed.py of repwam-core runs it",
    "--format robotwin": "needs RoboTwin's recordings; tests/data/test_robotwin.py of repwam-core makes such files",
    "repwam push": "needs the hub; tests/runtime/test_pretrained.py of repvitok pushes to a stand-in",
    "repwam robotwin": "needs RoboTwin's results; tests/sim/test_robotwin_results.py of repwam-core has some",
    "--preset aloha": "an hour; the quickstart's test runs its stages",
    "from openpi_client": "openpi's client is not installed; tests/policy/serving of repwam-core speaks its protocol",
    "import h5py": "tests/test_docs.py runs it on files made as the collection's are",
    "docs/decisions/": "the record of an experiment that was made once",
}
"""Commands and blocks that no test of a document runs, by a part of their text or name, and why."""
_TRAINING = "--trainer.max_steps=2 --trainer.val_check_interval=2 --trainer.accelerator=cpu --trainer.precision=32-true"
CUTS = {
    "^repvitok (fit|test)": f"{_TRAINING} --data.size=[32,32] --data.frames=9 --data.batch_size=1 --data.num_workers=0 "
    "--data.val_clips=2 --data.held_out=0.2 --model.tokenizer.width=32 --model.tokenizer.depth=1 "
    "--model.tokenizer.heads=2 --model.weights.perceptual=0 --model.weights.gan=0 --model.perceptual=null "
    "--model.teacher=repvitok.training.teacher.HOGTeacher --model.optimizer.warmup_steps=1",
    "^repvitok fit .*finetune": "--model.tokenizer.window=2 --model.tokenizer.episode_window=2",  # as tiny.yaml's
    "^repvitok encode": "--size 32",
    "^repvitok encode .*--shard": "--shard 0/1",
    "^latent-action fit": f"{_TRAINING} --data.batch_size=4 --data.held_out=0.2 --model.optimizer.warmup_steps=1",
    "^latent-action lapa fit": f"{_TRAINING} --data.batch_size=4 --data.held_out=0.2 --model.optimizer.warmup_steps=1",
    "^latent-action probe": "--head-steps 2 --frames-steps 2",
    "^repwam fit": f"{_TRAINING} --model.preset=tiny --data.transitions=3 --data.held_out=0.2 --data.batch_size=2 "
    "--data.text_encoder=minilm --model.optimizer.warmup_steps=1 --model.optimizer.newton_schulz_dtype=float32",
    "^repwam fit .*(base|mt50_pretrain)": "--data.packing.token_budget=2000",
    "^repwam fit .*encoding": "--data.encoding.size=[32,32]",
    "^repwam collect": "--episodes 4 --size 32 32 --workers 2",
    "^repwam (collect|rollout) .*drawer-open": "--tasks window-open",  # all fifty
    "^repwam rollout": "--episodes 1 --size 32 32 --max-env-steps 24 --workers 1",
    "^repwam rollout .*--suite toy": "--settings {}",
    "^repwam openloop": "--episodes 0",
    "^repwam (openloop|serve|rollout) .*--device": "--device cpu",
    "^repwam quickstart": "--budget 0.004 --size 32 32 --out quickstart",
    "^repwam quickstart(?!.*(dataset|toy))": "--tasks reach --episodes 2 --eval-episodes 1",
    "^repwam quickstart --suite toy": "--episodes 2 --eval-episodes 1",
    "^repwam quickstart .*observation": "--cameras observation.images.top --episodes 0-5",
    "^latent-action fit .*LATENTS": "--model.lat.latent_dim=4",
}
"""How a command is made small: what is added behind it, by a pattern of its text."""
PYTHON_CUTS = {
    r'"(gpu-machine|127\.0\.0\.1)", 8000': '"127.0.0.1", {port}',
    "episodes_per_task=30": "episodes_per_task=2",
    r"evaluation_seeds\(20\)": "evaluation_seeds(1)",
}
"""What is put in the place of parts of a Python block."""

FILES = {"docs/real-robot.md": "limits.yaml"}
"""What a document's YAML block is a file of."""
BETWEEN = {
    ("packages/repwam-core/README.md", "repwam stats"): (
        "repvitok encode --tokenizer tokenizer --dataset dataset --size 8 --out latents",
        "latent-action label --lat lat --latents latents",
    ),
}
"""Commands that a document leaves to another one, before a command of it: "latents come from `repvitok encode`"."""
SMALL = {"LATENTS": "latents", "tokenizer": "tokenizer", "lat": "lat", "wam": "wam", "policy": "policy"}
"""What the reader is supposed to have, by its name in the documents and among the files of version 0.1."""
_MAINS = {"repvitok": repvitok, "latent-action": latent_action, "repwam": repwam}


def why_not(call: Call | Block) -> str | None:
    """The reason why a call or a Python block is not run; None for one that is."""
    if isinstance(call, Call) and call.words[0] in ELSEWHERE:
        return ELSEWHERE[call.words[0]]
    name = call.block.name if isinstance(call, Call) else call.name
    return next((reason for part, reason in NOT_RUN.items() if part in call.text or part in name), None)


def cut(call: Call) -> list[str]:
    """The arguments of a call, made small."""
    added = [extra for pattern, extra in CUTS.items() if re.search(pattern, call.text)]
    return [*call.words[1:], *" ".join(added).split()]


class Reader:
    """Somebody who types a document's blocks, in a folder that is also the current one.

    Args:
        sandbox: an empty folder.
        dataset: a LeRobot data set that the reader has.
        files: the folder of small models and latents.
        needs: names of `SMALL` that the document expects.
    """

    def __init__(self, sandbox: Path, dataset: Path, files: Path, needs: set[str]) -> None:
        self.folder, self._needs = make_sandbox(sandbox, dataset), needs
        for name in needs & SMALL.keys():
            shutil.copytree(files / SMALL[name], sandbox / name)
        if "LATENTS" in needs:  # and the data set that they are of
            (sandbox / "DATASET").unlink()
            shutil.copytree(files / "dataset", sandbox / "DATASET")
        (sandbox / "TOKENIZER").symlink_to("tokenizer")  # one that the document made or has
        (sandbox / "key.txt").write_text("secret")
        self.names: dict[str, Any] = {"key": "secret", "recordings": _recordings()}
        self.proposed: list[list[str]] = []
        self._server: subprocess.Popen[str] | None = None
        self._port = _free_port()

    def close(self) -> None:
        """Ends the server, if the document started one."""
        if self._server is not None:
            self._server.terminate()
            self._server.communicate()
            self._server = None

    def run_bash(self, block: Block) -> None:
        """Runs what a block calls."""
        for call in calls(block, self.folder):
            if why_not(call):
                continue
            for (document, before), commands in BETWEEN.items():
                if block.document == document and call.text.startswith(before):
                    for command in commands:
                        self._run(command.split())
            self._run([call.words[0], *cut(call)])

    def _run(self, words: list[str]) -> None:
        if words[:2] == ["repwam", "serve"]:
            self._serve(words[2:])
            return
        said = io.StringIO()
        with redirect_stdout(said):
            assert _MAINS[words[0]](words[1:]) == 0, " ".join(words)
        for line in said.getvalue().splitlines():
            if line.startswith("next: "):
                self._check_next(shlex.split(line.removeprefix("next: ")))

    def _check_next(self, words: list[str]) -> None:
        """What a command proposes can be given as it stands, but for names in capitals: its paths are there."""
        reads = Parser().parse(words).reads
        assert [path for path in reads if not (path.isupper() or Path(path).exists())] == [], words
        self.proposed.append(words[:2])

    def _serve(self, options: list[str]) -> None:
        """Starts a server in the place of the last one; one for another port is tried, and ended again."""
        beside = self._server if "--port" in options else None
        if beside is None:
            self.close()
        script = Path(sysconfig.get_path("scripts")) / "repwam"
        port = self._port if beside is None else _free_port()
        command = [str(script), "serve", *options, "--host", "127.0.0.1", "--port", str(port)]
        self._server = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        assert "serving" in self._server.stdout.readline()
        if beside is not None:
            self.close()
            self._server = beside

    def write(self, block: Block) -> None:
        """Keeps the file that a block shows, under the name that the document calls it by."""
        if block.document in FILES:
            (self.folder / FILES[block.document]).write_text(block.text)

    def run_python(self, block: Block) -> None:
        """Runs a block; names that it leaves to the reader's robot are there."""
        if why_not(block):
            return
        if block.text.startswith('"""'):  # a module of the reader's
            (self.folder / "toy_simulator.py").write_text(block.text)
            self._install_toy()
            return
        if "PolicyClient(" in block.text and self._server is None:
            self._serve(["--policy", "policy"])
        if (self.folder / "policy").exists():
            self.names |= _robot(self.folder / "policy")
        text = block.text
        if "policy" in self._needs:  # the small policy's instructions are embedded by no text encoder there is
            text = text.replace("open the window", "go left")
        for pattern, instead in PYTHON_CUTS.items():
            text = re.sub(pattern, instead.format(port=self._port), text)
        exec(compile(text, block.name, "exec"), self.names)

    def _install_toy(self) -> None:
        """What installing the reader's package would do: its module can be imported, its entry point is known."""
        package = self.folder / "toy_simulator-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_simulator\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text("[repwam.simulators]\ntoy = toy_simulator:ToySettings\n")
        sys.path.insert(0, str(self.folder))
        invalidate_caches()
        self.names["policy"] = _StandsStill


class _StandsStill(BasePolicy):
    """A policy for docs/own-simulator.md, whose point on a line it leaves where it is."""

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        pass

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(np.zeros((1, 1), np.float32), ("move",), 10.0)


def _robot(folder: Path) -> dict[str, Any]:
    """What a reader's robot program has: pictures, joints, a place for commands, and an end after eight steps."""
    policy = Policy.from_pretrained(folder)
    robot, steps = policy.embodiment, iter(range(8))
    state = np.zeros(len(robot.state_channels), np.float32)
    images = {camera: np.zeros((480, 640, 3), np.uint8) for camera in robot.cameras}
    return {
        "policy": policy,
        "images": images,
        "state": state,
        "observation": Observation(images=images, state=state),
        "cameras": lambda: images,
        "joints": lambda: state,
        "command": lambda action: None,
        "wait_for_the_next_control_step": lambda: None,
        "done": lambda: next(steps, None) is None,
        "was_it_solved": lambda: True,
        "depth_mm": np.full((48, 64), 900, np.uint16),
    }


def _recordings() -> list[SimpleNamespace]:
    """Six episodes of 32 frames of the arm with two cameras and four joints that docs/own-robot.md has."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (30, 40, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    frames = np.stack([np.roll(picture, 8 * shift, axis=1) for shift in range(32)])
    cameras = {f"observation.images.{name}": frames for name in ("front", "wrist")}
    walks = rng.normal(size=(6, 2, 32, 4)).cumsum(axis=2).astype(np.float32)
    return [SimpleNamespace(frames=cameras, state=state, action=action) for state, action in walks]


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
