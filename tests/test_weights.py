"""The models of packages/repwam-weights are whole, fit each other, and are loaded by name without a network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from latent_action import LatentActionTokenizer
from repvitok import RepViTok

ROOT = Path(__file__).parents[1]
CARRIED = ROOT / "packages/repwam-weights/src/repwam_weights"


def test_the_models_are_whole_small_and_fit_each_other():
    tokenizer = RepViTok.from_pretrained("repvitok-small")
    lat = LatentActionTokenizer.from_pretrained("latent-action-small")
    assert tokenizer.digest() == RepViTok.from_pretrained(CARRIED / "repvitok-small").digest()
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    z = tokenizer.encode(torch.zeros(1, 3, 9, 64, 64))
    assert z.shape == (1, 3, 16, 96), "a drop-in for the quickstart's"
    assert lat.encode(z).shape == (1, 2, 4)
    assert lat.config.tokenizer_digest == tokenizer.digest()
    for name, model in (("repvitok-small", tokenizer), ("latent-action-small", lat)):
        card = (CARRIED / name / "README.md").read_text()
        assert model.digest()[:16] in card
        assert "license: apache-2.0" in card
    carried = [path for path in CARRIED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in carried) < 7_000_000, "large weights do not go into the repository"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build a wheel")
def test_an_installed_wheel_is_enough(tmp_path):
    """In a process that sees this environment without the workspace's package, and the wheel's files beside it."""
    command = ["uv", "build", "--wheel", "--package", "repwam-weights", "--out-dir", tmp_path / "dist"]
    built = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("repwam_weights-*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from repvitok import RepViTok; from repvitok.runtime.pretrained import installed_folder; "
        "print(installed_folder('repvitok-small'), RepViTok.from_pretrained('repvitok-small').digest())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    folder, digest = done.stdout.split()
    assert folder.startswith(str(tmp_path / "site")), done.stderr
    assert digest == RepViTok.from_pretrained("repvitok-small").digest()
