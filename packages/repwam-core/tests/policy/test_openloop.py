"""Open-loop evaluation covers the episode, compares what belongs together, and knows its baselines."""

from dataclasses import replace

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.data.lerobot.format import EpisodeInfo
from repwam_core.policy import BatchedPolicy, evaluate_open_loop


@pytest.fixture(scope="module", params=[1, 2])
def result(world, request):
    policy = BatchedPolicy.from_pretrained(world.policy, execute_frames=request.param)
    return evaluate_open_loop(policy, LeRobotReader(world.dataset))


def test_every_whole_transition_is_covered_with_the_recorded_actions(result, world):
    reader = LeRobotReader(world.dataset)
    for episode, length in zip(result.episodes, (16, 12), strict=True):
        np.testing.assert_array_equal(episode.real, reader.episode(episode.index)["action"][:length])
        assert episode.predicted.shape == (length, 3)
        assert episode.frames.shape == episode.imagined.shape == episode.reconstructed.shape == (2, length, 32, 16, 3)


def test_errors_and_baselines_are_by_hand(result):
    errors = result.errors()
    real = np.concatenate([episode.real for episode in result.episodes])
    predicted = np.concatenate([episode.predicted for episode in result.episodes])
    assert errors["policy"]["y"] == pytest.approx(np.abs(real - predicted).mean(axis=0)[1], rel=1e-5)
    first = result.episodes[0]
    repeated = first.baselines["last action repeated"]
    steps = 16 // len(np.unique(repeated[:, 0]))
    np.testing.assert_allclose(repeated[steps:], np.repeat(first.real[steps - 1 : -1 : steps], steps, axis=0))
    assert set(result.psnr()) == {"imagined", "reconstructed", "copied"}
    for name, psnr_db in result.psnr().items():  # one PSNR everywhere: the mean over frames, of episodes of 16 and 12
        assert psnr_db == pytest.approx(result.video(of=name).psnr_db, rel=1e-6)
    assert result.to_dict()["channels"] == ["x", "y", "z"]


def test_scores_are_per_step_and_per_planned_chunk(result):
    scores = result.open_loop_scores()
    assert next(iter(scores)) == "max norm, per step, scaled"
    errors = np.concatenate([e.predicted - e.real for e in result.episodes])
    assert scores["max norm, per step, si"][0.1] == np.mean(np.abs(errors).max(axis=1) < 0.1)
    assert {episode.chunk for episode in result.episodes} <= {4, 8}
    for span in ("step", "chunk"):
        assert all(0 <= share <= 1 for share in scores[f"l2 norm, per {span}, scaled"].values())


def test_seen_and_unseen_tasks_are_told_apart(world):
    policy = BatchedPolicy.from_pretrained(world.policy)
    policy.parts = replace(policy.parts, instructions=frozenset({"go left"}))
    result = evaluate_open_loop(policy, LeRobotReader(world.dataset))
    groups = result.groups()
    assert {name: [e.instruction for e in part.episodes] for name, part in groups.items()} == {
        "seen": ["go left"],
        "unseen": ["go up"],
    }
    written = result.to_dict()
    assert written["groups"]["unseen"]["imagined_video"]["frames"] == 2 * 12
    assert written["imagined_video"]["frames"] == 2 * (16 + 12)
    assert written["groups"]["seen"]["open_loop_score"] == groups["seen"].open_loop_scores()


def test_another_data_set_is_refused(world):
    policy = BatchedPolicy.from_pretrained(world.policy)
    with pytest.raises(ValueError, match=r"no episodes 7; there are 0-1"):
        evaluate_open_loop(policy, LeRobotReader(world.dataset), [7])


def test_episodes_without_a_whole_transition_are_named(world):
    policy, reader = BatchedPolicy.from_pretrained(world.policy, video="skip"), LeRobotReader(world.dataset)
    whole, short = reader.episodes
    reader.episodes = [whole, EpisodeInfo(short.index, policy.frames_per_latent, short.task)]
    written = evaluate_open_loop(policy, reader).to_dict()
    assert [episode["index"] for episode in written["episodes"]] == [0]
    assert written["too_short"] == [1]
    with pytest.raises(ValueError, match="none of the episodes 1 has more than 4 frames"):
        evaluate_open_loop(policy, reader, [1])
