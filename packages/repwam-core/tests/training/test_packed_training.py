"""Packed training: an episode's loss and gradients do not depend on what it is packed with; runs resume exactly."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.errors import UserError
from repvitok.runtime.progress import read_curves
from repwam_core.data.batches import Documents, PackedBatch
from repwam_core.data.datamodule import WAMDataModule
from repwam_core.data.packing import PackingSettings
from repwam_core.estimate import DocumentCosts, SequenceCost
from repwam_core.export import export_wam, read_trained
from repwam_core.model.sequence import Velocities
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.losses import LossSettings, draw_noise, equal_chunks, loss_terms, with_joint_actions
from repwam_core.training.metrics import batch_flops
from repwam_core.training.module import WAMTraining
from repwam_core.training.parallel import ScaleSettings

PACKED = ("--data.packing.token_budget=300", "--data.packing.open_sequences=4")


class Trainer:
    """As much of a trainer as a step asks for."""

    strategy, precision, world_size, global_step, global_rank = None, "32-true", 1, 0, 0

    def __init__(self, data: WAMDataModule) -> None:
        self.datamodule = data


def training(shards, *, wam: dict | None = None, space: str = "robot", **scale: object) -> WAMTraining:
    sizes = {"width": 32, "depth": 2, "heads": 2, "ffn": 64, "action_width": 32, "action_ffn": 64, "state_token": True}
    sizes |= wam or {}
    module = WAMTraining(
        "tiny", wam=sizes, space=space, chunk_sizes=(1, 3), seed=4, scale=ScaleSettings(**scale),
        loss=LossSettings(video_noise_prob=0.3, history_noise=0.1),
    )  # fmt: skip
    data = WAMDataModule(shards, space=space, packing=PackingSettings(token_budget=400, open_sequences=4), seed=2)
    module._trainer = data.trainer = Trainer(data)  # type: ignore[assignment]
    data.trainer.lightning_module = module
    module.setup("fit")
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no zero weights, so that every path shows
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def step(module: WAMTraining, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def alone(batch: PackedBatch, number: int) -> PackedBatch:
    document = Documents.of_segments(batch.segment(number), batch.documents.grids[number])
    return PackedBatch(batch.index, (batch.pieces[number],), document, batch.tokens, batch.token_budget)


def test_an_episode_learns_the_same_packed_or_alone(shards):
    """Of a packed loss (v + a) with v = sum_i V_i / sum_i n_i, the parts are those of the episodes by themselves."""
    module = training(shards)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    assert len(batch.pieces) >= 3
    packed_loss, packed = step(module, batch)
    singles = [module._packed_loss(alone(batch, number)) for number in range(len(batch.pieces))]
    whole = module._packed_loss(batch)
    video_off = [_video_off(module, alone(batch, number)) for number in range(len(batch.pieces))]
    transitions = [piece.transitions for piece in batch.pieces]
    video_weights = np.array([n * (not off) for n, off in zip(transitions, video_off, strict=True)], float)
    action_weights = np.array(transitions, float)
    expected_video = sum(w * s.video for w, s in zip(video_weights, singles, strict=True)) / video_weights.sum()
    expected_action = sum(w * s.action for w, s in zip(action_weights, singles, strict=True)) / action_weights.sum()
    torch.testing.assert_close(whole.video, expected_video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.action, expected_action, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_loss, (expected_video + expected_action).detach(), atol=1e-5, rtol=1e-5)
    module.zero_grad()
    (expected_video + expected_action).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            packed[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def _video_off(module: WAMTraining, batch: PackedBatch) -> bool:
    return bool(module._packed_loss(batch).video == 0)


@pytest.mark.parametrize("recompute", ["full", "selective", "offload"])
def test_recomputation_changes_no_gradient(shards, recompute):
    kept, again = training(shards), training(shards, recompute=recompute)
    batch = next(iter(kept.trainer.datamodule.train_dataloader()))
    (loss, gradients), (loss_again, gradients_again) = step(kept, batch), step(again, batch)
    assert loss == loss_again
    assert all(torch.equal(gradients_again[name], value) for name, value in gradients.items())


def test_dense_and_blocked_attention_train_alike(shards):
    blocked, dense = training(shards), training(shards, attention="dense")
    batch = next(iter(blocked.trainer.datamodule.train_dataloader()))
    torch.testing.assert_close(step(blocked, batch)[0], step(dense, batch)[0], atol=1e-5, rtol=1e-5)


def test_joint_prediction_costs_no_action_tokens(shards):
    """Its actions are channels of the video: what a step costs does not depend on the actions per transition."""
    joint = training(shards, wam={"joint_actions": 4}, space="latent")
    batch = next(iter(joint.trainer.datamodule.train_dataloader()))
    flops = batch_flops(joint, batch, {})
    widened = replace(batch.documents, actions=batch.documents.actions.repeat(1, 1, 3, 1))
    assert batch_flops(joint, replace(batch, documents=widened), {}) == flops


def test_instructions_of_any_length_cost_what_the_model_says(shards):
    module = training(shards)
    batch, known = next(iter(module.trainer.datamodule.train_dataloader())), {}
    known_documents = batch.documents
    state = module.wam.config.has_state(module.space) and known_documents.state is not None
    for length in (1, 7, 40):
        shape = 1, len(batch.pieces), length
        text = torch.zeros(*shape, known_documents.text.shape[-1]), torch.ones(shape, dtype=torch.bool)
        documents = replace(known_documents, text=text[0], text_mask=text[1])
        sizes = int(documents.frame_tokens[0]), documents.actions.shape[2]
        costs = DocumentCosts(module.wam.config, module.space, *sizes, state=state, text=length)
        parts = [costs.of(equal_chunks(frames, module.chunk_size(batch))) for frames in documents.transitions]
        flops = sum(parts, SequenceCost()).training_flops
        assert batch_flops(module, replace(batch, documents=documents), known) == flops
    assert len(known) == 1


def test_a_packed_run_resumes_in_the_middle_of_an_epoch(fit, tmp_path):
    whole = read_checkpoint(fit(tmp_path / "whole", *PACKED))
    limits = ("--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--checkpoint.every_n_steps=3")
    fit(tmp_path / "halves", *PACKED, *limits)
    halves = read_checkpoint(fit(tmp_path / "halves", *PACKED, "--ckpt_path=last"))
    assert whole["global_step"] == halves["global_step"] == 6
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, halves["state_dict"][name]), name
    curves = read_curves(tmp_path / "whole")
    np.testing.assert_array_equal(curves["train/loss"], read_curves(tmp_path / "halves")["train/loss"])
    assert (curves["cost/tokens_per_s"][:, 1] > 0).all()
    assert 0 <= curves["cost/waste"][-1, 1] < 0.3
    assert 0 <= curves["cost/data_wait"][-1, 1] <= 1


def test_several_robots_train_together_and_each_is_exported_with_its_own_channels(fit, tmp_path, write_shards):
    other = write_shards(tmp_path / "other", episodes=8, seed=4)
    meta = json.loads((other / "meta.json").read_text())
    meta["meta"]["action_names"] = ["y", "grip", "still"]
    del meta["sha256"]
    (other / "meta.json").write_text(json.dumps(meta))
    first = write_shards(tmp_path / "first", episodes=8)
    data_sets = json.dumps([{"latents": str(first)}, {"latents": str(other), "weight": 2.0}])
    checkpoint = fit(
        tmp_path / "run", *PACKED, "--data.latents=null", f"--data.data_sets={data_sets}", "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
    )  # fmt: skip
    assert {"val/0/action_mae", "val/1/action_mae"} <= set(read_curves(tmp_path / "run"))
    shared, second = read_trained(checkpoint), read_trained(checkpoint, data_set=1)
    assert shared.wam.config.space("robot").channels == 4
    assert second.wam.config.space("robot").channels == 3
    assert second.statistics.actions.channels == ("y", "grip", "still")
    whole, part = (model.wam.state_dict()["spaces.robot.action_out.weight"] for model in (shared, second))
    assert torch.equal(part, whole[[1, 3, 2]])  # x, y, still, grip
    with pytest.raises(ValueError, match="2 data sets, it has no number 2"):
        read_trained(checkpoint, data_set=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.packing.token_budget=20"], "packing.token_budget: expected at least"),
        (["--data.packing.token_budget=0"], "token_budget: expected int >= 1 (0)"),
        (
            ["--data.packing.chunk_multiple=3"],
            "packing.chunk_multiple: expected a multiple of every chunk size from 1 to",
        ),
        (["--data.latents=null"], "either data.latents or data.data_sets"),
        (["--model.scale.recompute=some"], "recompute"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(fit, tmp_path, capsys, overrides, message):
    fit(tmp_path, *PACKED, *overrides, expect=2)
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert sum(line.startswith("error:") for line in said) == 1
    assert not any("Traceback" in line for line in said)


def test_joint_prediction_has_no_action_tokens_and_is_taken_off_for_stage_two(fit, tmp_path):
    latent = ("--model.space=latent", "--data.space=latent", "--model.wam.joint_actions=4", "--trainer.max_steps=2")
    checkpoint = fit(tmp_path / "joint", *PACKED, *latent, "--trainer.val_check_interval=2")
    curves = read_curves(tmp_path / "joint")
    assert curves["train/action"][-1, 1] > 0
    assert "val/action_mae" not in curves
    joint = WorldActionModel.from_pretrained(export_wam(checkpoint, tmp_path / "wam"))
    assert joint.config.joint_actions == 4
    assert joint.joint_out is not None
    overrides = (f"--model.init_from={tmp_path / 'wam'}", "--model.wam=null", "--trainer.max_steps=1")
    adapted = read_trained(fit(tmp_path / "adapt", *PACKED, *overrides, "--model.optimizer.lr=1e-9")).wam
    assert adapted.config.joint_actions == 0
    assert set(adapted.config.spaces) == {"latent", "robot"}
    torch.testing.assert_close(adapted.video_in.weight, joint.video_in.weight, atol=1e-6, rtol=0)


def test_a_jointly_predicted_action_is_the_mean_over_its_frames_tokens(shards):
    """Frame 1's channels are the action that leaves it; the last frame's slot counts for nothing."""
    data = WAMDataModule(shards, transitions=2, batch_size=1, space="latent")
    plain = data.store.batch(np.array([0]), np.array([0]), 2)
    joint = with_joint_actions(Documents.of_segments(plain, (1, 2, 2)))
    noise = draw_noise(plain, 2, LossSettings(), torch.Generator().manual_seed(0), joint=4)
    of_video, latents = noise.video.unflatten(1, (2, 4)), joint.latents.unflatten(1, (3, 4))
    assert (of_video[..., -4:] == of_video[:, :, :1, -4:]).all()
    assert torch.equal(latents[0, 1, :, -4:], plain.actions[0, 1].expand(4, 4))
    assert (latents[0, 2, :, -4:] == 0).all()
    velocity = torch.randn(1, 2, 4, 12)
    terms = loss_terms(Velocities(velocity.flatten(1, 2), torch.zeros(1, 0, 4)), joint, noise, joint=4)
    expected = (velocity[0, 0, :, -4:].mean(0) - (plain.actions[0, 1, 0] - of_video[0, 0, 0, -4:])).square()
    torch.testing.assert_close(terms.action / terms.action_count, expected.mean())
    assert terms.action_count == 4


def test_a_bfloat16_residual_without_autocast_is_refused(shards):
    with pytest.raises(UserError, match="bf16-mixed"):
        training(shards, residual="bfloat16")
