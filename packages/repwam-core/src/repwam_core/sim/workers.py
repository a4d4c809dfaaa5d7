"""Simulated episodes side by side, driven by slot number, in processes of their own: built there, called from here.

Processes are spawned, not forked, because a GL context does not survive a fork. A worker ends by itself when its parent
dies, however that happens.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import Observation, stack_observations
from repwam_core.sim.base import SimSettings, SimTask, TaskPool

_NOT_IMPORTED = (
    "worker processes cannot import what they should build ({}): define its classes and functions at the top of a "
    "module that Python can import, not in a notebook or in a function"
)


@dataclass(frozen=True, eq=False)
class Progress:
    """Where an episode stands after a request.

    Attributes:
        observation: Every frame since the last request; None if the simulator crashed before the first.
        success: Whether the task is solved.
        done: Whether the episode is over.
        steps: Control steps so far.
        crashed: What went wrong in the simulator, or None.
        traceback: Where it went wrong, if the simulator raised an exception.
        distances: The task's `distances` with each of those frames.
    """

    observation: Observation | None
    success: bool = False
    done: bool = False
    steps: int = 0
    crashed: str | None = None
    traceback: str | None = None
    distances: Sequence[Mapping[str, float]] = ()


class VectorEnv:
    """Runs episodes in numbered slots; lives in a worker process. A crash ends its episode, not the host."""

    def __init__(self, settings: SimSettings) -> None:
        self._pool = TaskPool(settings)
        self._slots: dict[int, SimTask] = {}

    def start(self, episodes: dict[int, tuple[str, int]]) -> dict[int, Progress]:
        """Begin episodes, slot -> (task, seed); any earlier ones are over."""
        for task in self._slots.values():
            self._pool.give_back(task)
        self._slots.clear()
        return {slot: self._start(slot, *episode) for slot, episode in episodes.items()}

    def execute(self, actions: dict[int, np.ndarray]) -> dict[int, Progress]:
        """Carry out actions `(n, C)` per slot, one frame after each, until they or the episode end."""
        return {slot: self._execute(slot, rows) for slot, rows in actions.items()}

    def close(self) -> None:
        """Close every simulator."""
        self.start({})
        self._pool.close()

    def _start(self, slot: int, name: str, seed: int) -> Progress:
        task: SimTask | None = None
        try:
            task = self._pool.take(name)
            observation = task.reset(seed)
        except UserError:
            raise  # the user's to mend, such as a missing GL library; the same for every episode
        except Exception as error:
            return Progress(None, done=True, **crash(task, error))
        self._slots[slot] = task
        return Progress(observation, distances=[task.distances()])

    def _execute(self, slot: int, actions: np.ndarray) -> Progress:
        task = self._slots[slot]
        seen: list[Observation] = []
        distances: list[dict[str, float]] = []
        try:
            for action in actions:
                seen.append(task.step(action))
                distances.append(task.distances())
                if task.done:
                    break
        except Exception as error:  # whatever a simulator raises is a failed episode, and is recorded as such
            del self._slots[slot]
            frames = stack_observations(seen) if seen else None
            return Progress(frames, done=True, steps=task.steps, distances=distances, **crash(task, error))
        return Progress(stack_observations(seen), task.success, task.done, task.steps, distances=distances)


def crash(task: SimTask | None, error: Exception) -> dict[str, Any]:
    """What is recorded of an episode whose simulator raised `error`; the simulator is used no more."""
    if task is not None:
        with suppress(Exception):  # one that is broken may not even close
            task.close()
    return {"crashed": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


class WorkerDied(RuntimeError):
    """The process behind a worker is gone, for example because the simulator crashed in C."""


class Worker:
    """One object in a process of its own.

    Args:
        make: Builds the object; called in the new process, so it must be picklable (a function of a module, or
            `functools.partial` of one).
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        try:
            pickled = pickle.dumps(make)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(_NOT_IMPORTED.format(error)) from error
        self._process = context.Process(target=_serve, args=(child, pickled), daemon=True)
        self._process.start()
        child.close()

    def submit(self, method: str, *arguments: Any) -> None:
        """Start a call; `result` waits for it."""
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
    """Call `method` once per job, on `workers` objects built by `make`; one worker means this very process.

    Args:
        make: Builds an object, see `Worker`.
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
                # Python's errors and ours go as they are; another's class the parent may not have
                known = type(error).__module__ == "builtins" or isinstance(error, ValueError)
                told = error if known else RuntimeError(f"{type(error).__name__}: {error}")
                answer = (None, told, traceback.format_exc())
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if served is not None:
            served.close()


def _unpickled(make: bytes) -> Callable[[], Any]:
    """Read here and not by `multiprocessing`, where a failure would look like a simulator that died."""
    try:
        return pickle.loads(make)
    except (ImportError, AttributeError) as error:
        raise UserError(_NOT_IMPORTED.format(error)) from error
