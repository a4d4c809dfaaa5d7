"""The folder that drops into RoboTwin's policy/, driven by a stand-in that keeps to RoboTwin's published contract."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from repvitok.runtime.errors import UserError
from repwam_core.interface import Embodiment, two_arm_names
from repwam_core.sim.robotwin import RoboTwinPolicy, RoboTwinSettings, read_results
from robotwin_stand_in import StandInTask, evaluate, task_config

SETTINGS = {"seed": 0, "policy_name": "repwam", "task_name": "stand_in", "instruction_type": "unseen"}


def begin(model, **changed):
    """An episode of the stand-in in which the policy is asked for its first action next."""
    task = StandInTask()
    task.setup_demo(seed=100000, is_test=True, eval_mode=True, **task_config(**changed))
    task.set_instruction("lower both arms")
    model.reset()
    return task


def test_every_frame_is_seen_once_and_the_task_is_solved(drop_in, serve, tmp_path):
    task = StandInTask()
    given = {**SETTINGS, "server": serve(), "test_num": 4, "log": str(tmp_path / "log.json")}
    assert evaluate(task, drop_in, given, task_config()) == 4
    log = json.loads((tmp_path / "log.json").read_text())
    assert [episode["seed"] for episode in log] == [100000, 100001, 100002, 100003]
    for episode in log:
        # One observation, the instruction, one action; the last one is the environment's own, after success.
        assert episode["calls"] == ["get_obs", "get_instruction", "take_action"] * 5 + ["get_obs"]
        goal = np.array([[0.1, 0.2, 0.3, 0.4, 0.5]]).T * (-1) ** (episode["seed"] + 1 - 100000)
        expected = np.repeat(goal, 14, axis=1)
        expected[:, [6, 13]] = 1.0
        np.testing.assert_allclose(episode["actions"], expected, atol=1e-6)


def test_eval_sh_runs_it_in_a_python_without_torch(robotwin, serve, without_torch):
    command = ["bash", "policy/repwam/eval.sh", "stand_in", "demo_clean", "tiny", "0", "0"]
    more = ["--server", serve(), "--test_num", "2"]
    done = subprocess.run([*command, *more], cwd=robotwin, env=without_torch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = robotwin.glob("eval_result/stand_in/repwam/demo_clean/tiny/*/_result.txt")
    assert result.read_text().splitlines()[2:] == ["Instruction Type: unseen", "", "1.0"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to make an environment")
def test_the_client_needs_what_the_documentation_installs_and_runs_on_numpy_1(root, robotwin, serve, make_environment):
    """RoboTwin pins scipy 1.10, which wants numpy below 2."""
    told = r"^ *(?:python -m )?pip install repwam-client ([a-z].*)$"
    documents = "docs/install.md", "docs/robotwin.md", "integrations/xpolicylab/RepWAM/install.sh"
    (packages,) = {found for name in documents for found in re.findall(told, (root / name).read_text(), re.MULTILINE)}
    client = tomllib.loads((root / "packages/repwam-client/pyproject.toml").read_text())["project"]["dependencies"]
    _, variables = make_environment("numpy<2", *client, *packages.split())
    command = ["bash", "policy/repwam/eval.sh", "stand_in", "demo_clean", "tiny", "0", "0", "--server", serve()]
    done = subprocess.run([*command, "--test_num", "2"], cwd=robotwin, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [run.successes for run in read_results(robotwin / "eval_result", episodes=2)] == [2]


def test_eval_sh_says_what_it_takes(robotwin, without_torch):
    done = subprocess.run(["bash", "policy/repwam/eval.sh", "stand_in"], cwd=robotwin, env=without_torch, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 2
    assert "bash eval.sh TASK TASK_CONFIG NAME SEED GPU [--KEY VALUE ...]" in done.stderr


def test_nothing_is_asked_for_beyond_the_step_limit(drop_in, walker):
    class Lost(walker):
        def act(self, observation):
            chunk = super().act(observation)
            chunk.actions[:] = 0.25
            return chunk

    task = StandInTask(step_lim=10)
    model = RoboTwinPolicy(Lost)
    policy = type("Policy", (), {"get_model": lambda given: model, "eval": drop_in.eval,
                                 "reset_model": drop_in.reset_model})  # fmt: skip
    assert evaluate(task, policy, {**SETTINGS, "test_num": 2}, task_config()) == 0
    assert task.calls == ["get_obs", "get_instruction", "take_action"] * 10


def test_draws_differ_from_episode_to_episode_and_seed_to_seed(walker):
    seeds = []
    for seed in (0, 1):
        made = []
        model = RoboTwinPolicy(lambda made=made: made.append(walker()) or made[-1], seed=seed)
        for _ in range(2):
            task = begin(model)
            model.reset()  # once more, as some loops do
            model.step(task, task.get_obs())
            seeds.append(made[-1].seed)
    assert seeds == [100000, 100001, 200000, 200001]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"collect_wrist_camera": False}, r"no pictures of \['left_camera', 'right_camera'\].*collect_wrist_camera"),
        ({"rgb": False}, "no pictures of .*data_type rgb"),
        ({"qpos": False}, "no joint_action vector: .*data_type qpos"),
        ({"head_camera_type": "L515"}, r"head_camera: expected pictures of 240 x 320, got 180 x 320; are cameras"),
    ],
)
def test_a_task_config_that_gives_too_little_is_said(walker, changed, message):
    model = RoboTwinPolicy(walker, picture_size=(240, 320))
    task = begin(model, **changed)
    with pytest.raises(UserError, match=message) as refused:
        model.step(task, task.get_obs())
    assert "\n" not in str(refused.value)
    assert task.take_action_cnt == 0


def _rgba(seen):
    seen["observation"]["left_camera"]["rgb"] = np.zeros((240, 320, 4), np.uint8)


def _floats(seen):
    seen["observation"]["left_camera"]["rgb"] = np.zeros((240, 320, 3))


def _franka(seen):
    seen["joint_action"]["vector"] = np.zeros(16)


def _not_a_number(seen):
    seen["joint_action"]["vector"][9] = np.nan


def _exchanged(seen):
    seen["observation"]["head_camera"]["rgb"] = np.zeros((180, 320, 3), np.uint8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rgba, r"cam_left_wrist' must have shape \(H, W, 3\)"),
        (_floats, "cam_left_wrist' must be a uint8"),
        (_franka, r"expected 14 joint positions \(left_arm_0, .*got shape \(16,\)"),
        (_not_a_number, "expected finite joint positions, got right_arm_2 nan"),
        (_exchanged, r"cam_high': expected pictures of 240 x 320, got 180 x 320; are the cameras exchanged"),
    ],
)
def test_a_bad_observation_stops_the_episode_in_one_line(walker, spoil, message):
    model = RoboTwinPolicy(walker)
    task = begin(model)
    for _ in range(2):
        model.step(task, task.get_obs())
    spoil(seen := task.get_obs())
    with pytest.raises(UserError, match=f"RoboTwin, episode 0: .*{message}") as refused:
        model.step(task, seen)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="episode 0 has failed; call reset_model"):  # a frame is missing: no way on
        model.step(task, task.get_obs())
    assert task.take_action_cnt == 2
    model.step(again := begin(model), again.get_obs())
    assert (model.episode, again.take_action_cnt) == (1, 1)


def test_a_policy_that_fails_stops_the_episode_in_one_line(walker):
    class Failing(walker):
        def act(self, observation):
            if self.acts:
                raise RuntimeError("out of memory")
            return super().act(observation)

    model = RoboTwinPolicy(Failing)
    task = begin(model)
    for _ in range(4):
        model.step(task, task.get_obs())
    with pytest.raises(UserError, match="episode 0: stopped after 4 actions: RuntimeError: out of memory"):
        model.step(task, task.get_obs())


def test_an_episode_begins_with_a_reset(walker):
    model = RoboTwinPolicy(walker)
    with pytest.raises(UserError, match="call reset_model before eval"):
        model.step(StandInTask(), {})


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        (("xyz", "xyz", ()), r"policy of the 14 channels left_arm_0, .*got 'robot' with 3 actions \(x, y, z\)"),
        ((two_arm_names(), ["left_arm_0", "torso"], ()), r"2 states \(left_arm_0, torso\)"),
        ((two_arm_names((7, 7)), (), ()), "with 16 actions"),
        ((two_arm_names(), (), ["top"]), "expected each of the policy's to be another of RoboTwin's head_camera"),
        ((two_arm_names(), (), ["a.head_camera", "b.cam_high"]), r"'a.head_camera': 'head_camera', 'b.cam_high'"),
    ],
)  # fmt: skip
def test_a_policy_of_another_robot_is_refused_before_anything_moves(serve, robot, message):
    actions, states, cameras = robot
    other = Embodiment.from_names("robot", list(actions), list(states), list(cameras), 10.0)
    with pytest.raises(UserError, match=message):
        RoboTwinPolicy.from_settings({"server": serve(robot=other)})


def test_a_policy_of_changes_is_refused(serve):
    with pytest.raises(UserError, match="actions are joint positions, those of 'aloha-agilex' are changes"):
        RoboTwinPolicy.from_settings({"server": serve(action_kind="relative")})


def test_cameras_can_be_named(walker):
    cameras = dict(zip(walker.embodiment.cameras, ("left_camera", "head_camera", "right_camera"), strict=True))
    model = RoboTwinPolicy(walker, cameras=cameras)
    model.step(task := begin(model), task.get_obs())
    assert task.take_action_cnt == 1
    twice = {**cameras, walker.embodiment.cameras[1]: "left_camera"}
    with pytest.raises(UserError, match="another of RoboTwin's"):
        RoboTwinPolicy(walker, cameras=twice)
    with pytest.raises(UserError, match="a RoboTwin camera for each"):
        RoboTwinPolicy(walker, cameras={"top": "head_camera"})


def test_arms_of_seven_joints():
    assert two_arm_names((7, 7))[6:9] == ("left_arm_6", "left_gripper", "right_arm_0")
    assert len(two_arm_names((7, 7))) == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either server .* or policy"),
        ({"server": "ws://127.0.0.1:1", "policy": "policy"}, "either server .* or policy"),
        ({"server": "ws://127.0.0.1:1", "timeout_s": 0}, "timeout_s"),
        ({"server": "ws://127.0.0.1:1", "picture_size": [240]}, "picture_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        RoboTwinSettings.of({**SETTINGS, **given})


def test_no_server_is_one_sentence():
    with pytest.raises(UserError, match=r"no policy at ws://127.0.0.1:9 \(.*\); start `repwam serve --policy FOLDER`"):
        RoboTwinPolicy.from_settings({"server": "ws://127.0.0.1:9"})


def test_the_settings_file_is_read(drop_in, serve):
    written = yaml.safe_load(Path(drop_in.__file__).with_name("deploy_policy.yml").read_text())
    model = drop_in.get_model({**written, "server": serve(), "seed": 3, "left_arm_dim": 6, "right_arm_dim": 6})
    assert (model.picture_size, model.seed) == ((240, 320), 3)


# -- a real policy, a real server --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_policy_acts_through_the_server_as_in_robotwins_process_until_the_server_dies(
    drop_in, robotwin, policy_folder, without_torch, tmp_path
):
    """The whole way: recorded HDF5 files, a policy of them, `repwam serve`, eval.sh; and the same without a server."""
    given = {**SETTINGS, "policy": str(policy_folder), "test_num": 2, "log": str(tmp_path / "here.json")}
    here = evaluate(StandInTask(step_lim=18), drop_in, given, task_config())
    with serving(policy_folder) as (process, address):
        command = ["bash", "policy/repwam/eval.sh", "stand_in", "demo_clean", "tiny", "0", "0", "--server", address]
        more = ["--test_num", "2", "--step_lim", "18", "--log", str(tmp_path / "there.json")]
        done = subprocess.run([*command, *more], cwd=robotwin, env=without_torch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        compare(*(json.loads((tmp_path / f"{place}.json").read_text()) for place in ("here", "there")))
        (run,) = read_results(robotwin / "eval_result", episodes=2)
        assert (run.task, run.config, run.successes) == ("stand_in", "demo_clean", here)

        model = RoboTwinPolicy.from_settings({"server": address, "timeout_s": 600})
        task = begin(model)
        for _ in range(8):
            model.step(task, task.get_obs())
        process.kill()
        process.wait()
        with pytest.raises(UserError, match=r"episode 0: stopped after 8 actions: .*(closed|gone)") as stopped:
            model.step(task, task.get_obs())
        assert "\n" not in str(stopped.value)
        assert task.take_action_cnt == 8
        with pytest.raises(UserError, match=f"no policy at {address}"):  # the evaluation ends: no episode fails unseen
            model.reset()


@contextmanager
def serving(policy):
    """`repwam serve` in a process of its own; the process and its address."""
    program = "import sys; from repwam_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "--policy", str(policy), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving on ws://127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def compare(here, there):
    """Two logs of the same episodes: the same calls, and the same actions, of which every channel moves."""
    for alone, served in zip(here, there, strict=True):
        assert alone["calls"] == served["calls"] == ["get_obs", "get_instruction", "take_action"] * 18
        np.testing.assert_allclose(alone["actions"], served["actions"], rtol=1e-4, atol=1e-5)
        assert np.ptp(alone["actions"], axis=0).min() > 0
