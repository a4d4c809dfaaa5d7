"""The command `repwam`: quick to answer, one line and exit code 2 for mistakes, nothing lost."""

import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from repwam_core.cli import _verdict, main
from repwam_core.sampling import SamplingConfig
from repwam_core.sim.results import EpisodeResult
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
    "show",
    "rollout",
    "plan",
    "openloop",
)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_without_torch(option):
    code = f"""
import sys
from repwam_core.cli import _verdict, main
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
        (["rollout", "--tasks", "push", "--out", "o", "--baseline", "expert", "--guidance", "2"], "--guidance: how a"),
        (["export", "--ckpt", "/no/such/folder", "--out", "o", "--wam-only", "--no-clip"], "--clip: how a policy"),
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


def test_the_verdict_counts_channels_that_beat_both_controls():
    errors = {"policy": {"x": 1.0, "y": 1.0}, "mean action": {"x": 2.0, "y": 2.0}, "last": {"x": 3.0, "y": 0.5}}
    assert _verdict(errors) == "better than both controls on 1 of 2 channels: it is not expected to drive the robot"
    assert _verdict(errors | {"last": {"x": 3.0, "y": 1.5}}) == "better than both controls on 2 of 2 channels"


@pytest.mark.parametrize("verb", ["rollout", "openloop", "serve", "export"])
def test_every_verb_that_drives_takes_all_settings_of_planning(verb, capsys):
    assert main([verb, "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')} " in told.replace(",", " ") for field in fields(SamplingConfig))
    assert ("--device" in told) == (verb != "export")


def test_rollout_plans_as_it_was_told_and_says_so(monkeypatch, tmp_path):
    """The policy and the simulator are others' tests; here is what they are given."""
    seen = {}

    def load(folder, device, **plan):
        manifest = SimpleNamespace(digests={"wam": "0" * 64})
        return SimpleNamespace(plan=SamplingConfig(**plan), parts=SimpleNamespace(manifest=manifest), device=device)

    def evaluate(policy, tasks, seeds, **given):
        seen.update(given, device=policy.device)
        return [EpisodeResult(tasks[0], seeds[0], None, True, 3)]

    monkeypatch.setattr("repwam_core.policy.policy.BatchedPolicy.from_pretrained", load)
    monkeypatch.setattr("repwam_core.sim.evaluate.evaluate", evaluate)
    given = ["--device", "cuda:1", "--video", "skip", "--action-steps", "3", "--action-shift", "2.5", "--no-clip"]
    assert main(["rollout", "--policy", "p", "--tasks", "push", "--out", str(tmp_path), *given]) == 0
    plan = asdict(SamplingConfig(video="skip", action_steps=3, action_shift=2.5, clip=False))
    assert seen["device"] == "cuda:1"
    assert seen["about"] == {"policy": "p", "digests": {"wam": "0" * 64}, "device": "cuda:1", "plan": plan}
    assert seen["out"] == tmp_path
