"""The three commands answer at once, and their errors are one line and exit code 2."""

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))
COMMANDS = ["repvitok", "latent-action", "repwam"]


def _run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPTS / command), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_take_under_two_seconds(command, option):
    times_s = []
    for _ in range(3):
        start_s = time.monotonic()
        done = _run(command, option)
        times_s.append(time.monotonic() - start_s)
        assert done.returncode == 0, done.stderr
    assert min(times_s) < 2.0, times_s


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_lightning_verbs(command):
    out = _run(command, "--help").stdout
    for verb in ("fit", "validate", "test", "predict", "export"):
        assert verb in out


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_verb_is_exit_code_2(command):
    done = _run(command, "frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["repvitok", "latent_action", "repwam_core", "repwam_core.interface"])
def test_importing_a_package_does_not_import_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
