"""Evaluation: every number comes with its samples, clip length, stride and network; nothing carries over."""

import json

import pytest
import torch
from repvitok.training.evaluation import Evaluation, report
from repvitok.training.features import HOGClipFeatures
from repvitok.training.metrics import psnr


def clips(seed, frames=5, batch=3):
    return torch.rand(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_rows_say_what_was_measured_on_what(tmp_path, capsys):
    evaluation = Evaluation(features=[HOGClipFeatures()])
    a, b = clips(0), clips(1)
    evaluation.update(a, b)
    rows = {row.name: row for row in evaluation.rows("2")}
    assert list(rows) == ["psnr", "ssim", "frechet_hog_distance"]
    assert rows["psnr"].value == pytest.approx(psnr(a, b).mean().item(), rel=1e-5)
    assert (rows["psnr"].samples, rows["psnr"].frames, rows["psnr"].stride) == ("15 frames", "5", "2")
    assert rows["frechet_hog_distance"].samples == "3 clips"
    path = report(list(rows.values()), tmp_path)
    printed = capsys.readouterr().out
    assert "N = 3 clips, clips of 5 frames, stride 2, HOG" in printed
    assert json.loads(path.read_text())[2]["backbone"] == rows["frechet_hog_distance"].backbone


def test_a_second_evaluation_starts_anew():
    evaluation = Evaluation(features=[HOGClipFeatures()])
    evaluation.update(clips(0), clips(1))
    first = evaluation.rows("1")
    evaluation.update(clips(2, frames=9), clips(2, frames=9))
    second = evaluation.rows("1")
    assert second[0].value == 100
    assert second[0].frames == "9"
    assert first[2].value > second[2].value
    with pytest.raises(ValueError, match="no frames were added"):
        evaluation.rows("1")


def test_two_variants_of_one_distance_are_refused():
    with pytest.raises(ValueError, match="two feature networks give 'frechet_hog_distance'"):
        Evaluation(features=[HOGClipFeatures(), HOGClipFeatures()])


def test_counts_and_lengths_are_those_of_all_ranks(monkeypatch):
    """Two ranks that saw three clips each, of 5 and of 9 frames: the rows say six clips, 42 frames, 5-9."""
    alone = Evaluation(features=[HOGClipFeatures()])
    alone.update(clips(0), clips(1))
    other = Evaluation(features=[HOGClipFeatures()])
    other.update(clips(2, frames=9), clips(3, frames=9))

    def gather(ours, theirs):
        states = iter([tensor for name in ours._reductions for tensor in [getattr(theirs, name)]])
        return lambda value, group: [value, next(states)]

    for ours, theirs in zip((alone._frames, *alone._frechet), (other._frames, *other._frechet), strict=True):
        ours.distributed_available_fn = lambda: True
        ours.dist_sync_fn = gather(ours, theirs)
    rows = {row.name: row for row in alone.rows("1")}
    assert (rows["psnr"].samples, rows["psnr"].frames) == ("42 frames", "5-9")
    assert rows["frechet_hog_distance"].samples == "6 clips"
    expected = torch.cat([psnr(clips(0), clips(1)).flatten(), psnr(clips(2, 9), clips(3, 9)).flatten()])
    assert rows["psnr"].value == pytest.approx(expected.mean().item(), rel=1e-5)
