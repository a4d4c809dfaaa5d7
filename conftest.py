"""Test-wide setup: tensor shapes are checked by beartype, torch runs on one thread, shared data is found or skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before any test imports them: every jaxtyping annotation in the three packages is checked at each call.
install_import_hook(["repvitok", "latent_action", "repwam_core"], "beartype.beartype")

LEROBOT_GIB = 12
"""torch with its CUDA libraries, unpacked and packed, where no smaller one is to be had."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The tests marked `lerobot` install LeRobot, so they are asked for; how many faults `tests/faults` tries."""
    told = "run the tests against LeRobot as published, in an environment with this Python (3.12)"
    parser.addoption("--lerobot", nargs="?", const="3.12", default=None, metavar="PYTHON", help=told)
    group = parser.getgroup("faults")
    group.addoption("--faults", type=int, default=6, help="faults that tests/faults tries (default: 6)")
    group.addoption("--faults-seed", type=int, default=0, help="which faults are drawn (default: 0)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The blocks of the documents take minutes: they run when they are asked for, `-m docs`."""
    if "docs" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("docs"):
            item.add_marker(pytest.mark.skip(reason="runs with -m docs"))


def pytest_configure() -> None:
    """One torch thread per test process: the models in the tests are small, and processes share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings that stands beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}: the shared data folder stands beside the repository")
    return folder


@pytest.fixture(scope="session")
def lerobot_environment(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Makes an environment of packages, LeRobot among them, once in pytest's cache, and gives its interpreter.

    Skips where none can be made, and says why. `older`: without that Python an older LeRobot will do, for this one.
    """
    wanted = request.config.getoption("--lerobot")

    def make(name: str, packages: Sequence[str], older: bool = False) -> Path:
        if wanted is None:
            pytest.skip("asked for by --lerobot: installs lerobot, 1 to 6 GB, in an environment of its own")
        if shutil.which("uv") is None:
            pytest.skip("no uv to make an environment with")
        folder = Path(request.config.cache.mkdir("lerobot"))
        failures = []
        for python in dict.fromkeys((wanted, sys.executable) if older else (wanted,)):
            env = folder / "".join(letter if letter.isalnum() else "_" for letter in f"{name}_{python}")
            interpreter = env / "bin/python"
            if (env / "ready").is_file() and (env / "ready").read_text() == "\n".join(packages):
                return interpreter
            if (free := shutil.disk_usage(folder).free / 2**30) < LEROBOT_GIB:
                pytest.skip(f"{free:.0f} GiB are free at {folder}, {LEROBOT_GIB} may be needed")
            install = ["uv", "pip", "install", "--python", str(interpreter), *packages]
            failed = _run(["uv", "venv", "--clear", "--python", python, str(env)])
            if not failed:
                # The builds without CUDA are on an index of their own, which not every machine reaches.
                failed = _run([*install, "--torch-backend", "cpu"]) and _run(install)
            if not failed:
                (env / "ready").write_text("\n".join(packages))
                return interpreter
            failures.append(f"{python}: {failed}")
        pytest.skip(f"no environment with lerobot: {'; '.join(failures)}")

    return make


def _run(command: list[str]) -> str:
    """Empty, or the last line that a failed command printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
