"""Files for the Rerun viewer: what went in is read back from them."""

import sys

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.interface import ActionChannel, Embodiment
from repwam_core.policy import BatchedPolicy, evaluate_open_loop
from repwam_core.rrd import compared, driven, recorded, write_rrd
from repwam_core.sim.results import EpisodeResult


def _read(path):
    """Entity -> its columns of every row: steps, seconds, and what was logged."""
    reader = pytest.importorskip("rerun.chunk").RrdReader(path)
    found = {}
    for chunk in reader.stream():
        batch = chunk.to_record_batch()
        columns = {name.split(":")[-1]: batch.column(name).to_pylist() for name in batch.schema.names}
        for name, rows in columns.items():
            found.setdefault(chunk.entity_path.replace("\\", ""), {}).setdefault(name, []).extend(rows)
    return found


def test_a_data_set_episode_is_whole_in_the_file(world, tmp_path):
    pytest.importorskip("rerun")
    path = tmp_path / "deep" / "episodes.rrd"
    assert main(["show", "--dataset", str(world.dataset), "--rerun", str(path)]) == 0
    reader = LeRobotReader(world.dataset)
    found = _read(path)
    for info in reader.episodes:
        columns, episode = reader.episode(info.index), f"/episode {info.index}"
        assert found[f"{episode}/instruction"]["text"] == [[info.task]]
        for group, key in (("action", "action"), ("state", "observation.state")):
            for number, name in enumerate(reader.channel_names(key)):
                rows = found[f"{episode}/{group}/{name}"]
                assert rows["step"] == list(range(info.length))
                assert [time.total_seconds() for time in rows["time"]] == pytest.approx(
                    np.arange(info.length) / reader.fps
                )
                np.testing.assert_allclose(np.ravel(rows["scalars"]), columns[key][:, number], rtol=1e-6)
        for camera in reader.camera_keys:
            assert len(found[f"{episode}/{camera}"]["blob"]) == info.length


def test_predicted_actions_stand_beside_recorded_ones(world, tmp_path):
    pytest.importorskip("rerun")
    policy, reader = BatchedPolicy.from_pretrained(world.policy), LeRobotReader(world.dataset)
    result = evaluate_open_loop(policy, reader)
    cameras = policy.embodiment.cameras
    assert write_rrd(tmp_path / "o.rrd", compared(reader, cameras, result.episodes, result.channels), "open loop") == 2
    found = _read(tmp_path / "o.rrd")
    for episode in result.episodes:
        for number, channel in enumerate(result.channels):
            for kind, rows in (("recorded", episode.real), ("predicted", episode.predicted)):
                shown = found[f"/episode {episode.index}/action/{channel}/{kind}"]
                np.testing.assert_allclose(np.ravel(shown["scalars"]), rows[:, number], rtol=1e-6)
        for camera in cameras:
            imagined = found[f"/episode {episode.index}/{camera}/imagined"]
            assert imagined["step"] == list(range(1, 1 + episode.imagined.shape[1]))


def test_a_rollout_has_its_cameras_apart_and_its_channels_by_name(tmp_path):
    pytest.importorskip("rerun")
    robot = Embodiment("toy", (ActionChannel("x", "m"),), ("pos_x",), ("left", "right"), 10.0)
    frames = np.zeros((3, 8, 16, 3), np.uint8)
    trace = {"pos_x": [0.0, 0.1, 0.2], "hand to object": [0.3, 0.2, 0.1], "action/x": [0.1, 0.1]}
    result = EpisodeResult("push", 7, "push it", True, 2, frames=frames, trace=trace)
    assert [film.frames.shape for film in driven(result, robot).films.values()] == [(3, 8, 8, 3)] * 2
    write_rrd(tmp_path / "r.rrd", [driven(result, robot)], "rollouts")
    found, episode = _read(tmp_path / "r.rrd"), "/push, seed 7: success"
    assert found[f"{episode}/instruction"]["text"] == [["push it"]]
    assert np.ravel(found[f"{episode}/action/x"]["scalars"]).tolist() == [0.1, 0.1]
    assert np.ravel(found[f"{episode}/state/pos_x"]["scalars"]).tolist() == [0.0, 0.1, 0.2]
    assert len(found[f"{episode}/distance (m)/hand to object"]["scalars"]) == 3
    assert {f"{episode}/left", f"{episode}/right"} <= set(found)


def test_without_the_extra_one_line_says_what_to_install(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rerun", None)
    out = tmp_path / "o.json"
    for command in (
        ["show", "--dataset", str(world.dataset)],
        ["openloop", "--policy", str(world.policy), "--dataset", str(world.dataset), "--out", str(out)],
    ):
        assert main([*command, "--rerun", str(tmp_path / "e.rrd")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "pip install 'repwam-core[rerun]'" in line
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="rerun"):
        write_rrd(tmp_path / "e.rrd", [], "nothing")


def test_an_episode_that_cannot_be_read_leaves_no_file(world, tmp_path):
    pytest.importorskip("rerun")
    reader = LeRobotReader(world.dataset)

    def broken():
        yield recorded(reader, reader.camera_keys, reader.episodes[0])
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_rrd(tmp_path / "e.rrd", broken(), "broken")
    assert not list(tmp_path.iterdir())
