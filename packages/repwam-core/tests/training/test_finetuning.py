"""Fine-tuning in part: frozen parts stay as they are, LoRA starts from the pretrained function and merges into it."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.training import build_optimizer, parameter_groups
from repwam_core.data.batches import Documents, SegmentBatch
from repwam_core.export import export_wam, read_trained
from repwam_core.model.blocks import WAMLayer
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.sequence import Velocities
from repwam_core.model.wam import WorldActionModel, compile_layers
from repwam_core.training.finetuning import LORA, PARTS, FineTuning, LoRALinear, LoRASettings, merge_lora
from repwam_core.training.losses import LossSettings, documents_layout, draw_noise, noised_inputs
from repwam_core.training.module import CHECKPOINT_KEY
from repwam_core.training.parallel import initialise


def wam(**changes: object) -> WorldActionModel:
    """No weight of it is zero, so that every path shows."""
    spaces = {"robot": ActionSpace(channels=3, vectors_per_transition=2, state_channels=5)}
    sizes = {"width": 32, "heads": 2, "depth": 2, "ffn": 48, "action_width": 16, "action_ffn": 24, "text_dim": 6}
    other = {"latent_dim": 4, "window": 2, "state_token": True, "spaces": spaces}
    torch.manual_seed(0)
    model = WorldActionModel(WAMConfig.preset("tiny", **{**sizes, **other, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def run(model: WorldActionModel) -> Velocities:
    """Velocities of one segment of three transitions in two chunks."""
    draw = torch.Generator().manual_seed(3)
    batch = SegmentBatch(
        latents=torch.randn(1, 4, 4, 4, generator=draw),
        actions=torch.randn(1, 3, 2, 3, generator=draw),
        state=torch.randn(1, 4, 5, generator=draw),
        text=torch.randn(1, 4, 6, generator=draw),
        text_mask=torch.ones(1, 4, dtype=torch.bool),
        valid=torch.ones(1, 3, dtype=torch.bool),
        channel_mask=torch.ones(1, 3, dtype=torch.bool),
        episode=torch.arange(1),
        start=torch.zeros(1, dtype=torch.long),
    )
    documents, noise = Documents.of_segments(batch, (2, 1, 2)), draw_noise(batch, 2, LossSettings(), draw)
    layout = documents_layout(model, documents, [(1, 2)], "robot")
    return model(noised_inputs(documents, layout, noise, "robot"))


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "per_modality"}, {"joint_actions": 2}, {"look_ahead": 1}], ids=str
)
def test_every_weight_belongs_to_one_part(changes):
    words = [word for word in PARTS if word != "trunk"]
    for name, _ in wam(**changes).named_parameters():
        found = [word for word in words if re.match(PARTS[word], name)]
        assert len(found) == (0 if name.startswith("look_ahead.") else 1), (name, found)
        assert (found[:1] in (["video_layers"], ["action_layers"])) == bool(re.match(PARTS["trunk"], name))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizer_holds_what_is_trained_and_nothing_else(optimizer):
    frozen, updated = wam(), wam()
    FineTuning(("trunk", "text")).apply(frozen)
    FineTuning(lora=LoRASettings(rank=2, targets=["mlp"], also_train=["action_head"])).apply(updated)
    for part in (frozen, updated):
        groups = build_optimizer(part, optimizer).param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        assert stepped == {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
    names = [name for name, parameter in updated.named_parameters() if parameter.requires_grad]
    assert {name.endswith(LORA) or bool(re.match(PARTS["action_head"], name)) for name in names} == {True}
    factors = {id(parameter) for name, parameter in updated.named_parameters() if name.endswith(LORA)}
    assert factors <= {id(parameter) for parameter in parameter_groups(updated)[2]}  # AdamW's, without decay
    assert all(name.startswith(("video", "views", "action", "spaces", "joint")) for name in _trained(frozen))


def _trained(part: WorldActionModel) -> list[str]:
    return [name for name, parameter in part.named_parameters() if parameter.requires_grad]


def test_lora_starts_from_the_pretrained_function_and_merges_into_an_ordinary_model():
    plain = wam()
    updated = copy.deepcopy(plain)
    FineTuning(lora=LoRASettings(rank=3, alpha=6.0)).apply(updated)
    initialise(updated, 0, LORA)
    layers = [layer for layer in updated.modules() if isinstance(layer, LoRALinear)]
    assert all(layer.lora_a.abs().sum() > 0 and layer.scale == 2 for layer in layers)
    before, start = (run(part) for part in (plain, updated))
    assert torch.equal(before.video, start.video)
    assert torch.equal(before.actions, start.actions)
    with torch.no_grad():
        for layer in layers:
            layer.lora_b.normal_(0, 0.1)
    moved = run(updated)
    assert (moved.actions - before.actions).abs().max() > 1e-3
    merge_lora(updated)
    assert updated.state_dict().keys() == plain.state_dict().keys()
    merged = run(updated)
    torch.testing.assert_close(merged.video, moved.video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.actions, moved.actions, atol=1e-5, rtol=1e-5)


def gradients(how: str) -> list[torch.Tensor]:
    """Gradients of all updates of a model whose layers are recomputed in a way, or "compiled"."""
    updated = wam()
    FineTuning(lora=LoRASettings(rank=2)).apply(updated)
    initialise(updated, 0, LORA)
    for layer in updated.layers:
        assert isinstance(layer, WAMLayer)
        layer.recompute = "full" if how == "full" else "none"
    if how == "compiled":
        compile_layers(updated, backend="aot_eager", dynamic=True)
    velocities = run(updated)
    (velocities.video.square().sum() + velocities.actions.square().sum()).backward()
    assert all(parameter.grad is None for parameter in updated.parameters() if not parameter.requires_grad)
    return [layer.lora_b.grad for layer in updated.modules() if isinstance(layer, LoRALinear)]


def require_same_gradients(how: str) -> None:
    for expected, found in zip(gradients("none"), gradients(how), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_recomputed_layers_train_their_updates():
    require_same_gradients("full")


def test_compiled_layers_train_their_updates():
    """In a process of its own, as test_compiled_layers.py says."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def pretrained(fit, tmp_path_factory):
    """A model that knows latent actions, and one that drives the robot, each of two steps."""
    root = tmp_path_factory.mktemp("pretrained")
    latent = ("--model.space=latent", "--data.space=latent", "--trainer.max_steps=2")
    export_wam(fit(root / "latent_run", *latent), root / "latent")
    export_wam(fit(root / "robot_run", "--trainer.max_steps=2"), root / "robot")
    return root


FREEZE = ("--model.freeze=[trunk,text,video_input,video_head]",)
LORA_RUN = ("--model.lora.rank=2", "--model.lora.targets=[attention,mlp]")


@pytest.mark.parametrize("how", [FREEZE, LORA_RUN], ids=["freeze", "lora"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_trains_its_parts_alone_and_resumes_exactly(fit, tmp_path, pretrained, capsys, how, optimizer):
    given = (f"--model.init_from={pretrained / 'robot'}", "--model.wam=null", f"--model.optimizer.name={optimizer}")
    muon = ("--model.optimizer.newton_schulz_dtype=float32",)
    whole = fit(tmp_path / "whole", *given, *muon, *how)
    halves = ("--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--checkpoint.every_n_steps=3")
    fit(tmp_path / "halves", *given, *muon, *how, *halves)
    resumed = read_checkpoint(fit(tmp_path / "halves", *given, *muon, *how, "--ckpt_path=last"))
    content, start = read_checkpoint(whole), WorldActionModel.from_pretrained(pretrained / "robot").state_dict()
    for name, weight in content["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    average = content[CHECKPOINT_KEY]["ema"]["average"]
    for name, weight in start.items():
        assert (name in average) or torch.equal(weight, content["state_dict"][f"wam.{name}"]), name
    if how == LORA_RUN:
        assert all(name.endswith(LORA) for name in average)
    exported = WorldActionModel.from_pretrained(export_wam(whole, tmp_path / "wam"))
    changed = {name for name, weight in exported.state_dict().items() if not torch.equal(weight, start[name])}
    assert exported.state_dict().keys() == start.keys()
    assert changed
    if how == FREEZE:
        assert changed <= set(average)
    else:
        assert all(re.match(PARTS["trunk"], name) and name.endswith("weight") for name in changed)
        assert not any(".cross." in name for name in changed)
    fit(tmp_path / "halves", *given, *muon, "--trainer.max_steps=7", "--ckpt_path=last", expect=2)
    assert "resume with the former, or start from its exported weights" in capsys.readouterr().err


def test_a_new_space_is_trained_beside_a_frozen_trunk_and_beside_lora(fit, tmp_path, pretrained):
    given = (f"--model.init_from={pretrained / 'latent'}", "--model.wam=null", "--trainer.max_steps=1")
    for name, how in (("freeze", ("--model.freeze=[trunk,action_head]",)), ("lora", LORA_RUN)):
        checkpoint = fit(tmp_path / name, *given, *how)
        average = read_checkpoint(checkpoint)[CHECKPOINT_KEY]["ema"]["average"]
        assert {f"spaces.robot.{part}" for part in ("action_in.weight", "action_out.weight")} <= set(average)
        assert read_trained(checkpoint).wam.config.spaces.keys() == {"latent", "robot"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.freeze=[trunk]"], "give its folder, model.init_from"),
        (["--model.freeze=[trunc]"], "model.freeze: expected some of trunk, video_layers, action_layers, text"),
        (["--model.lora.rank=2", "--model.lora.targets=[mpl]"], "expected some of attention, cross_attention, mlp"),
        (["--model.lora.also_train=[head]"], "model.lora.also_train: expected some of trunk"),
        (["--model.freeze=[trunk]", "--model.lora.rank=2"], "remove model.freeze"),
        (["INIT", "--model.lora.rank=33"], "model.lora.rank: 33 is more than the 32 of layers.0.attention"),
        (["INIT", f"--model.freeze=[{','.join(PARTS)}]"], "leave nothing to train"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(fit, tmp_path, pretrained, capsys, options, message):
    given = [f"--model.init_from={pretrained / 'robot'}" if option == "INIT" else option for option in options]
    fit(tmp_path, *given, *(["--model.wam=null"] if "INIT" in options else []), expect=2)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


if __name__ == "__main__":
    require_same_gradients("compiled")
