"""Exported folders to one wheel, whose models `from_pretrained` finds by their folders' names (docs/decisions/085).

    uv run python tools/weights_wheel.py --version 0.1.0 --license Apache-2.0 --out dist runs/small/repvitok-small

Weights are not in the repository: they are given when the wheel is made. Every folder must be an exported one, whole,
with its model card.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from repvitok.runtime.documents import load_json
from repvitok.runtime.errors import UserError, run_cli
from repvitok.runtime.files import kind_of
from repvitok.runtime.pretrained import INSTALLED, MODEL_FILES, WEIGHTS_FILE, read_weights
from repwam_core.policy.folder import POLICY_FILES, LoadedPolicy
from safetensors import safe_open

PACKAGE = "repwam_weights"
PROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "repwam-weights"
version = "{version}"
description = "Trained models that repvitok, latent-action and repwam-core load by their names"
readme = "README.md"
license = "{license}"
requires-python = ">=3.9"

[project.entry-points."{group}"]
{points}

[tool.hatch.build.targets.wheel]
packages = ["{package}"]
artifacts = ["*.safetensors"]
"""


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Check the folders, and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="exported; its name becomes the model's"
    )
    parser.add_argument("--version", required=True)
    parser.add_argument("--license", required=True, help="SPDX expression of all these weights")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the wheel goes (default: dist)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder), options.folders, options.version, options.license)
        subprocess.run(["uv", "build", "--wheel", "--out-dir", options.out.resolve()], cwd=project, check=True)
    return 0


def write_project(project: Path, folders: Sequence[Path], version: str, license: str) -> Path:
    """What the wheel is built from: a package that holds the folders and nothing that runs."""
    package = project / PACKAGE
    package.mkdir()
    cards = []
    for folder in folders:
        require_whole(folder)
        for name in (*MODEL_FILES, *POLICY_FILES):
            if (folder / name).is_file():
                (package / folder.name / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, package / folder.name / name)
        cards.append(f"## `{folder.name}`\n\n" + (folder / "README.md").read_text().split("---\n", 2)[-1])
    names = sorted(folder.name for folder in folders)
    (package / "__init__.py").write_text(f'"""Model folders: {", ".join(names)}."""\n')
    (project / "README.md").write_text("\n".join(["# Weights\n", *cards]))
    points = "\n".join(f'"{name}" = "{PACKAGE}"' for name in names)
    settings = {"version": version, "license": license, "group": INSTALLED, "points": points, "package": PACKAGE}
    (project / "pyproject.toml").write_text(PROJECT.format(**settings))
    return project


def require_whole(folder: Path) -> None:
    """Refuse what is no exported folder with its card, or has weights that are not those that were saved."""
    kind = kind_of(folder)
    if kind is None or not (folder / "README.md").is_file():
        raise UserError(f"{folder}: expected an exported folder with its model card README.md")
    if kind == "a policy":
        LoadedPolicy.load(folder)
        return
    load_json(folder / "config.json")
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    read_weights(folder / WEIGHTS_FILE, expected)


if __name__ == "__main__":
    raise SystemExit(main())
