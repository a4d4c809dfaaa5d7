"""Counting and keeping results."""

import json

import numpy as np
import pytest
from repvitok.data.video import VideoFile
from repwam_core.sim.results import EpisodeResult, load_results, mean_rate, save_results, success_rates, write_films

RESULTS = [
    EpisodeResult("push", 0, "push it", True, 12, frames=np.zeros((1, 2, 2, 3), np.uint8)),
    EpisodeResult("reach", 0, None, False, 100),
    EpisodeResult("push", 1, "push it", False, 3, crashed="RuntimeError: boom"),
    EpisodeResult("reach", 1, None, True, 9),
    EpisodeResult("push", 2, "push it", False, 100),
]


def test_rates_count_a_crash_as_a_failure():
    rates = success_rates(RESULTS)
    assert list(rates) == ["push", "reach"]
    assert (rates["push"].successes, rates["push"].episodes, rates["push"].crashed) == (1, 3, 1)
    assert mean_rate(success_rates(RESULTS)) == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_films_are_there_to_look_at(tmp_path, size):
    frames = np.linspace(0, 255, 6, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    frames = np.ascontiguousarray(np.broadcast_to(frames, (6, *size, 3)))
    results = [EpisodeResult("push", 7, None, True, 6, frames=frames), EpisodeResult("push", 8, None, False, 6)]
    (film,) = write_films(tmp_path / "films", results, rate_hz=20.0)
    assert film == tmp_path / "films" / "push-7-success.mp4"
    video = VideoFile(film)
    assert (len(video), video.fps) == (6, 20)
    assert np.abs(video.read().astype(int) - frames).max() < 6


def test_results_survive_json_without_their_frames(tmp_path):
    save_results(tmp_path / "results.json", RESULTS, policy="abc")
    loaded, about = load_results(tmp_path / "results.json")
    assert about == {"policy": "abc"}
    assert [result.to_dict() for result in loaded] == [result.to_dict() for result in RESULTS]
    assert json.loads((tmp_path / "results.json").read_text())["rates"]["all"]["successes"] == 2


def test_a_crash_is_never_a_success():
    with pytest.raises(ValueError, match="cannot be a success"):
        EpisodeResult("push", 0, None, True, 1, crashed="boom")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="expected format 'repwam-evaluation' version 1, got None version None"):
        load_results(tmp_path / "other.json")
