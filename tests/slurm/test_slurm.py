"""Two ranks of a tiny recipe on a real Slurm: stopped, preempted, requeued and resumed, with the plain run's losses.

Runs where Slurm is installed (Debian: apt-get install slurm-wlm munge) and the tests run as root; skipped elsewhere.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from repvitok.runtime.progress import read_curves

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("loopback_cluster.sh")
TRAIN = ROOT / "recipes/slurm/train.sbatch"
ARRAY = ROOT / "recipes/slurm/array.sbatch"
SCRIPTS = Path(sysconfig.get_path("scripts"))
STEPS = 120
OVERLAY = {
    "model": {
        "wam": {
            "width": 32, "depth": 1, "heads": 2, "ffn": 64, "action_width": 32, "action_ffn": 64,
            "coupling": "joint", "window": 1, "action_history": False, "state_token": True,
        }
    }
}  # fmt: skip

needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),  # one cluster, whatever the number of test processes
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all(shutil.which(tool) for tool in ("slurmctld", "slurmd", "munged")) or os.geteuid() != 0,
        reason="needs slurm-wlm, munge and root",
    ),
]


def _run(*command, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of one node with two CPUs; its commands find it by SLURM_CONF."""
    folder = tmp_path_factory.mktemp("slurm")
    _run(CLUSTER, "start", folder)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    _run(CLUSTER, "stop", folder)


@pytest.fixture(scope="module")
def latents(noise_latents):
    """Labelled latents, with the overlay of the run beside them."""
    (noise_latents.parent / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    return noise_latents


def _fit(latents, out):
    return [
        "repwam", "fit", "-c", "recipes/3_repwam/tiny_pretrain.yaml", "-c", str(latents.parent / "overlay.yaml"),
        "--data.latents", str(latents),
        "--data.held_out", "0", "--data.batch_size", "2", "--trainer.max_steps", str(STEPS),
        "--trainer.val_check_interval", "100000", "--trainer.log_every_n_steps", "1",
        "--trainer.default_root_dir", str(out), "--checkpoint.every_n_steps", "10",
    ]  # fmt: skip


def _submit(out, latents, cluster):
    variables = {"NODES": "1", "GPUS": "0", "TASKS": "2", "CPUS_PER_TASK": "1", "PARTITION": "low", "TIME": "01:00:00"}
    variables |= {"VENV": str(SCRIPTS.parent), "LOGS": str(out / "logs"), "NAME": "tiny"}
    return _run(TRAIN, *_fit(latents, out), **cluster, **variables)


def _job(number, cluster):
    shown = _run("scontrol", "--oneliner", "show", "job", number, **cluster)
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def _wait_until(true, seconds=600):
    end_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end_s, "not true in time"
        time.sleep(0.5)


def _wait_for_state(number, state, cluster):
    _wait_until(lambda: _job(number, cluster)["JobState"] == state)


def _wait_for_progress(out, after=0.0):
    """Until a checkpoint is written after a moment; returns the moment of that checkpoint."""
    last = out / "last.ckpt"
    _wait_until(lambda: last.exists() and last.stat().st_mtime > after)
    return last.stat().st_mtime


def _losses(out):
    return {name: curve.tolist() for name, curve in read_curves(out).items() if "loss" in name}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, latents):
    """The losses of two ranks without Slurm."""
    out = tmp_path_factory.mktemp("plain")
    command = _fit(latents, out)
    _run(SCRIPTS / command[0], *command[1:], "--trainer.devices", "2", OMP_NUM_THREADS="1")
    return _losses(out)


class TestOnSlurm:
    pytestmark = needs_slurm

    def test_signalled_preempted_and_resumed_it_learns_as_the_plain_run(self, cluster, latents, plain, tmp_path):
        out = tmp_path / "run"
        job = _submit(out, latents, cluster)
        saved = _wait_for_progress(out)
        _run("scancel", "--signal=USR1", job, **cluster)  # what Slurm sends before the time limit
        _wait_until(lambda: _job(job, cluster).get("Restarts") == "1")
        saved = _wait_for_progress(out, saved + 1)
        urgent = _run("sbatch", "--parsable", "-p", "high", "-c", "2", "-o", out / "high", "--wrap", "true", **cluster)
        _wait_for_state(urgent, "COMPLETED", cluster)
        _wait_until(lambda: _job(job, cluster).get("Restarts") == "2")
        _wait_for_state(job, "COMPLETED", cluster)
        assert _losses(out) == plain
        log = (out / "logs" / f"tiny-{job}.out").read_text()
        assert [int(number) for number in re.findall(r"restart (\d)", log)] == [0, 1, 2]
        assert sorted(path.name for path in (out / "logs").glob("*rank*")) == [
            f"tiny-{job}-rank{r}.log" for r in (0, 1)
        ]

    def test_an_array_runs_every_line_of_its_list(self, cluster, tmp_path):
        tasks = tmp_path / "tasks.txt"
        tasks.write_text("".join(f'"{tmp_path}/task {number}"\n\n' for number in range(3)))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/touch").symlink_to(shutil.which("touch"))
        variables = {"GPUS": "0", "CPUS_PER_TASK": "1", "VENV": str(tmp_path), "LOGS": str(tmp_path / "logs")}
        job = _run(ARRAY, tasks, "touch", "-c", **cluster, **variables, NAME="array")
        _wait_until(lambda: not _run("squeue", "--noheader", "--job", job, **cluster))
        logs = sorted((tmp_path / "logs").iterdir())
        assert [path.name for path in logs] == [f"array-{job}_{task}.out" for task in range(3)]
        assert "touch -c" in logs[1].read_text()
        assert "task\\ 1" in logs[1].read_text()


@pytest.mark.parametrize("script", [TRAIN, ARRAY])
def test_scripts_are_valid_bash(script):
    _run("bash", "-n", script)


def test_dry_run_says_what_would_run_and_submits_nothing(tmp_path):
    settings = {
        "NODES": "8",
        "ACCOUNT": "robots",
        "TIME": "02:00:00",
        "NCCL": "NCCL_DEBUG=WARN",
        "PATH": "/usr/bin:/bin",
    }
    said = _run(TRAIN, "--dry-run", "repwam", "fit", "-c", "a b.yaml", LOGS=str(tmp_path / "logs"), **settings)
    for part in ("--nodes=8", "--gpus-per-node=8", "--account=robots", "--time=02:00:00", "--signal=USR1@180"):
        assert part in said.splitlines()[0]
    for part in ("srun", "env NCCL_DEBUG=WARN", "a\\ b.yaml", "--trainer.num_nodes 8", "--ckpt_path last"):
        assert part in said.splitlines()[1]
    assert not (tmp_path / "logs").exists()


def test_nccl_and_account_are_left_alone_unless_told(tmp_path):
    said = _run(TRAIN, "--dry-run", "repwam", "fit", "-c", "a.yaml", GPUS="0", TASKS="2")
    for part in ("NCCL", "--account", "--partition", "--gpus"):
        assert part not in said


def test_array_of_a_list(tmp_path):
    tasks = tmp_path / "tasks.txt"
    tasks.write_text("--dataset 'a b' --out c\n\n--dataset d --out e\n")
    said = _run(ARRAY, "--dry-run", tasks, "repvitok", "encode", "--size", "256", "256", AT_ONCE="7")
    assert "--array=0-1%7" in said
    assert "repvitok encode --size 256 256 --dataset a\\ b --out c" in said


def test_too_few_arguments_are_refused(tmp_path):
    for script in (TRAIN, ARRAY):
        done = subprocess.run([script, "--dry-run"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: expected")
