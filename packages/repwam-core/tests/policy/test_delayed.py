"""A real policy folder with delay: committed actions begin the chunk, the history is what was carried out."""

import importlib
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.runtime.errors import UserError
from repwam_core.cli import EXECUTIONS, main
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy, Policy
from repwam_core.policy import execution as executions
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.runner import Runner
from repwam_core.policy.serving import PolicyClient, PolicyServer, ServeSettings
from repwam_core.policy.serving.command import metadata_of
from repwam_core.sampling import ChunkSpec

ROOT = Path(__file__).parents[4]


@pytest.fixture
def blind(monkeypatch):
    """The suite's module, on the path as a user's would be: worker processes import it by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("blind_simulator")


def observe(world, first, last, episode=0):
    reader = LeRobotReader(world.dataset)
    images = {camera: reader.frames(episode, camera, range(first, last)) for camera in reader.camera_keys}
    return Observation(images, reader.episode(episode)["observation.state"][first:last].astype(np.float32))


def test_a_chunk_begins_with_the_committed_actions_alone_and_in_a_batch(world):
    policy = Policy.from_pretrained(world.policy, execute_frames=2, clip=False)
    committed = np.array([[0.5, -0.2, 0.1], [0.4, -0.1, 0.2], [0.3, 0.0, 0.3]], np.float32)

    def second(rows):
        policy.reset("go left", 0)
        policy.act(observe(world, 0, 1))
        if rows is not None:
            policy.commit(rows)
        return policy.act(observe(world, 1, 5)).actions

    free, frozen = second(None), second(committed)
    np.testing.assert_allclose(frozen[:3], committed, atol=1e-5)
    assert np.abs(frozen[3:] - free[3:]).max() > 1e-4
    np.testing.assert_array_equal(second(committed[:0]), free)
    batched = BatchedPolicy.from_pretrained(world.policy, execute_frames=2, clip=False)
    batched.reset(["go up", "go left"], [1, 0])
    batched.act([observe(world, 0, 1, 1), observe(world, 0, 1)])
    batched.commit([committed[::-1].copy(), committed])
    chunks = batched.act([observe(world, 1, 5, 1), observe(world, 1, 5)])
    np.testing.assert_allclose(chunks[1].actions, frozen, atol=1e-4)
    assert batched._now.committed is None
    for wrong, message in (
        ([committed], "for each of 2 episodes"),
        ([committed, committed[:2]], "for each of 2 episodes"),
        ([committed[:, :2]] * 2, r"shape \(m, 3\), m < 8, .* got \(3, 2\)"),
        ([np.zeros((8, 3))] * 2, r"m < 8"),
        ([np.full((1, 3), np.nan)] * 2, "finite"),
    ):
        with pytest.raises(UserError, match=message):
            batched.commit(wrong)


def test_a_policy_gives_without_noise_what_its_training_gave_so(world):
    committed = np.array([[0.5, -0.2, 0.1], [0.4, -0.1, 0.2], [0.3, 0.0, 0.3]], np.float32)
    plain = LoadedPolicy.load(world.policy)
    chunks = ChunkSpec(smallest=1, largest=2, delay=2)
    trained = replace(plain, manifest=replace(plain.manifest, chunks=chunks))
    assert ChunkSpec(**chunks.to_dict()) == chunks
    assert set(ChunkSpec(smallest=1, largest=2).to_dict()) == {"smallest", "largest"}

    def second(parts, m):
        policy = Policy(parts, execute_frames=2, clip=False)
        policy.reset("go left", 0)
        policy.act(observe(world, 0, 1))
        policy.commit(committed[:m])
        return policy.act(observe(world, 1, 5)).actions

    np.testing.assert_allclose(second(trained, 2)[:2], committed[:2], atol=1e-5)
    assert np.abs(second(trained, 2)[2:] - second(plain, 2)[2:]).max() > 1e-5
    np.testing.assert_array_equal(second(trained, 3), second(plain, 3))  # more than its training gave


def drive(policy, task, steps):
    """What the robot carries out in so many steps, with planning that is done within the step."""
    actions, observation = [], task.reset(0)
    with Runner(policy, execute=4, overlap=2) as runner:
        runner.reset("go left", seed=3)
        for _ in range(steps):
            if runner._pending is not None:
                runner._pending.exception(timeout=60)
            actions.append(runner.step(observation))
            observation = task.step(actions[-1])
    return np.stack(actions)


def test_a_served_policy_is_run_as_a_local_one(world, blind):
    """The same seed, the same frames, the same committed actions: the same episode."""

    def new_policy():
        return Policy.from_pretrained(world.policy, execute_frames=2)

    local = new_policy()
    server = PolicyServer(new_policy, metadata_of(local), ServeSettings(port=0))
    task = blind.BlindSettings().make_task("go")
    expected = drive(local, task, 17)
    with server.running() as port, PolicyClient(port=port) as client:
        assert (client.frames_per_latent, client.action_kind) == (4, local.action_kind)
        np.testing.assert_allclose(drive(client, task, 17), expected, atol=1e-5)


def test_the_command_line_counts_the_delay_in_steps(world, blind, tmp_path, capsys):
    assert EXECUTIONS == executions.EXECUTIONS
    rollout = ["rollout", "--suite", "blind", "--tasks", "go", "--policy", str(world.policy), "--episodes", "2"]
    rollout += ["--workers", "1"]
    for execution in EXECUTIONS:
        given = ["--execution", execution, "--delay", "2", "--out", str(tmp_path / execution)]
        assert main([*rollout, *given]) == 0, capsys.readouterr().err
        about = json.loads((tmp_path / execution / "results.json").read_text())["about"]
        assert (about["execution"], about["delay"]) == (execution, 2)
        assert about["plan"]["execute_frames"] == (1 if execution == "wait" else None)
    assert main([*rollout, "--out", str(tmp_path / "plain")]) == 0
    assert "delay" not in json.loads((tmp_path / "plain" / "results.json").read_text())["about"]
    assert main([*rollout, "--execution", "naive", "--delay", "6", "--out", str(tmp_path / "late")]) == 2
    assert "a delay of 6 steps leaves nothing of a chunk of 8 actions" in capsys.readouterr().err
    baseline = [*rollout[:5], "--baseline", "random", "--delay", "1", "--out", str(tmp_path / "random")]
    assert main(baseline) == 2
    assert "--delay" in capsys.readouterr().err


def test_the_table_of_delays(world, blind, tmp_path, capsys):
    path = ROOT / "benchmarks/delayed_execution.py"
    if not path.exists():
        pytest.skip("the repository's script, which no package holds")
    given = {"policy": world.policy, "suite": "blind", "tasks": "go", "episodes": 1, "workers": 1, "out": tmp_path}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    runpy.run_path(str(path))["main"]([*arguments, "--delays", "0", "4", "6"])
    table = capsys.readouterr().out
    assert "| execution | 0 steps (0 ms) | 4 steps (200 ms) | 6 steps (300 ms) |" in table
    driven = "0/1 (0.00 to 0.79)"
    assert f"| regrounded | {driven} | {driven} | - |" in table  # 4 of 8 actions lie between two requests
