"""Objects in processes of their own: results, errors, death, and no orphans."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from repwam_core.sim.workers import Worker, WorkerDied, map_jobs

ORPHAN_MAKER = """
import io, time
from functools import partial
from repwam_core.sim.workers import Worker
if __name__ == "__main__":
    worker = Worker(partial(io.StringIO, "x"))
    worker.submit("getvalue")
    worker.result()
    print(worker._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_once(workers):
    answers = dict(map_jobs(partial(io.StringIO, "x"), "write", [("a" * n,) for n in range(7)], workers))
    assert answers == {n: n for n in range(7)}


def test_no_jobs_no_answers():
    assert list(map_jobs(io.StringIO, "write", [], 2)) == []


def test_an_error_keeps_its_type_and_says_where_it_was():
    worker = Worker(io.StringIO)
    try:
        worker.submit("seek", -1)
        with pytest.raises(ValueError, match=r"[Nn]egative") as caught:
            worker.result()
        assert any("Traceback" in note for note in caught.value.__notes__)
    finally:
        worker.close()


def test_a_dead_process_is_noticed():
    worker = Worker(partial(importlib.import_module, "os"))
    try:
        worker.submit("_exit", 3)
        with pytest.raises(WorkerDied, match="exit code 3"):
            worker.result()
    finally:
        worker.close()


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_job_whose_process_died_is_told_and_the_rest_is_done(deaths):
    jobs = [("__import__('os')._exit(3)",)] * deaths + [("1",), ("2",)]
    builtins = partial(importlib.import_module, "builtins")
    with pytest.raises(WorkerDied):
        list(map_jobs(builtins, "eval", jobs, 2))
    told = dict(map_jobs(builtins, "eval", jobs, 2, lost=lambda job, death: f"{job[0][-3:]}: {death}"))
    died = dict.fromkeys(range(deaths), "(3): a worker process ended unexpectedly (exit code 3)")
    assert told == died | {deaths: 1, deaths + 1: 2}


def test_a_worker_ends_with_its_parent_even_when_that_is_killed(tmp_path):
    script = tmp_path / "orphan_maker.py"
    script.write_text(ORPHAN_MAKER)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while _running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _running(child)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
