"""Exported folders become a wheel; once it is installed their names are enough, without a network."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("weights_wheel", ROOT / "tools/weights_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8))
    return tokenizer.save_pretrained(tmp_path / "tok-small", readme="---\nlicense: mit\n---\n# A card\n\nWhat it is.\n")


def test_the_project_holds_the_folders_their_names_and_cards(tool, folder, tmp_path):
    (folder / "last.ckpt").write_text("no part of the model")
    (tmp_path / "project").mkdir()
    project = tool.write_project(tmp_path / "project", [folder], "0.1.0", "MIT")
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert told["entry-points"] == {"repvitok.weights": {"tok-small": "repwam_weights"}}
    assert (told["version"], told["license"]) == ("0.1.0", "MIT")
    held = {path.name for path in (project / "repwam_weights/tok-small").iterdir()}
    assert held == {"config.json", "model.safetensors", "README.md"}
    assert "What it is." in (project / "README.md").read_text()


def test_what_is_no_whole_model_is_refused(tool, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected an exported folder with its model card"):
        tool.require_whole(tmp_path / "empty")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    with pytest.raises(UserError, match="is damaged"):
        tool.require_whole(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build a wheel")
def test_an_installed_wheel_is_enough(tool, folder, tmp_path):
    dist = tmp_path / "dist"
    assert tool.main(["--version", "0.1.0", "--license", "MIT", "--out", str(dist), str(folder)]) == 0
    (wheel,) = dist.glob("repwam_weights-0.1.0-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sys; from repvitok import RepViTok; print(RepViTok.from_pretrained('tok-small').digest())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    away = tmp_path / "away"
    away.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=away, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == RepViTok.from_pretrained(folder).digest(), done.stderr
