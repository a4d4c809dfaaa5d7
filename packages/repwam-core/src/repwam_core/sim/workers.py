"""Objects that live in processes of their own: built there, called from here, one call at a time.

Processes are spawned, not forked, because a GL context does not survive a fork. A worker ends by itself when its parent
dies, however that happens.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from repvitok.runtime.errors import UserError

__all__ = ["Worker", "WorkerDied", "default_workers", "map_jobs"]


class WorkerDied(RuntimeError):
    """The process behind a worker is gone, for example because the simulator crashed in C."""


class Worker:
    """One object in a process of its own.

    Args:
        make: Builds the object; called in the new process, so it must be picklable (a function of a module, or
            ``functools.partial`` of one).

    Raises:
        UserError: If it is not; where the new process cannot import it, from ``result``.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, _pickled(make)), daemon=True)
        self._process.start()
        child.close()

    def submit(self, method: str, *arguments: Any) -> None:
        """Start a call; ``result`` waits for it."""
        try:
            self.connection.send((method, arguments))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def result(self) -> Any:
        """What the oldest call without a result returned.

        Raises:
            WorkerDied: If the process is gone.
            Exception: What the call raised, with the worker's traceback as a note.
        """
        try:
            value, error, note = self.connection.recv()
        except (EOFError, ConnectionResetError) as lost:
            raise self._died() from lost
        if error is not None:
            error.add_note(note)
            raise error
        return value

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> WorkerDied:
        self._process.join(timeout=1)
        return WorkerDied(f"a worker process ended unexpectedly (exit code {self._process.exitcode})")


def default_workers() -> int:
    """As many workers as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_jobs(
    make: Callable[[], Any],
    method: str,
    jobs: Sequence[tuple],
    workers: int,
    lost: Callable[[tuple, WorkerDied], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call ``method`` once per job, on ``workers`` objects built by ``make``; one worker means this very process.

    Args:
        make: Builds an object, see ``Worker``.
        method: Its method.
        jobs: The arguments of each call.
        workers: Processes.
        lost: Gives the value of a job whose process died, which is replaced; None ends everything with the error.

    Yields:
        Index of the job and what it returned, in the order in which they finish.
    """
    if workers <= 1 or len(jobs) <= 1:
        served = make()
        try:
            for index, job in enumerate(jobs):
                yield index, getattr(served, method)(*job)
        finally:
            served.close()
        return
    pool = [Worker(make) for _ in range(min(workers, len(jobs)))]
    try:
        yield from _spread(pool, make, method, jobs, lost)
    finally:
        for worker in pool:
            worker.close()


def _spread(
    pool: list[Worker],
    make: Callable[[], Any],
    method: str,
    jobs: Sequence[tuple],
    lost: Callable[[tuple, WorkerDied], Any] | None,
) -> Iterator[tuple[int, Any]]:
    """As `map_jobs`, by the workers of a pool; one that died is replaced in it."""

    def replaced(worker: Worker) -> Worker:
        worker.close()
        pool[pool.index(worker)] = new = Worker(make)
        return new

    waiting = iter(enumerate(jobs))
    busy: dict[Any, tuple[Worker, int]] = {}
    idle = list(pool)
    while True:
        for worker in idle:
            index, job = next(waiting, (-1, ()))
            if index >= 0:
                try:
                    worker.submit(method, *job)
                except WorkerDied:  # while it was idle
                    if lost is None:
                        raise
                    worker = replaced(worker)
                    worker.submit(method, *job)
                busy[worker.connection] = (worker, index)
        if not busy:
            return
        ready = [busy.pop(connection) for connection in wait(list(busy))]
        idle = []
        for worker, index in ready:
            try:
                value = worker.result()
            except WorkerDied as death:
                if lost is None:
                    raise
                value, worker = lost(jobs[index], death), replaced(worker)
            idle.append(worker)
            yield index, value


def _serve(connection: Connection, make: bytes) -> None:
    """The worker's process: build the object at the first call, then answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    served: Any = None
    try:
        while True:
            method, arguments = connection.recv()
            try:
                served = _unpickled(make)() if served is None else served
                answer = (getattr(served, method)(*arguments), None, "")
            except Exception as error:
                answer = (None, _picklable(error), traceback.format_exc())
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if served is not None:
            served.close()


_NOT_IMPORTED = (
    "worker processes cannot import what they should build ({}): define its classes and functions at the top of a "
    "module that Python can import, not in a notebook or in a function"
)


def _pickled(make: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(make)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(_NOT_IMPORTED.format(error)) from error


def _unpickled(make: bytes) -> Callable[[], Any]:
    """Read here and not by `multiprocessing`, where a failure would look like a simulator that died."""
    try:
        return pickle.loads(make)
    except (ImportError, AttributeError) as error:
        raise UserError(_NOT_IMPORTED.format(error)) from error


def _picklable(error: Exception) -> Exception:
    """The error itself where it is one of Python's or ours, else a RuntimeError that says the same."""
    plain = type(error).__module__ == "builtins" or isinstance(error, ValueError)
    return error if plain else RuntimeError(f"{type(error).__name__}: {error}")
