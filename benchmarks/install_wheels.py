"""Each wheel alone in an empty environment: how long installing takes, how large it is, how fast it imports.

    uv run python benchmarks/install_wheels.py [--python 3.11 3.12] [--find-links DIST] [--extras]

Builds the three packages unless --find-links names a folder that holds them, then makes one environment per package and
Python, links from uv's cache (a second run does not measure the network) and prints a table: seconds of `uv pip
install`, distributions installed, bytes of the environment with and without torch and its CUDA libraries, and the best
of three wall times of importing the package, its torch-free part, and torch beside them. --extras adds rows for
repwam-core[serve], repwam-core[sim] and repwam-core[aloha].
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "repvitok": ("repvitok", "repvitok.runtime.errors"),
    "latent-action": ("latent_action", "latent_action.config"),
    "repwam-client": ("repwam_client", "repwam_client.interface"),
    "repwam-core": ("repwam_core", "repwam_core.interface"),
}
EXTRAS = ("repwam-core[serve]", "repwam-core[sim]", "repwam-core[aloha]")
CUDA = ("torch", "nvidia", "triton", "cuda")


def main() -> None:
    """Build, install, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=["3.11"])
    parser.add_argument("--find-links", type=Path)
    parser.add_argument("--extras", action="store_true")
    options = parser.parse_args()
    print("| package | Python | install, s | distributions | MB | without torch and CUDA, MB | import, s | torch |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dist = options.find_links or _build(Path(folder) / "dist")
        for python in options.python:
            for package in (*IMPORTS, *(EXTRAS if options.extras else ())):
                print(_row(package, python, dist, Path(folder) / f"{package}-{Path(python).name}"), flush=True)


def _build(dist: Path) -> Path:
    _uv("build", "--all-packages", "--out-dir", dist)
    return dist


def _row(package: str, python: str, dist: Path, environment: Path) -> str:
    _uv("venv", "--quiet", "--python", python, environment)
    interpreter = environment / "bin" / "python"
    start_s = time.perf_counter()
    _uv("pip", "install", "--quiet", "--python", interpreter, "--find-links", dist, package)
    install_s = time.perf_counter() - start_s
    site = next(environment.glob("lib/python*/site-packages"))
    listed = [path for path in site.iterdir() if path.name.endswith(".dist-info")]
    total = _size(site)
    torch = sum(_size(path) for path in site.iterdir() if path.name.lower().startswith(CUDA))
    module, light = IMPORTS[package.partition("[")[0]]
    times = " / ".join(f"{_import_s(interpreter, name):.2f}" for name in (module, light))
    version = _output(interpreter, "-c", "import platform; print(platform.python_version())")
    sizes = f"{total / 1e6:.0f} | {(total - torch) / 1e6:.0f}"
    torch_s = _import_s(interpreter, "torch", 1)
    return f"| {package} | {version} | {install_s:.1f} | {len(listed)} | {sizes} | {times} | {torch_s:.1f} |"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _import_s(interpreter: Path, module: str, runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start_s = time.perf_counter()
        _output(interpreter, "-c", f"import {module}")
        times.append(time.perf_counter() - start_s)
    return min(times)


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), cwd="/", capture_output=True, text=True, check=True).stdout.strip()


def _uv(*arguments: str | Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run(["uv", *map(str, arguments)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
