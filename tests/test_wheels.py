"""Each package is built, installed alone in an empty environment, and used there."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "repvitok": (
        "repvitok",
        "import repvitok, torch; c = repvitok.RepViTokConfig(width=64, depth=1, heads=2);"
        "t = repvitok.RepViTok(c); z = t.encode(torch.zeros(1, 3, 5, 32, 32)); assert z.shape == (1, 2, 4, 96)",
    ),
    "latent-action": (
        "latent-action",
        "import latent_action, torch; t = latent_action.LatentActionTokenizer(latent_action.LatentActionConfig());"
        "assert t.encode(torch.zeros(1, 3, 4, 96)).shape == (1, 2, 4)",
    ),
    "repwam-core": (
        "repwam",
        "import repwam_core, sys; from repwam_core.interface import Observation; assert 'torch' not in sys.modules;"
        "repwam_core.WorldActionModel(repwam_core.WAMConfig.preset('tiny'))",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build wheels"),
]


def _uv(*args: str | Path) -> None:
    # Links instead of copies: the environments live for one test, and torch alone is several gigabytes.
    environment = os.environ | {"UV_LINK_MODE": "symlink"}
    environment.pop("VIRTUAL_ENV", None)
    done = subprocess.run(["uv", *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    _uv("build", "--all-packages", "--out-dir", folder)
    return folder


@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_installs_alone_and_works(name, dist, tmp_path):
    command, code = PACKAGES[name]
    environment = tmp_path / "venv"
    _uv("venv", environment)
    python = environment / "bin" / "python"
    _uv("pip", "install", "--python", python, "--find-links", dist, name)
    for arguments in ([python, "-c", code], [environment / "bin" / command, "--version"]):
        done = subprocess.run(list(map(str, arguments)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        ["uv", "pip", "list", "--python", str(python)], capture_output=True, text=True, check=True
    ).stdout
    assert "metaworld" not in listed, "the simulator is an extra"
    assert "muon" not in listed, "training extras are extras"


def test_sdists_carry_their_tests_and_licence(dist):
    for name in PACKAGES:
        (sdist,) = dist.glob(f"{name.replace('-', '_')}-*.tar.gz")
        with tarfile.open(sdist) as archive:
            members = archive.getnames()
        assert any("/tests/" in member for member in members), name
        assert any(member.endswith("/LICENSE") for member in members), name
        assert any(member.endswith("py.typed") for member in members), name
