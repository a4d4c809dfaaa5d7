"""gym-aloha behind our interface: its own layouts, physics and success, joint targets, and an expert that solves it."""

import json
import sys

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.interface import Observation
from repwam_core.sim.aloha import SENTENCES, AlohaSettings, AlohaTask, Arm, Hand
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL, find_suite
from repwam_core.sim.collect import NOISE_MODES, record_demonstration

SMALL = AlohaSettings(size=(32, 32), act_repeat=2)
RIGHT_GRIPPER, LEFT_GRIPPER = 13, 6


@pytest.fixture(scope="module")
def task():
    """One simulator for all tests: every one of them starts an episode of its own."""
    pytest.importorskip("gym_aloha")
    with AlohaTask("transfer-cube", SMALL) as made:
        yield made


def solve(task: AlohaTask, seed: int, extra_steps: int = 0) -> list[np.ndarray]:
    """The expert's actions until it succeeds, and some more."""
    task.start(seed)
    actions = []
    while not task.done or extra_steps:
        extra_steps -= task.done
        actions.append(task.expert_action())
        task.advance(actions[-1])
    return actions


def blind(task: AlohaTask) -> Observation:
    """An observation without rendering."""
    return Observation({"eye": np.zeros((2, 2, 3), np.uint8)}, task.state)


def test_channels_units_cameras_and_rate():
    robot = find_suite("aloha")(act_repeat=2).embodiment
    assert len(robot.action_names) == 14
    assert robot.action_names == robot.state_channels
    assert robot.action_names[:2] == ("left_waist", "left_shoulder")
    assert [name for name, unit in zip(robot.action_names, robot.action_units, strict=True) if unit == "1"] == [
        "left_gripper",
        "right_gripper",
    ]
    assert set(robot.action_units) == {"rad", "1"}
    assert robot.cameras == tuple(f"observation.images.{name}" for name in ("top", "left_wrist", "right_wrist"))
    assert (robot.rate_hz, AlohaSettings().embodiment.rate_hz) == (25.0, 50.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": (60, 64)}, r"multiples of 16 up to 4096, got \(60, 64\)"),
        ({"cameras": ("front",)}, r"got \['front'\]"),
        ({"cameras": ("top", "top")}, r"distinct cameras"),
        ({"act_repeat": 0}, "act_repeat must be at least 1, got 0"),
        ({"max_env_steps": 1001}, r"must lie in \[act_repeat, 1000\], got 1001"),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(UserError, match=words):
        AlohaSettings(**values)


def test_settings_survive_json_and_tasks_have_sentences_of_their_own():
    assert AlohaSettings.from_dict(SMALL.to_dict()) == SMALL
    for name in AlohaSettings.tasks:
        assert len(set(SENTENCES[name])) >= 4
        told = {SMALL.instruction(name, seed) for seed in range(100)}
        assert told == set(SENTENCES[name])
    with pytest.raises(UserError, match="unknown gym-aloha task 'transfer'; did you mean transfer-cube"):
        AlohaSettings.task_name("transfer")


def test_what_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gym_aloha", None)
    collect = ["collect", "--suite", "aloha", "--tasks", "transfer-cube", "--episodes", "1", "--workers", "1"]
    assert main([*collect, "--out", str(tmp_path / "data")]) == 2
    assert "pip install 'repwam-core[aloha]'" in capsys.readouterr().err


@pytest.mark.sim
class TestSimulation:
    def test_it_is_gym_aloha(self, task):
        """The same joints, cube and success as its own environment, step by step to the end, whatever ran before."""
        from gym_aloha.env import AlohaEnv

        theirs = AlohaEnv("transfer_cube")
        picture = {"images": {"top": np.zeros((2, 2, 3), np.uint8)}}
        theirs._env.task.get_observation = lambda physics: picture  # theirs draws three large ones in every step
        with AlohaTask("transfer-cube") as ours:
            solve(ours, 1)
            ours.start(7)
            theirs.reset(seed=7)
            while not ours.done:
                action = ours.expert_action()
                ours.advance(action)
                _, _, terminated, _, _ = theirs.step(action.astype(np.float64))
                np.testing.assert_array_equal(ours._physics.data.qpos, theirs._env.physics.data.qpos)
                assert ours.success == terminated
            assert ours.success

    def test_the_seed_decides_whatever_ran_before(self, task):
        first = solve(task, 3)
        other = solve(task, 4)
        again = solve(task, 3)
        np.testing.assert_array_equal(first, again)
        assert len(first) != len(other) or not np.array_equal(first, other)

    @pytest.mark.parametrize("seed", [0, 10, 1_000_000])
    def test_the_expert_hands_the_cube_over(self, task, seed):
        """The left hand alone holds it in the end; success comes before, as the left hand touches it."""
        actions = np.stack(solve(task, seed, extra_steps=20))
        assert (np.abs(actions) <= task.action_limits + 1e-6).all()
        ended = task.distances()
        assert ended[OBJECT_TO_GOAL] < 0.03
        assert ended[HAND_TO_OBJECT] > 0.08
        assert task._cube_m()[2] > 0.15
        assert 30 < len(actions) - 20 < task.max_steps == 200

    def test_a_recorded_demonstration_solves_its_layout_again(self, task, monkeypatch):
        monkeypatch.setattr(task, "observe", lambda: blind(task))
        shown = record_demonstration(task, 5)
        assert shown is not None
        assert shown.state is not None
        assert shown.state.shape == shown.action.shape == (len(shown), 14)
        task.start(5)
        for action in shown.action:
            task.advance(action)
        assert task.success
        task.start(6)
        for action in shown.action:
            task.advance(action)
        assert not task.success  # the cube lies elsewhere

    @pytest.mark.parametrize("mode", ["pushes", "gaussian"])
    def test_the_expert_recovers_from_disturbances(self, task, monkeypatch, mode):
        monkeypatch.setattr(task, "observe", lambda: blind(task))
        calm, disturbed = (record_demonstration(task, 2, NOISE_MODES[name]) for name in ("none", mode))
        assert calm is not None
        assert disturbed is not None
        assert not np.array_equal(calm.action[:20], disturbed.action[:20])

    def test_a_joint_goes_where_it_is_sent_in_equal_parts(self, task):
        task.start(0)
        action = task.state
        action[0] += 0.2
        action[LEFT_GRIPPER] = 1.0
        for _ in range(30):
            task.advance(action)
        assert task.state[0] == pytest.approx(action[0], abs=0.01)
        assert task.state[LEFT_GRIPPER] == pytest.approx(1.0, abs=0.1)
        task.advance(np.full(14, 9.0))
        np.testing.assert_array_equal(task._target, task._high)

    def test_random_actions_stay_in_the_joints_ranges(self, task):
        rng = np.random.default_rng(0)
        drawn = np.stack([task.random_action(rng) for _ in range(200)])
        assert (drawn >= task._low - 1e-6).all()
        assert (drawn <= task._high + 1e-6).all()
        assert drawn[:, RIGHT_GRIPPER].min() >= 0.0
        assert (np.ptp(drawn, axis=0) > 0.9 * (task._high - task._low)).all()

    def test_a_wrong_action_is_refused(self, task):
        with AlohaTask("transfer-cube", SMALL) as fresh, pytest.raises(RuntimeError, match="start the episode"):
            fresh.advance(np.zeros(14))
        task.start(0)
        with pytest.raises(UserError, match="expected 14 finite numbers"):
            task.advance(np.zeros(7))
        with pytest.raises(UserError, match="expected 14 finite numbers"):
            task.advance(np.full(14, np.nan))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_joint_angles_bring_the_hand_where_they_should(self, task, side):
        """Against MuJoCo's own kinematics, over places and turns that the arm reaches."""
        import mujoco

        model, data = task._physics.model.ptr, mujoco.MjData(task._physics.model.ptr)
        arm, first = Arm(model, side), {"left": 0, "right": 8}[side]
        rng = np.random.default_rng(0)
        middle = np.array([0.0, 0.5, 0.2])
        for _ in range(50):
            wanted = Hand(middle + rng.uniform(-0.12, 0.12, 3), rng.uniform([-0.4, 0.2, -1.2], [0.4, 1.2, 1.2]), 0.5)
            data.qpos[first : first + 6] = arm.joints(wanted)[:6]
            mujoco.mj_kinematics(model, data)
            reached = arm.hand(data, 0.5)
            np.testing.assert_allclose(reached.pos_m, wanted.pos_m, atol=1e-6)
            np.testing.assert_allclose(reached.turn_rad, wanted.turn_rad, atol=1e-6)


@pytest.mark.sim
@pytest.mark.usefixtures("rendering")
class TestPictures:
    def test_cameras_see_different_things_and_the_wrist_sees_the_cube(self, task):
        def red(picture: np.ndarray) -> float:
            """Share of the picture."""
            channels = picture.astype(int)
            return float(((channels[..., 0] > 120) & (channels[..., 1:] < 90).all(axis=-1)).mean())

        seen = task.reset(0)
        start = [seen.frames(camera)[0] for camera in seen.cameras]
        assert [picture.shape for picture in start] == [(32, 32, 3)] * 3
        assert not any(np.array_equal(start[i], start[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        solve(task, 0)
        _, left, right = (task.observe().frames(camera)[0] for camera in seen.cameras)
        assert red(start[2]) == 0.0
        assert min(red(left), red(right)) > 0.05

    def test_a_longer_lens_shows_the_cube_larger_and_does_not_stay_on(self):
        settings = AlohaSettings(("top", "top_close"), (64, 64))
        with AlohaTask("transfer-cube", settings) as task:
            first, again = task.reset(0), task.observe()
        far, close = (first.frames(camera)[0].astype(int) for camera in first.cameras)
        np.testing.assert_array_equal(far, again.frames(first.cameras[0])[0])
        cubes = [((seen[..., 0] > 100) & (seen[..., 1] < 60)).sum() for seen in (far, close)]
        assert cubes[1] > 2 * cubes[0] > 0

    def test_collecting_and_rolling_out_by_name_and_again(self, tmp_path, capsys):
        given = ["--suite", "aloha", "--tasks", "transfer-cube", "--act-repeat", "2", "--workers", "1"]
        collect = ["collect", *given, "--size", "32", "32", "--episodes", "1", "--out", str(tmp_path / "data")]
        assert main(collect) == main(collect) == 0
        reader = LeRobotReader(tmp_path / "data")
        assert (reader.num_episodes, reader.fps) == (1, 25)
        assert reader.episodes[0].task in SENTENCES["transfer-cube"]
        assert reader.frame_size("observation.images.right_wrist") == (32, 32)
        rollout = ["rollout", *given, "--baseline", "expert", "--episodes", "2", "--out", str(tmp_path / "expert")]
        assert main(rollout) == 0
        results = tmp_path / "expert" / "results.json"
        kept = results.read_bytes()
        assert main(rollout) == 0
        assert (results.read_bytes(), json.loads(kept)["rates"]["all"]["successes"]) == (kept, 2)
        assert "transfer-cube: 2/2" in capsys.readouterr().out
