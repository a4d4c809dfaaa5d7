"""The documents are true: commands parse, paths lead from one to the next, blocks run, the site builds.

`pytest tests/test_docs.py` reads every block; `pytest -m docs` runs them, each command made small by a rule
(tests/document_runs.py).
"""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
from document_runs import ELSEWHERE, NOT_RUN, SMALL, Reader
from documents import CHAINS, ROOT, STAGES, YOURS, Call, Parser, blocks, calls, is_there, make_sandbox
from PIL import Image
from repvitok.data import LeRobotReader
from repwam_core.cli import main as repwam

WITH_BASH = [chain for chain in CHAINS if blocks(chain, "bash")]
WITH_PYTHON = [chain for chain in CHAINS if blocks(chain, "python")]
RUN = [chain for chain in CHAINS if blocks(chain, "bash", "python") and "docs/decisions/" not in chain[0]]


def _named(chain: tuple[str, ...]) -> str:
    return "docs/stages" if chain == STAGES else chain[0]


@pytest.fixture
def sandbox(tmp_path, shared_video_dataset) -> Path:
    return make_sandbox(tmp_path, shared_video_dataset)


@pytest.mark.parametrize("chain", WITH_BASH, ids=_named)
def test_every_command_is_understood_and_finds_what_it_reads(chain, sandbox):
    """By the parser that runs it; each path was made by an earlier command, or is named as the reader's own."""
    parser, made, lost = Parser(), set(), []
    for block in blocks(chain, "bash"):
        for call in calls(block, sandbox):
            for words in _commands(call):
                if words[0] in ELSEWHERE:
                    _check_other_program(words)
                    continue
                meaning = parser.parse(words)
                lost += [
                    (block.name, path, " ".join(words)) for path in meaning.reads if not is_there(path, made, chain)
                ]
                made |= meaning.writes
    assert lost == []


def _commands(call: Call) -> list[list[str]]:
    """What a call runs: of a job array one command per task."""
    words = list(call.words)
    if words[0] != "sbatch":
        return [words]
    return [[*words[1:], *task.split()] for task in call.tasks] or [words[1:]]


def _check_other_program(words: list[str]) -> None:
    """Files, options of our scripts, and extras of our packages that a command of another program names are there."""
    for word in words[1:]:
        if re.fullmatch(r"(benchmarks|tests|tools|packages)/[\w/.-]+", word):
            assert (ROOT / word).exists(), word
        package = re.fullmatch(r"(?:packages/)?(repvitok|latent-action|repwam-client|repwam-core)\[([\w,]+)\]", word)
        if package:
            project = tomllib.loads((ROOT / "packages" / package.group(1) / "pyproject.toml").read_text())["project"]
            assert set(package.group(2).split(",")) <= project["optional-dependencies"].keys(), word
    if words[0] == "python" and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []


@pytest.mark.parametrize("chain", WITH_PYTHON, ids=_named)
def test_everything_that_python_blocks_import_is_there(chain):
    for block in blocks(chain, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and re.match("repvitok|latent_action|repwam_c", node.module or ""):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], block.name


def test_what_is_not_run_is_in_the_documents():
    """A reason whose command or block is gone goes, too."""
    texts = [f"{block.name}\n{block.text}" for chain in CHAINS for block in blocks(chain, "bash", "python")]
    assert [part for part in NOT_RUN if not any(part in text for text in texts)] == []
    assert [(document, path) for document, paths in YOURS.items() for path in paths
            if path not in (ROOT / document).read_text() and not path.startswith("runs/")] == []  # fmt: skip


@pytest.mark.docs
@pytest.mark.sim
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chain", RUN, ids=_named)
def test_every_block_runs(chain, tmp_path, monkeypatch, shared_video_dataset, files_of_0_1):
    text = "".join((ROOT / document).read_text() for document in chain)
    needs = {path for document in chain for path in YOURS.get(document, ())}
    needs |= {name for name in SMALL if name.isupper() and name in text}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reader = Reader(tmp_path, shared_video_dataset, files_of_0_1, needs)
    try:
        for block in blocks(chain, "yaml"):
            reader.write(block)
        for block in blocks(chain, "bash", "python"):
            {"bash": reader.run_bash, "python": reader.run_python}[block.language](block)
    finally:
        reader.close()
    if chain == ("README.md",):  # the whole pipeline, stage by stage
        verbs = {
            "repvitok": ("fit", "export", "encode"),
            "latent-action": ("fit", "export", "label"),
            "repwam": ("fit", "export", "openloop", "serve"),
        }
        assert {tuple(words) for words in reader.proposed} == {(p, verb) for p, told in verbs.items() for verb in told}


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
