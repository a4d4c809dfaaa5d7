"""Evaluation: every number comes with its samples, clip length, stride and network; nothing carries over."""

import json

import pytest
import torch
from repvitok.evaluation import Evaluation, report
from repvitok.features import HOGClipFeatures
from repvitok.metrics import psnr


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
