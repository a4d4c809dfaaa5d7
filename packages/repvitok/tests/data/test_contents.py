"""What a data set holds is said before it is read: columns under other names, cameras without files, still channels."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from repvitok.data.contents import columns_like, describe_contents, missing_actions, number_columns, suggest_layout
from repvitok.data.folders import split_folder
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.runtime.errors import UserError

TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture(params=["v2.1", "v3.0"])
def data_set(data_sets, tmp_path, request):
    """A data set of four episodes to change, in both formats."""
    return shutil.copytree(data_sets[request.param], tmp_path / "arm")


def change_info(root, change) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def rename(root, names: dict[str, str]) -> None:
    """Other names of columns, in info.json and in the tables."""
    renamed = lambda info: {names.get(key, key): value for key, value in info["features"].items()}  # noqa: E731
    change_info(root, lambda info: info.update(features=renamed(info)))
    for path in root.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)


def described(root, cameras=(TOP, WRIST), episodes=None):
    reader = LeRobotReader(root)
    return describe_contents(
        reader, cameras, [info for info in reader.episodes if info.index in (episodes or range(4))]
    )


def test_what_is_there_takes_one_line(data_set):
    assert described(data_set, (TOP,)).lines() == [
        f"{data_set}: 4 episodes, 40 frames at 20 Hz; found action (2 channels) and observation.state (3 channels), an "
        f"instruction in 4 of 4 episodes; takes {TOP} (not {WRIST})"
    ]


def test_columns_under_other_names_become_a_layout(data_set):
    rename(data_set, {"action": "actions", "observation.state": "observations.qpos"})
    _, missed = described(data_set).lines()
    assert 'later stages will find no robot actions (no column "action"), which probe, stats, stage two' in missed
    assert 'no robot states (no column "observation.state"; optional)' in missed
    assert f"`repwam prepare --dataset {data_set} --layout layout.yaml --out PREPARED`" in missed
    assert missed.endswith(
        "layout.yaml: {embodiment: arm, action: [{column: actions, names: [dx, dy]}], "
        f"state: [{{column: observations.qpos, names: [x, y, z]}}], cameras: [{TOP}, {WRIST}]}}"
    )
    rename(data_set, {"actions": "foo", "observations.qpos": "bar"})
    _, missed = described(data_set).lines()
    assert "Of numbers there are bar, foo, contact: if one of them holds the actions, name it in a layout" in missed
    with pytest.raises(UserError, match=r"none that is called like one\. Of numbers there are bar, foo, contact: "):
        describe_contents(LeRobotReader(data_set), (TOP,), []).announce(needs_actions=True)


@pytest.mark.parametrize(
    ("columns", "actions", "states"),
    [
        (["actions", "state"], ["actions"], ["state"]),
        (["action", "observation.states"], ["action"], ["observation.states"]),
        (["observation.state", "rel_actions", "actions"], ["actions"], ["observation.state"]),
        (
            ["actions.arm.position", "states.arm.position", "states.gripper"],
            ["actions.arm.position"],
            ["states.arm.position", "states.gripper"],
        ),
        (["command", "joint_positions"], ["command"], ["joint_positions"]),
        (["observations/qpos", "observations/qvel", "leader/arm"], ["leader/arm"], ["observations/qpos"]),
        (["robot_obs", "scene"], [], ["robot_obs"]),
        (["contact", "weight"], [], []),
    ],
)
def test_columns_are_told_by_the_words_in_their_names(columns, actions, states):
    named = dict.fromkeys(columns, ("x",))
    assert columns_like("action", named) == actions
    assert columns_like("observation.state", named) == states


def test_bookkeeping_text_and_pictures_are_no_candidates(data_set):
    def add(info):
        numbers = {
            "next.action": [2], "annotation.human.action": [1], "action_is_pad": [1], "subtask_index": [1],
            "observation.depth_action": [480, 640],
        }  # fmt: skip
        info["features"] |= {key: {"dtype": "float32", "shape": shape, "names": None} for key, shape in numbers.items()}
        info["features"]["action.language"] = {"dtype": "string", "shape": [1], "names": None}

    change_info(data_set, add)
    assert set(number_columns(LeRobotReader(data_set))) == {"action", "observation.state", "contact"}


def test_channels_of_one_name_are_numbered():
    layout = suggest_layout({"actions.left": ("x", "y"), "actions.right": ("x", "y")}, ["top"], "arm")
    assert layout is not None
    assert "names: [actions.left_0, actions.left_1]" in layout
    assert suggest_layout({"contact": ("x",)}, ["top"], "arm") is None
    assert "Of numbers there are contact" in missing_actions("arm", {"contact": ("x",)}, ["top"])
    assert "no other column of numbers" in missing_actions("arm", {}, ["top"])
    assert "encode what that writes" in missing_actions("arm", None, ["top"])


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_a_camera_that_was_never_recorded_is_named_with_the_option_that_leaves_it_out(data_set, dtype):
    change_info(data_set, lambda info: info["features"].update({"ego": {**info["features"][TOP], "dtype": dtype}}))
    with pytest.raises(UserError, match=rf"the camera ego, but it was never recorded .*--cameras {TOP} {WRIST}"):
        described(data_set, (TOP, "ego", WRIST))
    with pytest.raises(UserError, match="there is no other camera"):
        described(data_set, ("ego",))
    assert len(described(data_set).lines()) == 1
    with pytest.raises(UserError, match=rf"the camera ego, but it was never recorded .*--cameras {TOP} {WRIST}"):
        split_folder(str(data_set))
    assert len(split_folder(str(data_set), cameras=[TOP]).train) == 1
    with pytest.raises((UserError, FileNotFoundError), match=r"ego.*if this camera was never recorded, .*--cameras"):
        LeRobotReader(data_set)[0]


@pytest.mark.parametrize("content", [b"PAR1 cut short", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_a_damaged_table_of_pictures_is_named(data_set, content):
    change_info(data_set, lambda info: info["features"][TOP].update(dtype="image"))
    last = sorted(data_set.glob("data/**/*.parquet"))[-1]
    last.write_bytes(content)
    with pytest.raises(UserError, match=rf"{last}.*(parquet file|git lfs pull)"):
        described(data_set, (TOP,))


def test_episodes_without_a_camera_or_a_table_are_named(data_sets, tmp_path):
    root = shutil.copytree(data_sets["v2.1"], tmp_path / "arm")
    (root / f"videos/chunk-000/{WRIST}/episode_000002.mp4").unlink()
    with pytest.raises(UserError, match=rf"{WRIST} was not recorded in episodes 2 .*--episodes 0-1,3"):
        described(root)
    assert described(root, (TOP,)).episodes == 4
    assert described(root, episodes=[0, 1, 3]).episodes == 3
    (root / "data/chunk-000/episode_000003.parquet").unlink()
    with pytest.raises(UserError, match=r"tables of episodes 3 are missing, .*--episodes 0-2"):
        described(root, (TOP,))


def test_channels_that_never_move_are_known_from_the_statistics(data_sets, tmp_path):
    root = shutil.copytree(data_sets["v3.0"], tmp_path / "arm")
    path = root / "meta/stats.json"
    statistics = json.loads(path.read_text())
    statistics["action"] |= {"min": [0.5, 1.0], "max": [0.5, 2.0]}
    path.write_text(json.dumps(statistics))
    assert described(root).constant == {"action": ["dx"]}
    assert described(root).lines()[1].endswith("later stages will find no movement of action dx")
    of_episodes = shutil.copytree(data_sets["v2.1"], tmp_path / "old") / "meta/episodes_stats.jsonl"
    lines = [json.loads(line) for line in of_episodes.read_text().splitlines()]
    for number, line in enumerate(lines):  # dx rests in every episode, but not at one place; dy never moves
        line["stats"]["action"] |= {"min": [number, 1.0], "max": [number, 1.0]}
    of_episodes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert described(tmp_path / "old").constant == {"action": ["dy"]}
    of_episodes.write_text(json.dumps({"episode_index": 0}))
    assert described(tmp_path / "old").constant == {}
    for unusable in ("{", "[]", '{"action": {"min": null, "max": 3}}', '{"action": {"min": [1], "max": [1]}}'):
        path.write_text(unusable)
        assert described(root).constant == {}
