"""Files whose content was compared with a digest: once a run, and for large folders once for all runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from repvitok.errors import UserError

RECORDED_BYTES = 2**30
"""A folder of more is read for its digests once, and remembered; a smaller one takes about a second in every run."""


class VerifiedFiles:
    """Which files of a folder have the content that their description promises.

    A file is read once, at its first use, and compared by SHA-256. What was compared is known by size, times of change
    and inode: whoever writes to the file, or copies it, has it compared again. For a folder of more than
    `RECORDED_BYTES` it is also noted in the user's cache folder, so that many processes and later runs need not read
    terabytes again; where that folder cannot be written, every process compares for itself.

    Args:
        root: the folder.
        size_bytes: of all its files together.
    """

    def __init__(self, root: Path, size_bytes: int) -> None:
        self._record: Path | None = None
        if size_bytes > RECORDED_BYTES:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
            name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]
            self._record = cache / "repvitok" / "verified" / f"{name}.jsonl"
        self._known = self._recorded()

    def require(self, path: Path, sha256: str, *, again: bool = False) -> None:
        """Compares a file with its digest, unless that was done before and the file is as it was then.

        Raises:
            UserError: it is another file, or damaged.
        """
        status = path.stat()
        line = json.dumps([path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256])
        if line in self._known and not again:
            return
        if sha256_of(path) != sha256:
            raise UserError(
                f"{path}: its SHA-256 is not the one in meta.json: the file was changed or damaged; copy it again or "
                "make it again"
            )
        self._known.add(line)
        if self._record is not None:
            try:
                self._record.parent.mkdir(parents=True, exist_ok=True)
                with self._record.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError:
                self._record = None  # remembered for this process alone

    def _recorded(self) -> set[str]:
        """The lines noted before; a torn one matches nothing."""
        try:
            return set() if self._record is None else set(self._record.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError):
            return set()


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
