"""Counting and keeping results."""

import json

import numpy as np
import pytest
from repwam_core.sim.results import EpisodeResult, load_results, mean_rate, save_results, success_rates

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
    assert mean_rate(RESULTS) == pytest.approx((1 / 3 + 1 / 2) / 2)


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
