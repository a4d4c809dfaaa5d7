"""The plug-in for LeRobot: over a stand-in for LeRobot; and, if asked for, in LeRobot's own programs."""

import json
import subprocess
import sys
from pathlib import Path

import lerobot_stand_in
import numpy as np
import pytest
import torch
from repvitok.runtime.errors import UserError
from repwam_core.interface import Observation
from repwam_core.policy.execution import ChunkedPolicy
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.policy import Policy

TASKS = ["raise both arms", "lower both arms"]
CAMERAS = [f"observation.images.{name}" for name in ("head_camera", "left_camera", "right_camera")]


@pytest.fixture
def plug_in(root, monkeypatch):
    """The package, over the stand-in for LeRobot."""
    monkeypatch.syspath_prepend(root / "integrations/lerobot_policy_repwam/src")
    for name, module in lerobot_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lerobot_stand_in.PreTrainedConfig, "known", {})
    import lerobot_policy_repwam
    import lerobot_policy_repwam.__main__

    yield lerobot_policy_repwam
    for name in [name for name in sys.modules if name.startswith("lerobot_policy_repwam")]:
        del sys.modules[name]


@pytest.fixture
def make(plug_in, policy_folder):
    """A policy as LeRobot makes it of its configuration."""

    def make(**given):
        return plug_in.RepWAMPolicy(plug_in.RepWAMConfig(policy_folder=str(policy_folder), device="cpu", **given))

    return make


def draw(steps, episodes=2, seed=0):
    """Pictures (episodes, steps, 3 cameras, H, W, 3) of any brightness, and states (episodes, steps, 14)."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (episodes, steps, len(CAMERAS), 24, 40, 3), np.uint8)
    return pictures, rng.normal(size=(episodes, steps, 14)).astype(np.float32)


def batches(pictures, states, tasks=TASKS):
    """The same as LeRobot hands them in."""
    for now in range(pictures.shape[1]):
        seen = torch.from_numpy(pictures[:, now]).permute(1, 0, 4, 2, 3).float() / 255
        state = torch.from_numpy(states[:, now])
        yield {**dict(zip(CAMERAS, seen, strict=True)), "observation.state": state, "task": tasks}


def ours(policy_folder, pictures, states, task, seed, **plan):
    """Our own actions, (steps, 14), for one episode of the same."""
    policy = ChunkedPolicy(Policy(LoadedPolicy.load(policy_folder), **plan))
    policy.reset(task, seed)
    return np.stack(
        [
            policy.step(Observation(dict(zip(CAMERAS, pictures[now], strict=True)), states[now]))
            for now in range(len(pictures))
        ]
    )


def test_the_same_actions_as_ours(make, policy_folder):
    policy = make(seed=3)
    for first in (3, 5):  # a second rollout goes on counting
        pictures, states = draw(11, seed=first)
        policy.reset()
        answers = torch.stack([policy.select_action(batch) for batch in batches(pictures, states)], 1).numpy()
        assert answers.shape == (2, 11, 14)
        assert (np.ptp(answers, axis=1) > 0).mean() > 0.5  # some are clipped
        for row, task in enumerate(TASKS):
            expected = ours(policy_folder, pictures[row], states[row], task, first + row)
            np.testing.assert_allclose(answers[row], expected, rtol=1e-4, atol=1e-5)


def test_one_episode_told_in_one_string_and_planned_more_often(make, policy_folder):
    policy = make(n_action_steps=4)
    pictures, states = draw(9, episodes=1)
    answers = [policy.select_action(batch) for batch in batches(pictures, states, TASKS[1])]
    expected = ours(policy_folder, pictures[0], states[0], TASKS[1], 0, execute_frames=1)
    np.testing.assert_allclose(torch.cat(answers).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, ours(policy_folder, pictures[0], states[0], TASKS[1], 0), atol=1e-3)


def test_a_chunk_is_what_select_action_gives_one_by_one(make):
    one, other, (pictures, states) = make(), make(), draw(9)
    seen = list(batches(pictures, states))
    chunk = one.predict_action_chunk(seen[0])
    assert chunk.shape == (2, 8, 14)
    torch.testing.assert_close(chunk, torch.stack([other.select_action(batch) for batch in seen[:8]], 1))
    with pytest.raises(UserError, match="all frames since the last act"):  # frames in between were not handed in
        one.predict_action_chunk(seen[8])


def test_a_folder_for_lerobot_names_the_policy(plug_in, policy_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "for lerobot"
    program = sys.modules["lerobot_policy_repwam.__main__"]
    for _ in range(2):  # the second replaces the first
        monkeypatch.setattr(sys, "argv", ["lerobot_policy_repwam", str(policy_folder), str(out)])
        assert program.main() == 0
    assert f"--policy.path={out}" in capsys.readouterr().out
    written = json.loads((out / "config.json").read_text())
    assert (written["type"], written["device"]) == ("repwam", None)
    assert sorted(written["input_features"]) == [*CAMERAS, "observation.state"]
    assert written["output_features"]["action"]["shape"] == [14]
    steps = json.loads((out / "policy_preprocessor.json").read_text())
    assert steps == ["RenameObservationsProcessorStep", "AddBatchDimensionProcessorStep", "DeviceProcessorStep"]
    policy = plug_in.RepWAMPolicy.from_pretrained(out)
    assert not policy.training
    assert sum(parameter.numel() for parameter in policy.parameters()) > 0


def test_a_folder_that_is_no_policy_or_holds_something_else_is_refused(
    plug_in, policy_folder, tmp_path, monkeypatch, capsys
):
    program = sys.modules["lerobot_policy_repwam.__main__"]
    (tmp_path / "notes").write_text("mine")
    for policy, out, said in ((tmp_path, tmp_path / "out", "no policy folder"), (policy_folder, tmp_path, "notes")):
        monkeypatch.setattr(sys, "argv", ["lerobot_policy_repwam", str(policy), str(out)])
        assert program.main() == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_what_does_not_fit_is_one_sentence(make, plug_in):
    seven = {"action": lerobot_stand_in.PolicyFeature("ACTION", (7,))}
    for given, said in (
        ({"n_action_steps": 3}, "n_action_steps: expected a multiple of 4"),
        ({"output_features": seven}, "robot of 14 actions .* got one of .7,."),
    ):
        with pytest.raises(UserError, match=said):
            make(**given)
    with pytest.raises(UserError, match="policy_folder: expected a policy folder, got none"):
        plug_in.RepWAMPolicy(plug_in.RepWAMConfig())
    policy, (pictures, states) = make(), draw(2)
    first, second = batches(pictures, states)
    renamed = {key.replace("head_camera", "top"): value for key, value in first.items()}
    with pytest.raises(UserError, match=r"no \['observation.images.head_camera'\]; say which is which, --rename_map"):
        policy.select_action(renamed)
    policy.select_action(first)
    alone = {key: value[:1] for key, value in second.items()}
    with pytest.raises(UserError, match="observations of 2 episodes, got 1; call reset first"):
        policy.select_action(alone)
    for refuses in (lambda: policy.forward({}), policy.get_optim_params, policy.config.get_optimizer_preset):
        with pytest.raises(UserError, match="trained by `repwam fit`"):
            refuses()


@pytest.mark.lerobot
@pytest.mark.timeout(3600)
def test_lerobots_programs_get_the_same_actions_as_ours(lerobot_environment, root, policy_folder, tmp_path):
    """`lerobot-eval`, four episodes in two rows, and `lerobot-rollout`, as LeRobot publishes them."""
    names = ("repvitok", "latent-action", "repwam-client", "repwam-core")
    ours_there = [f"-e{root / 'packages' / name}" for name in names]
    plug_in = f"-e{root / 'integrations/lerobot_policy_repwam'}"
    python = lerobot_environment("policy", ["lerobot[dataset,evaluation]>=0.6,<0.7", *ours_there, plug_in])
    variables = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    variables["OMP_NUM_THREADS"] = "1"

    def run(*command):
        done = subprocess.run([python, *command], env=variables, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    run("-m", "lerobot_policy_repwam", policy_folder, tmp_path / "folder")
    run(Path(__file__).with_name("drive_lerobot.py"), tmp_path / "folder", tmp_path)
    overall = json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]
    assert (overall["pc_success"], overall["n_episodes"]) == (100.0, 4)
    files = {f"env-{episode}-{row}.npz": (TASKS[row], 7 + 2 * episode + row) for episode in (0, 1) for row in (0, 1)}
    for name, (task, seed) in {**files, "robot.npz": (TASKS[1], 7)}.items():
        kept = np.load(tmp_path / name)
        assert len(kept["actions"]) >= 9, name  # more than a chunk
        expected = ours(policy_folder, kept["pictures"], kept["states"], task, seed)
        np.testing.assert_allclose(kept["actions"], expected, rtol=1e-3, atol=1e-4, err_msg=name)
