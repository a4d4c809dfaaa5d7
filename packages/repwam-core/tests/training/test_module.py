"""Training: exactly resumable, learns what can be learned, keeps what was pretrained, stops on bad numbers."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from repvitok.data import LatentShards, LatentShardWriter
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.lightning_cli import parse_recipe
from repvitok.runtime.progress import read_curves
from repwam_core.cli import STAGE, main
from repwam_core.data.datamodule import WAMDataModule
from repwam_core.data.episodes import EpisodeStore
from repwam_core.export import export_wam, read_trained
from repwam_core.model.attention import BlockAttention, DenseAttention
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.module import CHECKPOINT_KEY, WAMTraining
from safetensors.torch import load_file


def test_six_steps_are_three_and_three_more(fit, tmp_path):
    whole = read_checkpoint(fit(tmp_path / "whole"))
    # The schedule spans max_steps, so the first half is stopped by a limit on batches, not by a shorter schedule.
    fit(
        tmp_path / "halves", "--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--checkpoint.every_n_steps=3"
    )
    halves = read_checkpoint(fit(tmp_path / "halves", "--ckpt_path=last"))
    assert whole["global_step"] == halves["global_step"] == 6
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, halves["state_dict"][name]), name
    average, resumed = (c[CHECKPOINT_KEY]["ema"]["average"] for c in (whole, halves))
    assert all(torch.equal(average[name], resumed[name]) for name in average)
    curve = read_curves(tmp_path / "whole")["train/loss"]
    np.testing.assert_array_equal(curve, read_curves(tmp_path / "halves")["train/loss"])


@pytest.mark.parametrize("how", ["SIGTERM", "a second Ctrl-C"])
def test_a_run_stopped_in_a_validation_goes_on_with_the_weights_it_trains(fit, tmp_path, monkeypatch, how):
    """In a validation the model holds averages; none of them may be saved as the weights that are trained."""
    options = ("--trainer.val_check_interval=2", "--trainer.log_every_n_steps=4", "--checkpoint.every_n_steps=3")
    whole, validate = read_checkpoint(fit(tmp_path / "whole", *options)), WAMTraining.validation_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 4:
            if how != "SIGTERM":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(WAMTraining, "validation_step", stopped)
        saved = read_checkpoint(fit(tmp_path / "run", *options, expect=143 if how == "SIGTERM" else 130))
    assert saved["global_step"] == (4 if how == "SIGTERM" else 3)
    average = saved[CHECKPOINT_KEY]["ema"]["average"]
    assert any(not torch.equal(saved["state_dict"][f"wam.{name}"], value) for name, value in average.items())
    resumed = read_checkpoint(fit(tmp_path / "run", *options, "--ckpt_path=last"))
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    assert (tmp_path / "run" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_it_learns_actions_and_video(fit, tmp_path, capsys):
    fit(tmp_path, "--trainer.max_steps=120", "--trainer.val_check_interval=120", "--model.chunk_sizes=[1,1]")
    curves = read_curves(tmp_path)
    last = {name: curve[-1, 1] for name, curve in curves.items()}
    assert last["val/action_mae"] < 0.6 * last["val/action_mae_of_zero"]
    assert curves["train/video"][-10:, 1].mean() < 0.8 * curves["train/video"][:10, 1].mean()
    assert last["val/still_mae_si"] == pytest.approx(0.0, abs=1e-6)
    said = capsys.readouterr().err
    assert "action channels still: never move and are learned as constants" in said
    assert "state channels constant: never move and are left out" in said


def test_the_data_know_the_longest_chunk_that_is_learned(recipe):
    config = parse_recipe("fit", [str(recipe)], STAGE, ["--model.chunk_sizes=[2,3]"])
    assert config.data.chunk_sizes == (2, 3)


def test_a_pretrained_model_is_kept_and_a_space_added(fit, tmp_path):
    latent = ("--model.space=latent", "--data.space=latent", "--trainer.max_steps=2")
    export_wam(fit(tmp_path / "pretrain", *latent), tmp_path / "wam")
    pretrained = WorldActionModel.from_pretrained(tmp_path / "wam")
    overrides = (f"--model.init_from={tmp_path / 'wam'}", "--model.wam=null", "--trainer.max_steps=1")
    adapted = read_trained(fit(tmp_path / "adapt", *overrides, "--model.optimizer.lr=1e-9")).wam
    assert set(adapted.config.spaces) == {"latent", "robot"}
    for name, weight in pretrained.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_an_exported_model_has_the_averaged_weights(fit, tmp_path):
    checkpoint = fit(tmp_path / "run")
    loaded = WorldActionModel.from_pretrained(export_wam(checkpoint, tmp_path / "wam"))
    content = read_checkpoint(checkpoint)
    for name, weight in content[CHECKPOINT_KEY]["ema"]["average"].items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert any(
        not torch.equal(loaded.state_dict()[k.removeprefix("wam.")], v) for k, v in content["state_dict"].items()
    )
    assert json.loads(content[CHECKPOINT_KEY]["json"])["space"] == "robot"


def test_a_loss_that_is_no_number_stops_the_run(fit, tmp_path, capsys):
    fit(tmp_path, "--model.optimizer.lr=1e30", "--trainer.max_steps=20", expect=2)
    error = capsys.readouterr().err
    assert "not finite at step" in error
    assert "episode-" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.space=latent"], "model.space is 'robot', the data's space is 'latent'"),
        (["--model.chunk_sizes=[1,9]"], "a chunk of 9 latent frames does not fit segments of 3 transitions"),
        (["--model.chunk_sizes=[3,2]"], "1 <= smallest <= largest"),
        (["--model.plan.chunk_frames=3"], "trained on chunks of 1 to 2 latent frames (model.chunk_sizes), got 3"),
        (["--data.latents=/no/such/folder"], "/no/such/folder"),
        (["--model.init_from=/no/such/folder"], "remove these fields of wam"),
        (["--model.wam.width=33"], "width"),
        (["--model.loss.delay=2"], "expected less than the 2 action vectors of the smallest chunk"),
        (["--model.wam.look_ahead=1"], "give loss.look_ahead in its place"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(fit, tmp_path, capsys, overrides, message):
    fit(tmp_path, *overrides, expect=2)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_the_attention_asked_for_serves_segments_too(fit, tmp_path, monkeypatch, backend):
    ran = set()
    for kind in (DenseAttention, BlockAttention):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *a, call=call: ran.add(type(self)) or call(self, *a))
    fit(tmp_path, f"--model.scale.attention={backend}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    assert ran == {DenseAttention if backend == "dense" else BlockAttention}


def test_a_checkpoint_of_other_data_is_not_resumed(fit, tmp_path, write_shards, capsys):
    fit(tmp_path / "run", "--trainer.max_steps=1")
    other = write_shards(tmp_path / "other", seed=5)
    fit(tmp_path / "run", "--ckpt_path=last", f"--data.latents={other}", expect=2)
    assert "action statistics" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_scaling_it_began_with(fit, tmp_path, shards, write_text_cache):
    """Version 0.1 counted changes from the state of each transition, as chunks of one frame are learned today."""
    source, latents = LatentShards(shards), tmp_path / "latents"
    with LatentShardWriter(latents, replace(source.meta, state_names=("x", "y", "other"))) as writer:
        for episode in source:
            writer.add(episode)
    write_text_cache(latents)
    run = (tmp_path / "run", f"--data.latents={latents}", "--data.action_kind=from_state")
    began = read_trained(fit(*run, "--model.chunk_sizes=[1,1]", "--trainer.max_steps=1")).statistics
    resumed = read_trained(
        fit(*run, "--model.chunk_sizes=[1,3]", "--trainer.max_steps=2", "--ckpt_path=last")
    ).statistics
    assert began == resumed
    store = EpisodeStore(latents, kind="from_state", held_out=0.2, chunk_frames=3)
    assert began.same_data(store.statistics)
    assert began.actions.q99 != store.statistics.actions.q99
    before = store.batch(np.array([0]), np.array([0]), 3)
    store.scale_by(began)
    after = store.batch(np.array([0]), np.array([0]), 3)
    changes_si = began.actions.denormalise(after.actions[0].numpy())
    assert not torch.equal(before.actions, after.actions)
    first = LatentShards(latents)[0]
    np.testing.assert_allclose(changes_si[0, :, 0], first.actions[0, :, 0] - first.state[0, 0], atol=1e-5)


def test_draws_of_a_step_depend_on_seed_and_step_only(shards):
    module = WAMTraining(seed=3, space="robot", chunk_sizes=(1, 3))
    batch = WAMDataModule(shards, transitions=3).train_dataloader().sampler.batch(range(2))

    class At:
        global_step = 7

    module._trainer = At()  # type: ignore[assignment]
    assert module._drawn_chunks(batch) == module._drawn_chunks(batch)
    sizes = set()
    for At.global_step in range(40):
        sizes.add(max(module._drawn_chunks(batch)))
    assert sizes == {1, 2, 3}


def test_predictions_have_the_errors_that_were_tested(fit, recipe, tmp_path, shards):
    fit(tmp_path, "--trainer.max_steps=3", "--trainer.val_check_interval=3")
    for verb in ("test", "predict"):
        assert main([verb, "-c", str(recipe), f"--trainer.default_root_dir={tmp_path}"]) == 0
    store, errors = EpisodeStore(shards, held_out=0.2), []
    recorded = {episode.episode_index: episode.actions for episode in store.shards}
    for path in sorted((tmp_path / "predictions").glob("*.safetensors")):
        batch = load_file(path)
        starts = zip(batch["episode"].tolist(), batch["start"].tolist(), strict=True)
        for row, (number, start) in enumerate(starts):
            ours = batch["actions"][row][batch["valid"][row]].numpy()
            errors.append(ours - recorded[number][start : start + len(ours)])
    found = np.abs(np.concatenate(errors)).mean(axis=(0, 1))
    curves = read_curves(tmp_path)
    for channel, error in zip(store.action_channels, found, strict=True):
        assert error == pytest.approx(curves[f"val/{channel}_mae_si"][-1, 1], rel=1e-4, abs=1e-6)


def test_joint_prediction_has_no_actions_to_predict(fit, recipe, tmp_path, capsys):
    joint = ("--model.wam.joint_actions=4", "--model.space=latent", "--data.space=latent")
    fit(tmp_path, "--trainer.max_steps=1", *joint)
    assert main(["predict", "-c", str(recipe), f"--trainer.default_root_dir={tmp_path}", *joint]) == 2
    assert "joint prediction has no action tokens" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_epochs_of_a_few_batches_have_new_ones_and_resume_exactly(fit, tmp_path, monkeypatch, packed):
    """limit_train_batches ends an epoch early; its batches are not those of the last one, also after a resume."""
    seen, step = [], WAMTraining.training_step

    def training_step(self, batch, batch_idx):
        parts = [batch.segment(number) for number in range(len(batch.pieces))] if packed else [batch]
        seen.append([(part.episode.tolist(), part.start.tolist()) for part in parts])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(WAMTraining, "training_step", training_step)
    options = ("--data.held_out=0", *(("--data.packing.token_budget=256",) if packed else ()))
    few, batches, losses = "--trainer.limit_train_batches=2", {}, {}
    for name, runs in {"whole": [()], "epochs": [(few,)], "resumed": [(few, "--trainer.max_epochs=2"), (few,)]}.items():
        for number, more in enumerate(runs):
            checkpoint = fit(tmp_path / name, *options, *more, *(("--ckpt_path=last",) if number else ()))
        assert read_checkpoint(checkpoint)["global_step"] == 6
        batches[name], seen = seen, []
        losses[name] = read_curves(tmp_path / name)["train/loss"][:, 1].tolist()
    assert batches["resumed"] == batches["epochs"] == batches["whole"]
    assert len({str(batch) for batch in batches["whole"]}) == 6
    assert losses["resumed"] == losses["epochs"]


def test_one_episode_is_enough_to_train_on(fit, tmp_path, write_shards, caplog, capsys):
    for frames, name in ((20, "long"), (3, "short")):
        latents = write_shards(tmp_path / name / "latents", episodes=1, frames=(frames, frames + 1))
        run = tmp_path / name / "run"
        caplog.clear()
        fit(run, f"--data.latents={latents}", "--trainer.max_steps=2", "--trainer.val_check_interval=1")
        assert ("val/action_mae" in read_curves(run)) == (frames == 20)
        assert ("nothing is held out: there is episode 0 alone" in caplog.text) == (frames == 3)
    capsys.readouterr()
    assert main(["test", "-c", str(run / "config.yaml"), f"--ckpt_path={run / 'last.ckpt'}"]) == 2
    assert "nothing is held out of these episodes" in capsys.readouterr().err
