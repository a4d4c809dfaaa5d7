"""The command `repwam`: quick to answer, one line and exit code 2 for mistakes, nothing lost."""

import subprocess
import sys
import time

import pytest
from repwam_core.cli import main
from repwam_core.statistics import Statistics

VERBS = (
    "quickstart",
    "collect",
    "fit",
    "validate",
    "test",
    "predict",
    "stats",
    "export",
    "rollout",
    "plan",
    "openloop",
)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_without_torch(option):
    code = f"""
import sys
from repwam_core.cli import main
assert main([{option!r}]) == 0
heavy = {{"torch", "lightning", "transformers", "mujoco"}} & set(sys.modules)
assert not heavy, heavy
"""
    start_s = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if option == "--help":
        assert all(verb in done.stdout for verb in VERBS)
    else:
        assert done.stdout.startswith("repwam 0.")
    assert time.process_time() - start_s < 2


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("fit", "validate", "test", "predict")])
def test_every_own_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"repwam {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly"),
        (["export", "--out", "x"], "--ckpt"),
        (["stats", "--latents", "/no/such/folder", "--out", "s.json"], "/no/such/folder"),
        (["openloop", "--policy", "/no/such/folder", "--dataset", "d", "--out", "o.json"], "policy.json"),
        (["rollout", "--tasks", "push-v3", "--out", "o"], "--policy"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_stats_writes_what_training_counts(tmp_path, write_shards, capsys):
    shards = write_shards(tmp_path / "latents", episodes=4)
    assert main(["stats", "--latents", str(shards), "--out", str(tmp_path / "statistics.json")]) == 0
    statistics = Statistics.load(tmp_path / "statistics.json")
    assert statistics.actions.channels == ("x", "y", "still")
    assert statistics.digest[:16] in capsys.readouterr().out
