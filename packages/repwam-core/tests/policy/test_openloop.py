"""Open-loop evaluation covers the episode, compares what belongs together, and knows its baselines."""

import numpy as np
import pytest
from repvitok.data import LeRobotReader
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
    assert result.to_dict()["channels"] == ["x", "y", "z"]


def test_another_data_set_is_refused(world):
    policy = BatchedPolicy.from_pretrained(world.policy)
    with pytest.raises(ValueError, match=r"no episodes \[7\]"):
        evaluate_open_loop(policy, LeRobotReader(world.dataset), [7])
