"""`latent-action lapa`: trains, validates, exports; its codes are one more row of the probe and of pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from latent_action.baselines.lapa import (
    LapaQuantizer,
    lapa_action_effects,
    lapa_composed,
    lapa_features,
    load_frame_table,
)
from latent_action.cli import main
from latent_action.config import LatentActionConfig
from latent_action.model import LatentActionTokenizer
from PIL import Image
from repvitok.data.shards import LatentShards
from repvitok.data.video import VideoFile
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.progress import read_curves


@pytest.fixture(scope="module")
def run(squares, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lapa")
    latents, dataset = squares
    assert main(["lapa", "fit", *_options(latents, dataset, folder), "--trainer.max_steps=4"]) == 0
    return folder


def _options(latents: Path, dataset: Path, folder: Path) -> list[str]:
    return [
        "--model.lapa.size=[16,48]",
        "--model.lapa.width=16",
        "--model.lapa.depth=1",
        "--model.lapa.heads=2",
        "--model.replace_every=1",
        f"--data.latents={latents}",
        f"--data.dataset={dataset}",
        "--data.size=[16,48]",
        "--data.batch_size=4",
        "--data.held_out=[1]",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=2",
        f"--trainer.default_root_dir={folder}",
    ]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "lapa"
    assert main(["lapa", "export", "--ckpt", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture
def lat_folder(squares, tmp_path) -> Path:
    meta = LatentShards(squares[0]).meta
    torch.manual_seed(0)
    LatentActionTokenizer(LatentActionConfig(latent_dim=4, hidden=8).fitted_to(meta)).save_pretrained(tmp_path / "lat")
    return tmp_path / "lat"


def test_training_logs_the_loss_beside_copying(run):
    curves = read_curves(run)
    assert {"val/loss", "val/copy_loss", "val/codes_used"} <= set(curves)
    # of the one held-out episode no triplet is left; see the next test
    assert "val/composition_error" not in curves
    assert 1 <= curves["val/codes_used"][-1, 1] <= 8


def test_composition_and_transitions_of_two_frames(squares, tmp_path):
    held_out = ["--data.held_out=[0]", "--trainer.max_steps=2"]
    assert main(["lapa", "fit", *_options(*squares, tmp_path / "run"), *held_out]) == 0
    assert {"val/composition_error", "val/composition_shuffled_error"} <= set(read_curves(tmp_path / "run"))
    options = [*_options(*squares, tmp_path / "two"), *held_out, "--data.transition_frames=2"]
    assert main(["lapa", "fit", *options]) == 0
    assert main(["lapa", "export", "--ckpt", str(tmp_path / "two"), "--out", str(tmp_path / "lapa")]) == 0
    assert LapaQuantizer.from_pretrained(tmp_path / "lapa").config.transition_frames == 2


def test_composed_latent_actions_are_the_quantisers_own(exported, squares):
    lapa, table = LapaQuantizer.from_pretrained(exported), load_frame_table(*squares, (16, 48))
    whole, parts, elsewhere = lapa_composed(lapa, table, quantised=False)
    first = table.first[torch.isin(table.first + 1, table.first)]
    assert len(first) > 2
    assert whole.shape == (len(first), 4 * 32)

    def read(begin, end):
        frames = [rearrange(table.frames[i], "b h w rgb -> b rgb h w") / 127.5 - 1 for i in (begin, end)]
        with torch.no_grad():
            return lapa.encode(*frames).flatten(1)

    other = (first + 1).roll(len(first) // 2)
    torch.testing.assert_close(whole, read(first, first + 2))
    torch.testing.assert_close(parts, read(first, first + 1) + read(first + 1, first + 2))
    torch.testing.assert_close(elsewhere, read(first, other) + read(other, first + 2))


def test_resuming_equals_not_stopping(squares, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--trainer.max_steps=6", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=6"]
    first_half = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--trainer.val_check_interval=3"]
    for folder, options in ((whole, []), (parts, first_half), (parts, ["--ckpt_path=last"])):
        assert main(["lapa", "fit", *_options(*squares, folder), *more, *options]) == 0
    one, other = (read_checkpoint(folder / "last.ckpt") for folder in (whole, parts))
    assert one["global_step"] == other["global_step"] == 6
    for name, value in one["state_dict"].items():
        assert torch.equal(other["state_dict"][name], value), name
    losses = [read_curves(folder)["train/loss"].tolist() for folder in (whole, parts)]
    assert losses[0] == losses[1]


def test_it_stops_at_the_first_number_that_is_none(squares, tmp_path, capsys):
    wild = ("--model.optimizer.lr=1e30", "--model.optimizer.warmup_steps=1", "--trainer.max_steps=6")
    assert main(["lapa", "fit", *_options(*squares, tmp_path), *wild]) == 2
    assert "not finite at step" in capsys.readouterr().err.strip().splitlines()[-1]


def test_export_and_features(exported, squares):
    lapa = LapaQuantizer.from_pretrained(exported)
    table = load_frame_table(*squares, (16, 48))
    features, before = lapa_features(lapa, table), lapa_features(lapa, table, quantised=False)
    assert features.shape == before.shape == (len(table), 4 * 32)
    x_t, x_next = table.pairs(torch.tensor([0]))
    torch.testing.assert_close(features[:1], lapa.latent_actions(x_t, x_next)[0].flatten(1))
    assert (features != before).any()


def test_action_effects_are_nothing_for_a_still_frame(exported):
    torch.manual_seed(0)
    lapa, (x_t, x_next) = LapaQuantizer.from_pretrained(exported), torch.randn(2, 1, 3, 16, 48)
    assert lapa_action_effects(lapa, x_t, x_t).max() == 0
    effects = lapa_action_effects(lapa, x_t, x_next)
    assert effects.shape == (1, 2, 6)
    assert np.isfinite(effects).all()
    assert (effects >= 0).all()


def test_pictures_beside_ours_as_png_and_film(exported, lat_folder, squares, tmp_path):
    latents, dataset = squares
    common = ["visualize", "--lat", str(lat_folder), "--latents", str(latents), "--dataset", str(dataset)]
    for lapa in ([], ["--lapa", str(exported)]):
        out = tmp_path / f"{len(lapa)}.png"
        assert main([*common, "--out", str(out), "--transitions", "2", *lapa]) == 0
    alone, beside = (Image.open(tmp_path / name).size for name in ("0.png", "2.png"))
    gap = 4
    assert beside[0] - gap == 2 * (alone[0] - gap)
    assert beside[1] == alone[1]
    assert main([*common, "--out", str(tmp_path / "film.mp4"), "--lapa", str(exported)]) == 0
    film = VideoFile(tmp_path / "film.mp4")
    assert len(film) == 2  # of three transitions; the first is left out
    assert film.fps == pytest.approx(2.5)
    assert main([*common, "--out", str(tmp_path / "film.gif")]) == 2


def test_mistakes_end_in_one_line(exported, lat_folder, squares, run, tmp_path, capsys):
    latents, dataset = squares
    probe = ["probe", "--lat", str(lat_folder), "--latents", str(latents)]
    for arguments, told in (
        ([*probe, "--lapa", str(exported)], "--dataset"),
        ([*probe, "--lapa", str(lat_folder), "--dataset", str(dataset)], "lapa"),
        (["lapa", "export", "--ckpt", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "no"),
        (["export", "--ckpt", str(run), "--out", str(tmp_path / "o")], "latent-action fit"),
        (["lapa", "fit", *_options(latents, dataset, tmp_path)], "max_steps"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_probe_has_rows_of_lapa(exported, fitted_lat, blobs, tmp_path, capsys, monkeypatch):
    """The blobs have no pixels, so the table of frames is stood in for by noise of the right number."""
    fitted_lat.save_pretrained(tmp_path / "lat")
    monkeypatch.setattr("latent_action.baselines.lapa.load_frame_table", lambda *_: None)
    monkeypatch.setattr("latent_action.baselines.lapa.lapa_features", lambda *_, **__: torch.randn(40 * 23, 4))
    out = tmp_path / "probe.json"
    arguments = ["probe", "--lat", str(tmp_path / "lat"), "--latents", str(blobs), "--lapa", str(exported)]
    quick = ["--dataset", "anywhere", "--head-steps", "3", "--frames-steps", "2", "--out", str(out)]
    assert main([*arguments, *quick, "--target", "motion"]) == 0
    assert set(json.loads(out.read_text())["baselines"]) == {"LAPA", "LAPA before quantisation"}
    assert "LAPA before quantisation" in capsys.readouterr().out


def test_epochs_of_a_few_batches_have_new_ones_and_resume_exactly(squares, tmp_path):
    few, curves = "--trainer.limit_train_batches=2", {}
    for name, runs in {"whole": [()], "epochs": [(few,)], "resumed": [(few, "--trainer.max_epochs=2"), (few,)]}.items():
        for number, more in enumerate(runs):
            options = [*_options(*squares, tmp_path / name), "--trainer.max_steps=6", "--trainer.log_every_n_steps=1"]
            options += ["--trainer.val_check_interval=null", *more, *(["--ckpt_path=last"] if number else [])]
            assert main(["lapa", "fit", *options]) == 0
        curves[name] = read_curves(tmp_path / name)["train/loss"][:, 1]
    assert len(set(curves["whole"])) == 6
    for name in ("epochs", "resumed"):
        np.testing.assert_array_equal(curves[name], curves["whole"])
