"""The documentation site builds, with every warning an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
        [*tools, "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/api/repwam_core/index.html").read_text()
    for said in ("PolicyClient", "WorldActionModel", "ActionStatistics"):
        assert said in page
    for path in (tmp_path / "site").rglob("*.html"):
        assert "fonts.googleapis" not in path.read_text(), path
