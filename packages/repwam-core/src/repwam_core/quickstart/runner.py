"""Runs named stages once each: a stage is cached by the digest of its settings and of its inputs.

A stage owns one folder, `<root>/<name>-<digest>`. The work happens inside that folder, so a stage that was
interrupted finds its own partial results there and may resume from them; `stage.json` is written last and
atomically, and only a folder that has it counts as done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from repvitok.runtime.documents import From0, read_json
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.files import WriteError, refuse_foreign, sole_writer, write_json_atomic, write_text_atomic

TELLING = ("figures.py", "results.py")
"""Files of this package that tell of stages, and make none."""
_MARKER = "quickstart.json"
_DONE = "stage.json"


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left behind.

    Attributes:
        name: the stage's name.
        digest: hex digest of its settings and inputs.
        folder: where its outputs lie.
        seconds: wall time over all the runs it took, interrupted ones included.
        cached: whether this call found it done.
        commit: of the code that made it, see `code_commit`.
        summary: small JSON values worth telling: losses, counts.
    """

    name: str
    digest: str
    folder: Path
    seconds: float
    cached: bool
    commit: str = ""
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Record:
    """What a finished stage's file says."""

    seconds: From0
    summary: dict[str, Any]
    commit: str = ""


def stage_digest(name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Sha256 over the stage's name, its settings (JSON) and the digests of what it reads."""
    payload = json.dumps([name, settings, dict(sorted(inputs.items()))], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """Identity of a data set folder: relative names and sizes of all files, and the content of its `meta`.

    Videos are not read: a data set is taken to be unchanged while its metadata and file sizes are.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        if "meta" in path.relative_to(folder).parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def code_digest() -> str:
    """Identity of the code that makes stages: sha256 over the three packages' Python files.

    A stage made by other code is not this code's result, whatever the version number says. What only tells of stages
    is left out, and recipes count where they are read.
    """
    digest = hashlib.sha256()
    for name in ("repvitok", "latent_action", "repwam_core"):
        root = Path(str(files(name)))
        for path in sorted(p for p in root.rglob("*.py") if p.relative_to(root).parts[:1] != ("report",)):
            if path.parent.name == "quickstart" and path.name in TELLING:
                continue
            digest.update(f"{name}/{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def code_commit() -> str:
    """Commit of the checkout that the code lies in, ending in -dirty if files differ from it; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip()


class StageRunner:
    """Runs stages under one root folder.

    Args:
        root: the run's folder; created if missing. An existing folder must be an earlier run's or empty.
        fresh: remove the earlier run's stages first.
        stages: how many there will be, to be told beside a stage's number; None where that is open.
    """

    def __init__(self, root: Path, *, fresh: bool = False, stages: int | None = None) -> None:
        self.root, self._of = root, "" if stages is None else f"/{stages}"
        self.results: list[StageResult] = []
        self._began_s = time.monotonic()
        if not (root / _MARKER).exists():
            refuse_foreign(root, (), "run of repwam quickstart")
        with self.lock():
            for child in root.iterdir() if fresh else ():  # the folders of earlier stages, and nothing else
                if child.is_dir() and (child / ".stage").exists():
                    shutil.rmtree(child)
            write_json_atomic(root / _MARKER, {"format": "repwam-quickstart", "format_version": 1})

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run's folder; a second run on the same folder is refused instead of mixing outputs."""
        return sole_writer(
            self.root, f"another quickstart is running in {self.root}; wait for it, or name another folder with --out"
        )

    def run(
        self,
        name: str,
        work: Callable[[Path], dict[str, Any]],
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        needs_bytes: int = 50_000_000,
    ) -> StageResult:
        """Return the stage's result, doing its work if no finished folder is there.

        Args:
            name: the stage's name, also the start of its folder's.
            work: called with the stage's folder; returns a JSON summary. It may find its own partial results.
            settings: everything that decides the outcome besides the inputs; JSON values.
            inputs: digest of each input.
            needs_bytes: free disk space that the stage wants before it starts.
        """
        digest = stage_digest(name, settings, inputs)
        folder = self.root / f"{name}-{digest[:10]}"
        number = f"{len(self.results) + 1}{self._of}"
        record = _record(folder / _DONE)
        if record is not None:
            result = StageResult(name, digest, folder, record.seconds, True, record.commit, record.summary)
            print(f"[{number}] {name}: done before ({record.seconds:.0f} s), reusing {folder}", file=sys.stderr)
        else:
            result = self._work(number, name, digest, folder, work, dict(settings), needs_bytes)
        self.results.append(result)
        return result

    def _work(
        self,
        number: str,
        name: str,
        digest: str,
        folder: Path,
        work: Callable[[Path], dict[str, Any]],
        settings: dict[str, Any],
        needs_bytes: int,
    ) -> StageResult:
        resumed = folder.exists()
        folder.mkdir(exist_ok=True)
        require_disk_space(folder, needs_bytes, f"stage {name}")
        (folder / ".stage").touch()
        so_far = f", {time.monotonic() - self._began_s:.0f} s into the run" if self.results else ""
        print(f"[{number}] {name}: {'resuming' if resumed else 'starting'} in {folder}{so_far}", file=sys.stderr)
        spent = _Stopwatch(folder / ".seconds")
        with spent:
            summary = work(folder)
        write_json_atomic(
            folder / _DONE,
            {
                "name": name,
                "digest": digest,
                "seconds": spent.total_s,
                "commit": (commit := code_commit()),
                "settings": settings,
                "summary": summary,
            },
        )
        told = ", ".join(
            f"{key} {_short(value)}" for key, value in summary.items() if not isinstance(value, (dict, list))
        )
        print(f"[{number}] {name}: {spent.total_s:.0f} s{'  ' + told if told else ''}", file=sys.stderr)
        return StageResult(name, digest, folder, spent.total_s, False, commit, summary)


def _record(path: Path) -> _Record | None:
    """What a finished stage wrote last; None where it is not there or cannot be read: the stage is then gone through
    again, and each of its parts finds itself done."""
    try:
        return read_json(path, _Record, unknown=True)
    except FileNotFoundError:
        return None
    except UserError as error:
        print(f"warning: {path} cannot be read ({error}); going through the stage again", file=sys.stderr)
        return None


class _Stopwatch:
    """Adds up wall time over interrupted runs of a stage, in a small file beside its outputs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.total_s = float(path.read_text())
        except (FileNotFoundError, ValueError):  # new, or damaged: the time spent before is not known
            self.total_s = 0.0

    def __enter__(self) -> _Stopwatch:
        self._start_s = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.total_s += time.monotonic() - self._start_s
        with suppress(WriteError):  # what ended the stage is to be heard, not that its time could not be noted
            write_text_atomic(self._path, f"{self.total_s:.3f}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
