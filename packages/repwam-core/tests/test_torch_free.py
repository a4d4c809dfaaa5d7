"""The modules that a robot's or simulator's own environment installs work where torch does not exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
MODULES = [
    "repwam_core",
    "repwam_core.interface",
    "repwam_core.statistics",
    "repwam_core.policy.execution",
    "repwam_core.policy.recording",
    "repwam_core.policy.runner",
    "repwam_core.policy.serving",
    "repwam_core.policy.serving.client",
    "repwam_core.policy.serving.server",
    "repwam_core.sim.base",
    "repwam_core.sim.robotwin",
    "repwam_core.sim.collect",
    "repwam_core.sim.evaluate",
    "repwam_core.sim.metaworld",
]


def test_all_of_them_import_with_torch_blocked():
    code = BLOCK + "".join(f"import {module}; " for module in MODULES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_client_is_written_in_the_language_of_python_3_10():
    """RoboTwin's own instructions name 3.10; what its folder imports is parsed as that, in an older environment."""
    code = (
        "import sys, repwam_core.sim.robotwin, repwam_core.policy.serving.client; "
        "print(*[m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] in ('repvitok', 'repwam_core')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) > 10
    for file in files:
        ast.parse(Path(file).read_text(encoding="utf-8"), file, feature_version=(3, 10))


@pytest.mark.sim
def test_a_simulated_step_needs_no_torch():
    code = BLOCK + (
        "from repwam_core.sim.metaworld import MetaWorldTask; task = MetaWorldTask('reach'); task.start(0); "
        "task.advance(task.expert_action()); print(task.steps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
