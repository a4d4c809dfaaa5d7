"""Training: better than copying and than a blind model, resumable to the bit, exportable, strict about its data."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_action.cli import main
from latent_action.config import LatentActionConfig
from latent_action.datamodule import LatentActionData, TrainingBatches, TransitionBatch
from latent_action.labelling import label_shards
from latent_action.model import LatentActionTokenizer, transition_losses
from latent_action.probe import format_report, probe_shards
from latent_action.training import LatentActionTraining, export_checkpoint
from latent_action.transfer import latent_actions
from latent_action.transitions import load_transitions
from repvitok.data.shards import LatentShards
from repvitok.data.split import split_episodes
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.progress import read_curves
from repvitok.runtime.training import OptimizerSettings
from safetensors.torch import load_file


def lat_config() -> LatentActionConfig:
    return LatentActionConfig(latent_dim=8, hidden=16)


def fit(run: Path, latents: Path, steps: int, *more: str) -> int:
    return main(
        [
            "fit",
            "--model.lat.latent_dim=8",
            "--model.lat.hidden=64",
            "--model.optimizer.lr=3e-3",
            "--model.optimizer.warmup_steps=20",
            f"--data.latents={latents}",
            "--data.batch_size=64",
            "--data.held_out=0.25",
            f"--trainer.max_steps={steps}",
            "--trainer.val_check_interval=100000",
            f"--trainer.default_root_dir={run}",
            "--trainer.accelerator=cpu",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def run(blobs, tmp_path_factory) -> Path:
    """A short training run on the moving blobs."""
    folder = tmp_path_factory.mktemp("run")
    assert fit(folder, blobs, 600, "--trainer.val_check_interval=600", "--model.ema_decay=0.95") == 0
    return folder


def test_a_trained_lat_beats_copying_and_the_zero_action_control(run):
    last = {name: curve[-1, 1] for name, curve in read_curves(run).items()}
    assert last["val/forward_loss"] < 0.8 * last["val/zero_action_loss"]
    assert last["val/zero_action_loss"] < last["val/copy_loss"]
    assert last["val/consistency_loss"] < last["val/copy_loss"]
    assert last["val/action_std_0"] > 0


def test_export_gives_the_averaged_weights_and_what_was_validated(run, blobs, tmp_path):
    half = export_checkpoint(run / "last.ckpt", tmp_path / "half", half=True)
    assert LatentActionTokenizer.from_pretrained(tmp_path / "half").digest() == half.digest()
    lat = export_checkpoint(run / "last.ckpt", tmp_path / "lat")
    again = LatentActionTokenizer.from_pretrained(tmp_path / "lat")
    assert again.digest() == lat.digest()
    average = read_checkpoint(run / "last.ckpt")["latent_action"]["ema"]["average"]
    torch.testing.assert_close(
        dict(again.named_parameters())["inverse_dynamics.mlp.first.weight"].data,
        average["inverse_dynamics.mlp.first.weight"],
        atol=0,
        rtol=0,
    )
    data = LatentActionData(str(blobs), held_out=0.25)
    data.setup()
    assert again.config.tokenizer_digest == data.meta.tokenizer_digest
    assert again.config.latent_mean == tuple(data.meta.mean.tolist())
    held_out = data.val_dataloader()
    with torch.no_grad():
        losses = [
            transition_losses(again, batch.z_t, batch.z_next, data.meta.grid).forward.item() for batch in held_out
        ]
    mean = np.average(losses, weights=[len(batch.z_t) for batch in held_out])
    assert mean == pytest.approx(read_curves(run)["val/forward_loss"][-1, 1], rel=1e-4)


def test_labels_of_a_trained_lat_predict_the_motion(run, blobs, tmp_path):
    lat = export_checkpoint(run / "last.ckpt", tmp_path / "lat")
    label_shards(lat, blobs, tmp_path / "labelled")
    report = probe_shards(lat, blobs, head_steps=200, frames_steps=40)
    assert report.channels == ("down", "right", "still")
    assert report.latent_action.mean_r2 > 0.3
    assert report.latent_action.mean_r2 > report.untrained.mean_r2
    assert report.mean_action.pooled_r2 == 0
    assert report.mean_action.r2 == (0, 0, None)
    assert report.latent_action.r2[2] is None


def test_the_action_of_one_clip_moves_the_blob_of_another(run, blobs, blob_centre, tmp_path):
    """Borrowed latent actions act on what is there: the blob moves as the lender's did, its background stays."""
    lat = export_checkpoint(run / "last.ckpt", tmp_path / "lat")
    table = load_transitions(LatentShards(blobs), lat.standardise)
    held_out = table.of_episodes(split_episodes(table.episode.tolist(), 0.25)[1])
    mean, std = (torch.tensor(v) for v in (lat.config.latent_mean, lat.config.latent_std))
    z, _ = held_out.pairs(torch.arange(len(held_out)))
    lender = torch.arange(len(held_out)).roll(len(held_out) // 2)
    with torch.no_grad():
        moved = lat.decode(z, latent_actions(lat, held_out)[lender])
    before, after = (blob_centre((x * std + mean).numpy()) for x in (z, moved))
    lent, own = held_out.motion[lender].numpy(), held_out.motion.numpy()
    free = ((before + lent > 0) & (before + lent < 3)).all(axis=1)
    assert free.sum() > 50
    for axis in range(2):
        assert np.corrcoef((after - before)[free, axis], lent[free, axis])[0, 1] > 0.8
        assert np.corrcoef((after - before)[free, axis], own[free, axis])[0, 1] < 0.4


def test_measures_of_content_are_logged(run):
    last = {name: curve[-1, 1] for name, curve in read_curves(run).items()}
    assert max(last["val/transfer_r2"], last["val/transfer_shuffled_r2"]) <= 1
    assert last["val/cycle_loss"] < last["val/copy_loss"]
    assert 1 <= last["val/action_dimensions"] <= 4


def test_a_motion_elsewhere_predicts_better_than_a_random_one(run, blobs, tmp_path):
    lat = export_checkpoint(run / "last.ckpt", tmp_path / "lat")
    losses = probe_shards(lat, blobs, head_steps=5, frames_steps=2).transfer
    assert losses is not None
    assert losses.own < 0.1 * losses.static
    assert losses.own < losses.paired < 0.6 * losses.shuffled


def test_probe_of_motion_and_of_other_latent_actions(run, blobs, tmp_path):
    """A baseline that is the motion itself is read perfectly; one of noise not at all."""
    lat = export_checkpoint(run / "last.ckpt", tmp_path / "lat")
    table = load_transitions(LatentShards(blobs), lat.standardise)
    others = {"motion": table.motion, "noise": torch.randn(len(table), 3)}
    report = probe_shards(lat, blobs, target="motion", head_steps=200, frames_steps=2, baselines=others)
    assert report.channels == ("row", "column")
    assert report.baselines["motion"].pooled_r2 > 0.98
    assert report.baselines["noise"].pooled_r2 < 0.05
    assert "noise" in format_report(report)
    assert json.loads(json.dumps(report.to_dict()))["baselines"]["motion"]["pooled_r2"] > 0.98
    with pytest.raises(ValueError, match="all 920 transitions"):
        probe_shards(lat, blobs, baselines={"short": torch.zeros(3, 1)})


def test_validate_verb_reads_the_last_checkpoint(run, blobs, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    assert main(["validate", "-c", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]) == 0


def test_predictions_have_the_error_that_was_validated(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config, root = tmp_path / "run" / "config.yaml", f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert main(["test", "-c", str(config), root]) == 0
    assert main(["predict", "-c", str(config), root]) == 0
    batches = [load_file(path) for path in sorted((tmp_path / "run/predictions").glob("*.safetensors"))]
    predicted, following, actions = (
        torch.cat([batch[name] for batch in batches]) for name in ("latents", "next_latents", "actions")
    )
    assert actions.shape == (len(predicted), 4)
    expected = read_curves(tmp_path / "run")["test/forward_loss"][-1, 1]
    assert (predicted - following).square().mean() == pytest.approx(expected, rel=1e-4)


def test_resuming_equals_not_stopping(blobs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, blobs, 6, "--model.ema_decay=0.9") == 0
    assert (
        fit(parts, blobs, 6, "--model.ema_decay=0.9", "--trainer.limit_train_batches=3", "--trainer.max_epochs=1") == 0
    )
    assert read_checkpoint(parts / "last.ckpt")["global_step"] == 3
    assert fit(parts, blobs, 6, "--model.ema_decay=0.9", "--ckpt_path=last") == 0
    one, other = (read_checkpoint(folder / "last.ckpt") for folder in (whole, parts))
    assert one["global_step"] == other["global_step"] == 6
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, atol=0, rtol=0)
    for name, value in one["latent_action"]["ema"]["average"].items():
        torch.testing.assert_close(other["latent_action"]["ema"]["average"][name], value, atol=0, rtol=0)


def test_a_killed_run_resumes_inside_the_epoch(blobs, tmp_path):
    """Ctrl-C after step 3 of 6: the state saved then leads to the same weights and curves."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    curves = ("--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3")
    assert fit(whole, blobs, 6, *curves) == 0
    batches, batch = [], TrainingBatches.batch

    def interrupted(self, number):
        batches.append(number)
        if len(batches) == 4:
            signal.raise_signal(signal.SIGINT)
        return batch(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBatches, "batch", interrupted)
        assert fit(parts, blobs, 6, *curves) == 130
    assert 0 < read_checkpoint(parts / "last.ckpt")["global_step"] < 6
    assert fit(parts, blobs, 6, *curves, "--ckpt_path=last") == 0
    one, other = (read_checkpoint(folder / "last.ckpt") for folder in (whole, parts))
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, atol=0, rtol=0)
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_control_never_touches_the_lat():
    """Gradients of the LAT are the same with and without the control beside it."""
    torch.manual_seed(0)
    batch = TransitionBatch(torch.randn(4, 16, 8), torch.randn(4, 16, 8))
    gradients = []
    for with_control in (True, False):
        torch.manual_seed(1)
        module = LatentActionTraining(lat_config(), zero_action_control=with_control)
        module.grid = (1, 4, 4)
        module.log = lambda *_, **__: None
        module.training_step(batch).backward()
        gradients.append([p.grad for p in module.lat.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_control_is_blind_to_the_action():
    module = LatentActionTraining(lat_config())
    module.grid = (1, 4, 4)
    z_t, z_next = torch.randn(4, 16, 8), torch.randn(4, 16, 8)
    assert module.control is not None
    expected = module.control(z_t, torch.zeros(4, 4), (1, 4, 4))
    moved = expected[0].matrix() @ z_t + expected[1]
    loss = module._control_loss(TransitionBatch(z_t, z_next))
    torch.testing.assert_close(loss, (moved - z_next).square().mean())


def test_it_stops_at_the_first_number_that_is_none_and_the_last_good_state_stays(blobs, tmp_path, capsys):
    wild = ("--model.optimizer.lr=1e30", "--model.optimizer.warmup_steps=2", "--checkpoint.every_n_steps=1")
    assert fit(tmp_path, blobs, 8, "--data.batch_size=4", *wild) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step" in told
    state = read_checkpoint(tmp_path / "last.ckpt")["state_dict"] if (tmp_path / "last.ckpt").exists() else {}
    assert all(torch.isfinite(value).all() for value in state.values())


def test_bad_weights_are_refused():
    for weights in ((-1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="forward_weight"):
            LatentActionTraining(lat_config(), *weights)


def test_muon_takes_the_inner_matrices_only():
    module = LatentActionTraining(lat_config(), optimizer=OptimizerSettings(name="muon"))
    module._trainer = type("T", (), {"max_steps": 10})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    muon = [p for group in groups if group["kind"] == "muon" for p in group["params"]]
    assert {tuple(p.shape) for p in muon} == {(16, 16)}
    assert len(muon) == 2 * 3


def test_epochs_of_a_few_batches_have_new_ones_and_resume_exactly(blobs, tmp_path):
    """limit_train_batches ends an epoch early; its batches are not those of the last one, also after a resume."""
    few, curves = "--trainer.limit_train_batches=2", {}
    for name, runs in {"whole": [()], "epochs": [(few,)], "resumed": [(few, "--trainer.max_epochs=2"), (few,)]}.items():
        for number, more in enumerate(runs):
            resume = ("--ckpt_path=last",) if number else ()
            assert fit(tmp_path / name, blobs, 6, "--trainer.log_every_n_steps=1", *more, *resume) == 0
        curves[name] = read_curves(tmp_path / name)["train/loss"][:, 1]
    assert len(set(curves["whole"])) == 6
    for name in ("epochs", "resumed"):
        np.testing.assert_array_equal(curves[name], curves["whole"])


def test_composition_is_measured_without_its_loss_and_lower_with_it(blobs, tmp_path):
    found = {}
    for weight in ("0.0", "1.0"):
        folder = tmp_path / weight
        options = ("--trainer.val_check_interval=120", f"--model.composition_weight={weight}")
        assert fit(folder, blobs, 120, *options, "--model.zero_action_control=false") == 0
        found[weight] = {name: curve[-1, 1] for name, curve in read_curves(folder).items()}
    assert "train/composition_loss" not in found["0.0"]
    assert found["1.0"]["val/composition_error"] < 0.5 * found["0.0"]["val/composition_error"]
    assert found["0.0"]["val/composition_error"] < found["0.0"]["val/composition_shuffled_error"]


def test_without_its_weight_composition_changes_no_bit():
    """Triplets beside the batch or none: one loss, one gradient; and with the weight, another."""
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4, 16, 8)
    batches = {"plain": TransitionBatch(a, b), "triplets": TransitionBatch(a, b, c, torch.tensor([True] * 3 + [False]))}
    found = {}
    for name, weight in (("plain", 0.0), ("triplets", 0.0), ("triplets", 1.0)):
        torch.manual_seed(1)
        module = LatentActionTraining(lat_config(), composition_weight=weight)
        module.grid = (1, 4, 4)
        module.log = lambda *_, **__: None
        loss = module.training_step(batches[name])
        loss.backward()
        found[name, weight] = loss, module.lat.inverse_dynamics.mlp.first.weight.grad
    for one, other in zip(found["plain", 0.0], found["triplets", 0.0], strict=True):
        assert torch.equal(one, other)
    assert found["triplets", 1.0][0] > found["plain", 0.0][0]


def test_transitions_of_two_frames_are_exported_and_composition_needs_room(blobs, tmp_path, capsys):
    assert fit(tmp_path / "run", blobs, 2, "--data.transition_frames=2", "--trainer.val_check_interval=2") == 0
    assert export_checkpoint(tmp_path / "run" / "last.ckpt", tmp_path / "lat").config.transition_frames == 2
    assert "transition_frames | 2" in (tmp_path / "lat" / "README.md").read_text()
    wanted = ("--data.transition_frames=12", "--model.composition_weight=1.0")
    assert fit(tmp_path / "none", blobs, 2, *wanted) == 2
    assert "no two transitions in a row of 12" in capsys.readouterr().err.strip().splitlines()[-1]
