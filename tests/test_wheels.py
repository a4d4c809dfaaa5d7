"""Each package is built, installed alone in an empty environment, and used there."""

import os
import shutil
import subprocess
import sys
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
    "repwam-client": (
        None,
        "import repwam_client, sys; assert not {'torch', 'repvitok'} & set(sys.modules); "
        "assert issubclass(repwam_client.PolicyClient, repwam_client.BasePolicy)",
    ),
    "repwam-core": (
        "repwam",
        "import repwam_core, sys; from repwam_core.interface import Observation; assert 'torch' not in sys.modules;"
        "repwam_core.WorldActionModel(repwam_core.WAMConfig.preset('tiny'))",
    ),
    "repwam-weights": (None, "import repwam_weights, sys; assert not {'torch', 'repvitok'} & set(sys.modules)"),
}
UNNEEDED = {
    "repvitok": ("metaworld", "mujoco", "muon", "timm", "open-clip", "lpips", "transformers", "websockets", "msgpack"),
    "latent-action": ("metaworld", "mujoco", "muon", "timm", "open-clip", "lpips", "transformers", "websockets"),
    "repwam-client": ("torch", "repvitok", "msgspec", "pyyaml"),
    "repwam-core": ("metaworld", "mujoco", "muon", "timm", "open-clip", "lpips"),
    "repwam-weights": ("torch", "numpy", "repvitok"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build wheels"),
]


def _pythons() -> list[str]:
    """This Python, and 3.12 where one is installed."""
    found = [path for path in map(shutil.which, ("python3.12",)) if path]
    found += sorted(map(str, Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12")))
    runs = [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]
    return [sys.executable, *([runs[0]] if runs and sys.version_info < (3, 12) else [])]


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


@pytest.mark.parametrize("python", _pythons(), ids=lambda path: Path(path).name)
@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_installs_alone_and_works(name, python, dist, tmp_path):
    command, code = PACKAGES[name]
    environment = tmp_path / "venv"
    _uv("venv", "--python", python, environment)
    python = environment / "bin" / "python"
    _uv("pip", "install", "--python", python, "--find-links", dist, name)
    told = [] if command is None else [[environment / "bin" / command, "--version"]]
    for arguments in ([python, "-c", code], *told):
        done = subprocess.run(list(map(str, arguments)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        ["uv", "pip", "list", "--python", str(python)], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[0] for line in listed.splitlines()[2:]}
    surplus = [installed for installed in names if installed.startswith(UNNEEDED[name])]
    assert not surplus, "what training, simulating and serving need are extras"


def test_sdists_carry_their_tests_and_licence(dist):
    for name in PACKAGES:
        (sdist,) = dist.glob(f"{name.replace('-', '_')}-*.tar.gz")
        with tarfile.open(sdist) as archive:
            members = archive.getnames()
        assert any(member.endswith("/LICENSE") for member in members), name
        if name == "repwam-weights":  # data alone
            assert sum(member.endswith("/model.safetensors") for member in members) == 2
            continue
        assert any("/tests/" in member for member in members), name
        assert any(member.endswith("py.typed") for member in members), name


def test_metadata_is_what_the_index_accepts(dist):
    files = sorted(map(str, [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]))
    assert len(files) == 2 * len(PACKAGES)
    _uv("tool", "run", "twine", "check", "--strict", *files)


def test_an_sdist_runs_its_own_tests(dist, tmp_path):
    """The smallest package's, in an environment that holds it and the packages below it."""
    (sdist,) = dist.glob("latent_action-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.glob("latent_action-*")
    _uv("venv", "--python", sys.executable, root / ".venv")
    python = root / ".venv/bin/python"
    _uv("pip", "install", "--python", python, "--find-links", dist, "--group", f"{root}/pyproject.toml:test", root)
    command = [python, "-m", "pytest", "--import-mode=importlib", "-q", "-m", "not slow and not sim", "tests"]
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["3.8", "3.12"])
def test_the_client_runs_where_robots_are(version, dist, tmp_path):
    """Its wheel and its own tests, on the oldest Python and a newer one, where nothing else of ours is."""
    known = [path for path in (shutil.which(f"python{version}"),) if path]
    known += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")))
    python = next(
        (path for path in known if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0), None
    )
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    _uv("venv", "--python", python, tmp_path / "venv")
    installed = tmp_path / "venv/bin/python"
    (wheel,) = dist.glob("repwam_client-*.whl")
    _uv("pip", "install", "--python", installed, wheel, "pytest")
    shutil.copytree(ROOT / "packages/repwam-client/tests", tmp_path / "tests")
    command = [installed, "-I", "-m", "pytest", "-q", "tests"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
