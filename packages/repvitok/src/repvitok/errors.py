"""Errors a user can cause, and how a command line reports them: one clear line, exit code 2."""

from __future__ import annotations

import errno
import functools
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

CommandMain = Callable[[Sequence[str] | None], int]

_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was expected, what came and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a command ends as after Ctrl-C, so that what it was writing is cleaned up."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """For the length of a block SIGTERM raises `Terminated`, once; in other threads than the main one nothing changes.

    A second signal ends the process at once, as it does everywhere else.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) in (
        None,
        signal.SIG_IGN,
    ):
        yield
        return

    def terminate(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_cli(main: Callable[[Sequence[str] | None], int | None]) -> CommandMain:
    """Make `main(argv) -> int` report a user's errors in one line instead of a traceback.

    The wrapped function returns the exit code and never raises for what a user can cause, so that it can be
    both a console script and a function called many times in one process. Exit codes: what `main` returned
    (None is 0); 2 for `ValueError` (hence `UserError`), for a path that is missing or of the wrong kind, and
    for a full disk; 130 for Ctrl-C and 143 for SIGTERM, after cleaning up; argparse's own code where argparse ended
    the command. Any other exception is a bug and keeps its traceback.

    Args:
        main: the command, taking the arguments without the program's name (None: `sys.argv[1:]`).
    """

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        try:
            with sigterm_raises():
                return main(argv) or 0
        except SystemExit as ended:
            return _exit_code(ended)
        except Terminated:
            print("terminated", file=sys.stderr)
            return 143
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (ValueError, *_PATH_ERRORS) as error:
            return _report(error)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return _report(error)

    return command


def _report(error: BaseException) -> int:
    """Print `error` on one line of stderr and return exit code 2; its traceback goes to the debug log."""
    log.debug("the command failed", exc_info=error)
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {message}", file=sys.stderr)
    return 2


def _exit_code(ended: SystemExit) -> int:
    """The integer exit code of a `SystemExit`, whose code may also be None or a message."""
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code
    print(ended.code, file=sys.stderr)
    return 1


def require_disk_space(path: str | Path, size_bytes: int, what: str) -> None:
    """Stop before a stage starts if the disk that will hold `path` has less than `size_bytes` free.

    Args:
        path: the file or folder about to be written; it and its parents need not exist yet.
        size_bytes: what the stage will need, in bytes.
        what: the stage, for the message, e.g. "latent shards".

    Raises:
        UserError: too little space; names what is needed, what is free and where.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size_bytes:
        raise UserError(
            f"{what}: about {size_bytes / 1e9:.2f} GB are needed in {path}, and {free / 1e9:.2f} GB are free on "
            f"the disk of {place}; free some space or choose another output folder"
        )
